"""Question "serving": what Triton costs, what dynamic batching gives, and whether every answer is right.

Real servers on this machine (`deploy.triton_server`) and clients over HTTP and gRPC. The sides of
one case take turns in one process.
"""

import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from noisyssl.benchmarks.inference import random_bundle
from noisyssl.benchmarks.measure import Spread, interleaved, ratio
from noisyssl.benchmarks.records import Record, record
from noisyssl.deploy.runtime import open_runtime
from noisyssl.deploy.triton_models import version
from noisyssl.deploy.triton_record import Repository
from noisyssl.deploy.triton_repository import deploy
from noisyssl.deploy.triton_server import Server
from noisyssl.errors import MachineError

CLIENTS = 8
TOLERANCE = 1e-4
"""Largest difference of a logit to the same model in this process; other company in a batch moves less."""
ANY_PORTS = {"http": 0, "grpc": 0, "metrics": 0}
Ask = Callable[[np.ndarray], np.ndarray]


def measure(rounds: int = 15, requests: int = 10_000) -> Iterator[Record]:
    """Three records: dynamic batching with and without, the overhead of a call, answers compared."""
    with tempfile.TemporaryDirectory() as folder:
        narrow, wide = Path(folder) / "narrow", Path(folder) / "wide"
        random_bundle(narrow, "resnet18-w16", 64)
        with ExitStack() as stack:
            # one thread a run: what a small network gains by a second one, the waiting for it costs again
            gathered = served(narrow, Path(folder) / "gathered", stack, threads=1)
            single = served(narrow, Path(folder) / "single", stack, is_batching=False, threads=1)
            yield batching({"with": gathered, "without": single}, rounds=rounds)
            yield answers(narrow, gathered, requests=requests)
        random_bundle(wide, "resnet18", 224)
        with ExitStack() as stack:
            yield overhead(wide, served(wide, Path(folder) / "whole", stack), runs=2 * rounds)


def served(
    bundle: Path, folder: Path, stack: ExitStack, is_batching: bool = True, threads: int = 0
) -> Server:
    """A server of `bundle` that is ready."""
    repository = deploy(folder, version(bundle, threads=threads), None)
    if not is_batching:
        _without_batching(repository)
    return stack.enter_context(Server(repository, ports=ANY_PORTS))


def batching(servers: Mapping[str, Server], *, rounds: int, per_client: int = 50) -> Record:
    """Eight clients that ask for one image at a time: requests a second and latencies of each server."""
    images = painted(CLIENTS, 64)
    latencies: dict[str, list[float]] = {name: [] for name in servers}
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(CLIENTS))
        calls = {
            name: [call(server, image[None], stack) for image in images] for name, server in servers.items()
        }

        def burst(name: str) -> None:
            def one(place: int) -> list[float]:
                return [timed(calls[name][place]) for _ in range(per_client)]

            for values in pool.map(one, range(CLIENTS)):
                latencies[name] += values

        for name in servers:
            burst(name)  # connections, allocations
            latencies[name].clear()
        seconds = interleaved({name: lambda n=name: burst(n) for name in servers}, warm=0, runs=rounds)  # type: ignore[misc]
    count = CLIENTS * per_client
    ms = {name: 1e3 * np.asarray(values) for name, values in latencies.items()}
    gain = ratio(seconds["without"], seconds["with"])
    figures = {
        name: {
            "requests/s": Spread.of([count / value for value in seconds[name]]).median,
            "p50 ms": float(np.percentile(ms[name], 50)),
            "p95 ms": float(np.percentile(ms[name], 95)),
        }
        for name in servers
    }
    for name in servers:
        figures[name] |= {
            "times without": gain.median if name == "with" else 1.0,
            "p95 times without": figures[name]["p95 ms"] / figures["without"]["p95 ms"],
        }
    return record(
        "serving",
        settings={"case": "dynamic batching", "backbone": "resnet18-w16", "size": 64, "batch": 1,
                  "threads": 1, "clients": CLIENTS, "protocol": "HTTP", "server": servers["with"].version()},
        figures=figures,
        n=rounds,
        spread={"with.times without": gain},
    )  # fmt: skip


def answers(bundle: Path, server: Server, *, requests: int) -> Record:
    """Requests of 1-4 images by eight clients at once, each compared with the same model in this process.

    Raises:
        MachineError: two images have the same logits, so that exchanged answers would not be noticed.
    """
    images = painted(256, 64)
    with open_runtime(bundle, "onnx", "cpu") as runtime:
        expected = runtime.logits(images)
    gaps = np.abs(expected[:, None] - expected[None]).max(axis=2)
    if (gaps[~np.eye(len(images), dtype=bool)] <= 10 * TOLERANCE).any():
        raise MachineError("two of the images have equal logits; paint others.")
    generator = np.random.default_rng(2)
    picks = [generator.integers(0, len(images), generator.integers(1, 5)) for _ in range(requests)]
    with ExitStack() as stack:
        clients = [client(server, stack) for _ in range(CLIENTS)]

        def some(place: int) -> list[float]:
            return [
                float(np.abs(clients[place](images[pick]) - expected[pick]).max())
                for pick in picks[place::CLIENTS]
            ]

        start = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            differences = [value for part in pool.map(some, range(CLIENTS)) for value in part]
        seconds = time.perf_counter() - start
    return record(
        "serving",
        settings={"case": "answers", "backbone": "resnet18-w16", "size": 64, "batch": "1-4", "threads": 1,
                  "clients": CLIENTS, "protocol": "gRPC", "server": server.version()},
        figures={
            "requests": len(differences),
            "wrong answers": sum(not value <= TOLERANCE for value in differences),
            "largest logit difference": max(differences),
            "requests/s": len(differences) / seconds,
        },
        n=requests,
    )  # fmt: skip


