"""A real Triton server of one repository on this machine: started, watched, stopped.

It listens on 127.0.0.1 unless told otherwise, and ends with the process that started it.
"""

import ctypes
import json
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from noisyssl.deploy import cuda_driver, triton_install, triton_launch
from noisyssl.deploy.triton_repository import Repository
from noisyssl.errors import ConfigError, MachineError

SIZE_LIMIT_FLAG = "--http-max-input-size"
PR_SET_PDEATHSIG = 1


class Server:
    """Starts on entry, is ready after it, and has stopped, its files gone, on exit."""

    def __init__(
        self,
        repository: Repository,
        *,
        host: str = "127.0.0.1",
        ports: Mapping[str, int] = triton_launch.PORTS,
        patience_s: float = 600.0,
    ) -> None:
        """Check all that can be checked before anything runs; a port of 0 becomes a free one.

        Raises:
            ConfigError: two of the ports are the same.
            MachineError: no server or no backend is installed, or a port is taken.
        """
        self.repository, self.host = repository, host
        self._patience_s = patience_s
        self._install = triton_install.find()
        can_run = triton_install.available(self._install)
        has_gpu = cuda_driver.capability() is not None
        self.left_out: dict[str, str] = {}
        """Models that cannot run here, and why."""
        for model, backend in repository.models.items():
            if backend == "tensorrt" and not (has_gpu and backend in can_run):
                self.left_out[model] = "this machine has no GPU that this Triton can use"
            elif backend not in can_run | {"ensemble"}:
                self.left_out[model] = f"this Triton has no backend {backend}"
        if "dali" in (repository.models[model] for model in self.left_out):
            ensembles = [m for m, backend in repository.models.items() if backend == "ensemble"]
            self.left_out |= dict.fromkeys(ensembles, "its first step cannot run here")
        if repository.record["name"] in self.left_out:
            raise MachineError(
                "no backend for ONNX files here; run `pip install 'noisyssl[onnx,triton]'`, or start the "
                "official container with the repository's launch.sh."
            )
        self.ports = free_ports(host, ports)
        self._scratch = tempfile.TemporaryDirectory(prefix="noisyssl-triton-")
        self._log = Path(self._scratch.name) / "triton.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of `tritonserver`."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> "Server":
        try:
            self._start()
            self._wait()
            self._at_start = self._settled()  # the warm-up
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._scratch.cleanup()

    def url(self, kind: str) -> str:
        """`HOST:PORT` for http, grpc or metrics."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.ports[kind]}"

    def watch(self) -> None:
        """Return when the server has ended by itself.

        Raises:
            MachineError: always; it says how it ended.
        """
        assert self._process is not None
        raise self._ended(self._process.wait())

    def served(self) -> dict[str, int]:
        """Requests that the classifier answered and refused since it was ready, by the server's metrics."""
        now = self._counted()
        return {kind: now[kind] - self._at_start[kind] for kind in now}

    def _settled(self) -> dict[str, int]:
        """What is counted once it rests: a run is counted after its answers went out."""
        found, now = None, self._counted()
        while now != found:
            time.sleep(0.1)
            found, now = now, self._counted()
        return now

    def _counted(self) -> dict[str, int]:
        model = re.escape(self.repository.record["name"])
        page = _fetched(f"http://{self.url('metrics')}/metrics") or ""
        found = {}
        for kind in ("success", "failure"):
            pattern = rf'^nv_inference_request_{kind}{{model="{model}"[^}}]*}} (\S+)$'
            found[kind] = sum(int(float(value)) for value in re.findall(pattern, page, re.MULTILINE))
        return found

    def version(self) -> str:
        """Of the server itself."""
        return str(json.loads(_fetched(f"http://{self.url('http')}/v2") or "{}").get("version", "?"))

    def _start(self) -> None:
        scratch = Path(self._scratch.name)
        backends = scratch / "backends"
        backends.mkdir()
        backends = triton_install.backend_directory(self._install, backends)
        environment = triton_install.environment(self._install)
        record = self.repository.record
        limit = triton_launch.input_limit(record["batch"], record["size"])
        command = [
            str(self._install.program),
            *triton_launch.flags(
                str(self._models(scratch / "models")),
                address=self.host,
                ports=self.ports,
                limit=limit if self._knows_limit(environment) else None,
                secret=secrets.token_hex(32),
            ),
            f"--backend-directory={backends}",
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: a second signal would cut requests off
                env=environment,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def _models(self, view: Path) -> Path:
        """The repository's folder, or one with links to those of its models that can run here."""
        if not self.left_out:
            return self.repository.folder.absolute()
        view.mkdir()
        for model in self.repository.models:
            if model not in self.left_out:
                (view / model).symlink_to(self.repository.folder.absolute() / model)
        return view

    def _knows_limit(self, environment: dict[str, str]) -> bool:
        done = subprocess.run(
            [str(self._install.program), "--help"],
            capture_output=True, text=True, env=environment, timeout=60,
        )  # fmt: skip
        return SIZE_LIMIT_FLAG in done.stdout + done.stderr

    def _wait(self) -> None:
        assert self._process is not None
        end = time.monotonic() + self._patience_s
        while time.monotonic() < end:
            if (code := self._process.poll()) is not None:
                raise self._ended(code)
            if _fetched(f"http://{self.url('http')}/v2/health/ready") is not None:
                return
            time.sleep(0.1)
        raise MachineError(
            f"Triton is not ready after {self._patience_s:.0f} s{self._reason()}; a slow machine needs a "
            "smaller --batch, whose warm-up is shorter."
        )

    def _ended(self, code: int) -> MachineError:
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        return MachineError(f"tritonserver ended with {how}{self._reason()}; start it again.")

    def _reason(self) -> str:
        """What its log calls an error last, in brackets; Triton logs no content of a request."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.is_file() else []
        told = [line for line in lines if re.match(r"E\d{4} |error: ", line) and "CudaDriver" not in line]
        line = next((line for line in told if "failed to load" in line), told[-1] if told else "")
        return f" ({line.partition('] ')[2][:300] or line[:300]})" if line else ""


def free_ports(host: str, ports: Mapping[str, int]) -> dict[str, int]:
    """`ports`, each of which can be listened on now; 0 becomes a free one.

    Raises:
        ConfigError: two are the same, or one is no port.
        MachineError: one is taken, or `host` is no address of this machine.
    """
    given = [port for port in ports.values() if port]
    if len(set(given)) < len(given):
        raise ConfigError(f"ports are {', '.join(map(str, ports.values()))}; each must be another one.")
    found: dict[str, int] = {}
    held = []
    try:
        for kind, port in ports.items():
            if not 0 <= port <= 65535:
                raise ConfigError(f"--{kind}-port is {port}; it must lie in 1-65535, or be 0 for a free one.")
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            one = socket.socket(family, socket.SOCK_STREAM)
            held.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Triton; not held up by TIME_WAIT
            try:
                one.bind((host, port))
                one.listen(1)
            except OSError as error:
                raise MachineError(
                    f"port {port} on {host} cannot be used for {kind} ({error.strerror}); stop what listens "
                    f"there, or choose another with --{kind}-port (0 takes a free one)."
                ) from None
            found[kind] = one.getsockname()[1]
    finally:
        for one in held:
            one.close()
    return found


def _end_with_parent() -> None:
    """In the child, before the server: the kernel ends it when this process is gone, even by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _fetched(url: str) -> str | None:
    """The body of a 200, else None."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own server
            return str(answer.read().decode())
    except OSError:
        return None
