"""What all commands share: signals, pipes, full disks, names that a terminal cannot show."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from noisyssl.cli import progress, run
from noisyssl.errors import ConfigError


def start(*arguments: str, **more: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "noisyssl.cli", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload]


def test_a_full_disk_behind_stdout_is_one_line_and_exit_7():
    with open("/dev/full", "w") as full:
        process = start("doctor", stdout=full)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 7
    assert error == "error: the output cannot be written: the disk is full; free space and run it again.\n"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_what_permissions_forbid_is_one_line_and_exit_7(tmp_path, monkeypatch, capsys, number):
    """Root may do anything here, so that the refusal is a pretence."""
    from noisyssl.pipelines import scan

    def refuse(path, **_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(scan, "read_source", refuse)
    assert run(["data", "check", str(tmp_path)]) == 7
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: {os.strerror(number)}; change its permissions or name another place.\n"
    )


def test_other_errors_of_the_system_stay_what_they_are(tmp_path, monkeypatch):
    from noisyssl.pipelines import scan

    def fail(path, **_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(scan, "read_source", fail)
    with pytest.raises(OSError, match="Bad file descriptor"):
        run(["data", "check", str(tmp_path)])


def test_sigterm_leaves_nothing_half_written(tmp_path):
    process = start("data", "generate", str(tmp_path / "out"), "--count", "100000", stdout=subprocess.DEVNULL)
    began = time.monotonic()
    while not list(tmp_path.glob(".out*/images/*/*")):
        assert process.poll() is None
        assert time.monotonic() - began < 60
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_who_reads_stderr_may_leave(monkeypatch):
    class Closed:
        def write(self, text: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stderr", Closed())
    progress.tell("loss 0.3")
    with progress.training_progress("train") as show:
        show({"kind": "warning", "message": "nobody reads this"})


def test_interrupted_is_said_and_exits_130(monkeypatch, capsys, tmp_path):
    from noisyssl.pipelines import scan

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scan, "read_source", interrupt)
    assert run(["data", "check", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip() == "error: interrupted."


def test_names_that_the_terminal_cannot_show_stop_nothing(tmp_path):
    for name in ("Größe", "b"):
        (tmp_path / "ü" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, 40 * len(name), 0)).save(tmp_path / "ü" / name / f"{i}.png")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "NOISYSSL_CACHE": str(tmp_path / "cache")}
    process = start("data", "check", str(tmp_path / "ü"), stdout=subprocess.PIPE, env=environment)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert r"Gr\xf6\xdfe" in out


def test_a_path_that_is_no_utf8_is_refused_before_anything_is_written(tmp_path, capsys):
    from noisyssl.recipe import load

    with pytest.raises(ConfigError, match=r"data\.path is .*must be valid UTF-8"):
        load(flags={"data.path": "bad\udcff"})


class OutOfMemoryError(RuntimeError):
    """Named as torch's own, which is known by its name."""


@pytest.mark.parametrize(
    ("error", "what"), [(MemoryError, "the memory is"), (OutOfMemoryError, "GPU's memory")]
)
def test_full_memory_says_what_to_set_smaller(tmp_path, monkeypatch, capsys, error, what):
    from noisyssl.pipelines import scan

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(scan, "read_source", fail)
    assert run(["data", "check", str(tmp_path)]) == 7
    assert what in (line := capsys.readouterr().err)
    assert "--batch" in line


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_a_signal_during_the_scan_ends_it_at_once(tmp_path, monkeypatch, command):
    """Only from the first step on it waits for a checkpoint."""
    from noisyssl.pipelines import scan

    def note(*_: object, **__: object) -> None:
        handlers.append([signal.getsignal(number) for number in numbers])
        raise KeyboardInterrupt

    numbers, handlers = (signal.SIGTERM, signal.SIGINT), []
    monkeypatch.setattr(scan, "read_source", note)
    assert run([command, str(tmp_path), "--out", str(tmp_path / "run")]) == 130
    assert handlers == [[signal.getsignal(number) for number in numbers]]
    assert list(tmp_path.iterdir()) == []