def overhead(bundle: Path, server: Server, *, runs: int, batch: int = 8) -> Record:
    """One client, batches of eight: the server beside ONNX Runtime in this process."""
    images = painted(batch, 224)
    with ExitStack() as stack:
        runtime = stack.enter_context(open_runtime(bundle, "onnx", "cpu"))
        ask = client(server, stack)
        sides = {"in process": lambda: runtime.logits(images), "served": lambda: ask(images)}
        seconds = interleaved(sides, warm=3, runs=runs)
    times = ratio(seconds["served"], seconds["in process"])
    p50 = {name: 1e3 * float(np.percentile(values, 50)) for name, values in seconds.items()}
    figures = {
        name: {"p50 ms": p50[name], "p95 ms": 1e3 * float(np.percentile(values, 95)),
               "p50 times in process": p50[name] / p50["in process"]}
        for name, values in seconds.items()
    }  # fmt: skip
    return record(
        "serving",
        settings={"case": "overhead", "backbone": "resnet18", "size": 224, "batch": batch, "clients": 1,
                  "protocol": "gRPC", "server": server.version()},
        figures=figures,
        n=runs,
        spread={"served.times in process": times},
    )  # fmt: skip


def client(server: Server, stack: ExitStack) -> Ask:
    """A connection of its own: images to logits."""
    import tritonclient.grpc as grpc

    model = server.repository.record["name"]
    connection = stack.enter_context(grpc.InferenceServerClient(server.url("grpc")))
    wanted = [grpc.InferRequestedOutput("logits")]

    def ask(images: np.ndarray) -> np.ndarray:
        sent = grpc.InferInput("image", list(images.shape), "UINT8")
        sent.set_data_from_numpy(images)
        found: np.ndarray = connection.infer(model, [sent], outputs=wanted).as_numpy("logits")
        return found

    return ask


def call(server: Server, images: np.ndarray, stack: ExitStack) -> Callable[[], bytes]:
    """A kept connection that sends the same HTTP request every time: a client that costs next to nothing.

    Raises:
        MachineError: from the call, when the server refuses.
    """
    import tritonclient.http as web

    sent = web.InferInput("image", list(images.shape), "UINT8")
    sent.set_data_from_numpy(images)
    body, header = web.InferenceServerClient.generate_request_body(
        [sent], outputs=[web.InferRequestedOutput("logits")]
    )
    head = (
        f"POST /v2/models/{server.repository.record['name']}/infer HTTP/1.1\r\nHost: triton\r\n"
        f"Inference-Header-Content-Length: {header}\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    sent_bytes = head.encode() + body
    place = (server.host, server.ports["http"])
    connection = stack.enter_context(socket.create_connection(place, timeout=60))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask() -> bytes:
        connection.sendall(sent_bytes)
        answer = b""
        while (end := answer.find(b"\r\n\r\n")) < 0:
            answer += received(connection)
        lines = answer[:end].lower()
        length = int(lines.split(b"content-length:")[1].split(b"\r\n")[0])
        while len(answer) < end + 4 + length:
            answer += received(connection)
        found = answer[end + 4 :]
        if b" 200 " not in lines.split(b"\r\n")[0] + b" ":
            raise MachineError(f"the server answers {lines[:40]!r}: {found[:200]!r}.")
        return found

    return ask


def received(connection: socket.socket) -> bytes:
    """The next bytes of an answer."""
    part = connection.recv(1 << 16)
    if not part:
        raise MachineError("the server closed the connection; look at its log.")
    return part


def timed(ask: Callable[[], Any]) -> float:
    """Seconds of one request."""
    start = time.perf_counter()
    ask()
    return time.perf_counter() - start


def painted(count: int, size: int) -> np.ndarray:
    """(count, size, size, 3) uint8 of different colours and patterns."""
    generator = np.random.default_rng(1)
    colour = generator.integers(0, 256, (count, 1, 1, 3))
    noise = generator.integers(-60, 60, (count, size, size, 3))
    return np.clip(colour + noise, 0, 255).astype(np.uint8)


def _without_batching(repository: Repository) -> None:
    """Take the dynamic batcher out of the configuration; `read` would refuse the repository after that."""
    path: Path = repository.folder / repository.record["name"] / "config.pbtxt"
    lines: list[str] = path.read_text().splitlines()
    start: Any = lines.index("dynamic_batching {")
    end = lines.index("}", start)
    path.write_text("\n".join(lines[:start] + lines[end + 1 :]) + "\n")
