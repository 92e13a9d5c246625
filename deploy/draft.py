"""A new bundle folder: whole and on the disk, or not there at all.

Everything is written into a hidden folder beside it, which is renamed when it is complete.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from noisyssl.deploy import bundle
from noisyssl.errors import ConfigError, MachineError


def must_be_new(out: Path) -> None:
    """Raises ConfigError when `out` exists or lies in a bundle."""
    if os.path.lexists(out):
        raise ConfigError(f"{out} already exists; give a new folder, bundles are never overwritten.")
    if all((out.absolute().parent / name).is_file() for name in (bundle.MANIFEST, bundle.ONNX)):
        raise ConfigError(f"{out} lies in a bundle, which is never written into; name a folder outside it.")


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """The folder to write into, with a manifest at last; it becomes `out` when the block ends well.

    Raises:
        ConfigError: `out` exists or lies in a bundle.
        MachineError: the disk is full or refuses.
    Whatever is raised, nothing is left behind.
    """
    must_be_new(out)
    out = out.absolute()
    parents = [folder for folder in out.parents if not folder.exists()]
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)  # not mkdtemp, whose folder only its owner could read
        yield draft
        bundle.read(draft)  # what a server will do; a bundle that cannot be read is not handed out
        for folder in (draft / "engines", draft):
            if folder.is_dir():
                _flush(folder)
        draft.rename(out)
        _flush(out.parent)
    except OSError as error:
        raise MachineError(
            f"{out} cannot be written ({error.strerror or error}); nothing was left behind. "
            "Free some space or choose another folder, then export again."
        ) from error
    finally:
        if draft.exists():
            shutil.rmtree(draft, ignore_errors=True)
        for folder in parents:
            with suppress(OSError):  # not empty: it holds the bundle
                folder.rmdir()


def digests(draft: Path) -> dict[str, str]:
    """SHA-256 of every file below `draft`, by the name a manifest gives it."""
    names = sorted(path.relative_to(draft).as_posix() for path in draft.rglob("*") if path.is_file())
    return {name: bundle.sha256(draft / name) for name in names}


def _flush(folder: Path) -> None:
    """Make names in `folder` durable; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
