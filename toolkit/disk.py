"""Files that are whole or not there, whatever happens while they are written."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from noisyssl.errors import MachineError


def write_whole(path: Path, data: bytes | str) -> None:
    """Write beside, fsync, rename: at any moment `path` is the old or the new file, never half of one.

    Raises:
        MachineError: the disk is full or refuses; an earlier `path` is intact.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogateescape")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with disk(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turns whatever the disk refuses while writing `path` into a MachineError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else error.strerror or str(error)
        do = "free space and run the same command again" if full else "choose another folder"
        raise MachineError(f"{path} cannot be written: {what}; {do}.") from None
