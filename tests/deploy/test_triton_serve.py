"""`noisyssl serve` starts, says where, stops cleanly, and ends when its server is killed or cannot start."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from noisyssl.cli import run
from noisyssl.deploy import triton_install
from noisyssl.deploy.triton_models import version
from noisyssl.deploy.triton_repository import deploy
from noisyssl.deploy.triton_server import Server
from noisyssl.errors import ConfigError, MachineError

pytest.importorskip("tritonclient.http", reason="pip install 'noisyssl[triton]'")
ANY = {"http": 0, "grpc": 0, "metrics": 0}


def needs_server():
    try:
        triton_install.find()
    except MachineError as error:
        pytest.skip(str(error))


def started(bundle, folder):
    """(process of `noisyssl serve`, what it printed until it was ready)."""
    needs_server()
    ports = [word for kind in ANY for word in (f"--{kind}-port", "0")]
    process = subprocess.Popen(
        [sys.executable, "-m", "noisyssl.cli", "serve", str(bundle), *ports],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            break
    return process, "".join(lines)


def is_alive(pid):
    return os.path.exists(f"/proc/{pid}") and "Z" not in open(f"/proc/{pid}/stat").read().split()[2]


def test_it_serves_a_bundle_until_told_to_stop(exported, tmp_path, monkeypatch, capsys, tissue):
    process, shown = started(exported, tmp_path)
    pid = int(re.search(r"process (\d+)", shown)[1])
    address = re.search(r"NOISYSSL_TRITON=(\S+)", shown)[1]
    for word in ("3 classes, 32 pixels", "gRPC     127.0.0.1:", "/v2/health/ready", "/metrics"):
        assert word in shown
    monkeypatch.setenv("NOISYSSL_TRITON", address)
    images = str(tissue.parent / "images" / "adipose")
    assert run(["predict", str(exported), images, "--runtime", "triton", "--csv"]) == 0
    served = capsys.readouterr().out
    assert run(["predict", str(exported), images, "--csv", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == served
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert re.search(r"stopping; [1-9]\d* requests answered, 0 refused", out)
    assert not is_alive(pid)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_killed_is_missed_and_started_again(exported, tmp_path):
    needs_server()
    repository = deploy(tmp_path / "r", version(exported, precision="fp32", batch=8), None)
    with Server(repository, ports=ANY) as server:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(MachineError, match="ended with signal 9"):
            server.watch()
    end = time.monotonic() + 20
    while True:  # the stub, which holds no port, may end a moment later
        try:
            with Server(repository, ports=server.ports) as again:
                assert again.version() != "?"
            break
        except MachineError:
            assert time.monotonic() < end


def test_no_server_outlives_the_command(exported, tmp_path):
    process, shown = started(exported, tmp_path)
    pid = int(re.search(r"process (\d+)", shown)[1])
    process.kill()
    process.communicate()
    end = time.monotonic() + 40
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.2)
    assert not is_alive(pid)


def test_a_taken_port_is_named(exported, capsys):
    needs_server()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for kind in ANY:
            ports = [word for k in ANY for word in (f"--{k}-port", str(port if k == kind else 0))]
            assert run(["serve", str(exported), *ports]) == 7
            error = capsys.readouterr().err
            assert f"port {port} on 127.0.0.1" in error
            assert f"--{kind}-port" in error


def test_wrong_ports_and_addresses_are_said(exported, tmp_path):
    needs_server()
    repository = deploy(tmp_path / "r", version(exported, precision="fp32", batch=8), None)
    with pytest.raises(ConfigError, match="each must be another one"):
        Server(repository, ports={"http": 8000, "grpc": 8000, "metrics": 0})
    with pytest.raises(ConfigError, match="--http-port is 70000"):
        Server(repository, ports={"http": 70000, "grpc": 0, "metrics": 0})
    with pytest.raises(MachineError, match=r"192\.0\.2\.1"):
        Server(repository, ports=ANY, host="192.0.2.1")


def test_a_missing_program_names_the_extra(exported, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(triton_install.importlib.util, "find_spec", lambda name: None)
    assert run(["serve", str(exported)]) == 7
    error = capsys.readouterr().err
    assert "pip install 'noisyssl[triton]'" in error
    assert "launch.sh" in error


def test_another_python_than_the_stubs_is_said(exported, tmp_path, monkeypatch):
    needs_server()
    repository = deploy(tmp_path / "r", version(exported, precision="fp32", batch=8), None)
    monkeypatch.setattr(triton_install, "python_version", lambda: "4.0")
    server = Server(repository, ports=ANY)
    if server._install.stubs is None:
        pytest.skip("this Triton brings its own")
    with pytest.raises(MachineError, match=r"stubs for .*3\.11.*this is 4\.0"), server:
        pass


def test_what_cannot_start_says_why(bundle, tmp_path):
    needs_server()
    repository = deploy(tmp_path / "r", version(bundle, precision="fp32", batch=8), None)
    (repository.folder / "noisyssl/1/model.onnx").write_bytes(b"no graph")  # after it was verified
    with (
        pytest.raises(MachineError, match=r"tritonserver ended with .*failed to load"),
        Server(repository, ports=ANY),
    ):
        pass


def test_without_a_gpu_the_tensorrt_variant_is_left_out_and_the_rest_served(bundle, tmp_path):
    needs_server()
    from noisyssl.deploy import cuda_driver

    if cuda_driver.capability() is not None:
        pytest.skip("this machine has a GPU")
    new = version(bundle, precision="fp32", batch=8)
    new.files["tensorrt"] = {"model_cc86.plan": b"a plan"}
    new.about["plans"] = {"8.6": "model_cc86.plan"}
    repository = deploy(tmp_path / "r", new, None)
    with Server(repository, ports=ANY) as server:
        assert list(server.left_out) == ["noisyssl_trt"]
        assert server.version() != "?"
