"""Decoding in a process of its own, for decoders that a broken file can bring down.

GDCM, the one free decoder of JPEG's lossless process, ends the process it runs in on some broken files. Here
that is a child: it dies, the file is refused, the next one gets a new child. Children are kept for the next
file, as many as there are threads that decode, and end with the process that started them.

The child reads an 8-byte length and a file, and answers with an 8-byte length, {"shape", "dtype"} in JSON and
the pixels; nothing where it cannot decode.
"""

import atexit
import json
import math
import os
import select
import struct
import subprocess
import sys
import time
from contextlib import suppress
from typing import IO

import numpy as np

from noisyssl.errors import MachineError
from noisyssl.images import BadImage

PATIENCE_S = 60.0
"""A child that has not answered by then is ended."""
LENGTH = struct.Struct("<Q")
GREETING = LENGTH.pack(0x4D4F43494421)
"""What a child says first: from then on a failure is the file's."""

_idle: list[tuple[int, "subprocess.Popen[bytes]"]] = []
"""Children without work, and the process that started each."""


def decoded(data: bytes) -> np.ndarray:
    """The stored values that `noisyssl.dicom.stored_values` gives in another process.

    Raises:
        BadImage: that process failed, died or took too long.
        MachineError: it cannot be started.
    """
    child = _child()
    assert child.stdin is not None
    assert child.stdout is not None
    whole, about = False, None
    try:
        deadline = time.monotonic() + PATIENCE_S
        _write(child.stdin.fileno(), LENGTH.pack(len(data)) + data, deadline)
        (size,) = LENGTH.unpack(_read(child.stdout.fileno(), LENGTH.size, deadline))
        about = json.loads(_read(child.stdout.fileno(), size, deadline)) if size else None
        if about is not None:
            kind = np.dtype(about["dtype"])
            pixels = _read(child.stdout.fileno(), math.prod(about["shape"]) * kind.itemsize, deadline)
        whole = True
    except (OSError, EOFError, TimeoutError):
        about = None
    finally:
        if whole:
            _idle.append((os.getpid(), child))
        else:
            _end(child)
    if about is None:
        raise BadImage("is a broken DICOM file (its pixels cannot be decoded)")
    return np.frombuffer(pixels, kind).reshape(about["shape"])


def _child() -> "subprocess.Popen[bytes]":
    """One that waits, or a new one; a forked process leaves its parent's alone."""
    while _idle:
        try:
            owner, child = _idle.pop()
        except IndexError:  # another thread was faster
            break
        if owner == os.getpid() and child.poll() is None:
            return child
    try:
        child = subprocess.Popen(
            # -P: a json.py in the current folder is not to be run. Its own group: Ctrl-C is for the parent.
            [sys.executable, "-P", "-m", "noisyssl.dicom_child"], process_group=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError as error:
        raise MachineError(
            f"the process that decodes DICOM files cannot be started ({error.strerror}); see that Python "
            "can run itself, and that files may be opened."
        ) from None
    assert child.stdin is not None
    assert child.stdout is not None
    os.set_blocking(child.stdin.fileno(), False)
    try:
        ready = _read(child.stdout.fileno(), LENGTH.size, time.monotonic() + PATIENCE_S) == GREETING
    except (OSError, EOFError, TimeoutError):
        ready = False
    if not ready:
        _end(child)
        raise MachineError(
            "the process that decodes DICOM files does not start; see that `python -m noisyssl.dicom_child` "
            "does."
        )
    return child


def _ready(place: int, event: int, deadline: float) -> None:
    """Wait for `event` (of `select.poll`) on a file descriptor."""
    watch = select.poll()
    watch.register(place, event)
    if not watch.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
        raise TimeoutError


def _write(place: int, data: bytes, deadline: float) -> None:
    rest = memoryview(data)
    while rest:
        _ready(place, select.POLLOUT, deadline)
        rest = rest[os.write(place, rest[: 1 << 20]) :]


def _read(place: int, size: int, deadline: float) -> bytes:
    """Exactly `size` bytes."""
    parts, missing = [], size
    while missing:
        _ready(place, select.POLLIN, deadline)
        part = os.read(place, min(missing, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    for stream in (child.stdin, child.stdout):
        with suppress(OSError):
            stream.close()  # type: ignore[union-attr] # both are pipes
    child.wait()


@atexit.register
def _end_all() -> None:
    while _idle:
        owner, child = _idle.pop()
        if owner == os.getpid():
            _end(child)


def serve(source: IO[bytes], out: IO[bytes]) -> None:
    """Answer until the questions end."""
    from noisyssl.dicom import stored_values

    out.write(GREETING)
    out.flush()
    while len(head := source.read(LENGTH.size)) == LENGTH.size:
        data = source.read(LENGTH.unpack(head)[0])
        try:
            values = np.ascontiguousarray(stored_values(data))
        except Exception:  # whatever it is: the file is at fault, and the parent says so
            out.write(LENGTH.pack(0))
        else:
            about = json.dumps({"shape": values.shape, "dtype": values.dtype.str}).encode()
            out.write(LENGTH.pack(len(about)) + about + values.tobytes())
        out.flush()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt, BrokenPipeError):
        serve(sys.stdin.buffer, sys.stdout.buffer)
