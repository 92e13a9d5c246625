"""A packed folder: every image decoded and resized once into one memory-mapped array.

`images.npy` (N, H, W, 3) uint8, `samples.csv`, and `pack.json` with the digests that prove both.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, Any

import numpy as np

from noisyssl.disk import disk, sync_folder, write_whole
from noisyssl.errors import ConfigError, DataError, MachineError, pick
from noisyssl.geometry import FITS, evaluation_view
from noisyssl.machine import cores
from noisyssl.pipelines.decoding import Progress, pixel_digest
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.tables import read_own_table, table_text

VERSION = 1
"""Schema of `pack.json`; another one is refused, for a pack is cheap to make again."""
BLOCK = 1024
"""Images per digest, and what a killed pack loses at most."""
SAMPLED = 8
"""Blocks whose digests are verified at every opening; `data check` verifies all."""
COLUMNS = ("path", "label", "split", "group", "true_label", "digest")


def pack(
    samples: Samples,
    folder: Path | str,
    *,
    size: int | None = None,
    fit: str = "crop",
    threads: int | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """The packed folder, verified and renamed into place at the very end.

    A pack that was killed goes on where it stopped: what it wrote lies in `FOLDER.partial`.

    Args:
        samples: What to pack; its splits are written down, so they never change again.
        folder: Where; it must not exist.
        size: Side in pixels. None packs the images as they are, which needs them to have one size.
        fit: How an image becomes a square; see `geometry.FITS`.
        threads: Threads that decode; all cores by default.
        progress: Told how many images are packed.
        say: Told in a sentence what was kept of an earlier, unfinished pack.

    Raises:
        ConfigError: the folder exists, the size is missing or out of range, another pack is writing it.
        DataError: an image broke since the scan.
        MachineError: the disk is full; the finished blocks are kept.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists; name a new folder for the pack.")
    height, width = _shape(samples, size)
    pick(FITS, fit, "--fit")
    plan = {
        "version": VERSION,
        "shape": [len(samples), height, width, 3],
        "fit": fit if size else None,
        "classes": list(samples.classes),
        "source": samples.digest(),
    }
    partial = folder.with_name(folder.name + ".partial")
    with disk(partial):
        partial.mkdir(parents=True, exist_ok=True)
    with _alone(partial):
        blocks = _kept(partial, plan, say)
        _fill(samples, partial, plan, blocks, size, fit, threads, progress)
        _describe(samples, partial, plan, blocks)
        with disk(folder):
            partial.rename(folder)
            sync_folder(folder.parent)
            for name in ("lock", "plan.json", "blocks.txt"):  # needed until now to go on after a kill
                (folder / name).unlink(missing_ok=True)
    return folder


def _shape(samples: Samples, size: int | None) -> tuple[int, int]:
    if not len(samples):
        raise DataError("there are no images to pack.")
    if size is not None:
        if not 8 <= size <= 4096:
            raise ConfigError(f"--size is {size}; it must lie in 8-4096 pixels.")
        return size, size
    sizes = np.unique(np.stack([samples.heights, samples.widths], axis=1), axis=0)
    if len(sizes) > 1:
        low, high = sizes[0].tolist(), sizes[-1].tolist()
        raise ConfigError(
            f"--size is not given and the images have {len(sizes):,} sizes, from {low[1]} x {low[0]} to "
            f"{high[1]} x {high[0]} pixels; name one, such as --size 224."
        )
    return int(sizes[0, 0]), int(sizes[0, 1])


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Hold the folder; the lock dies with the process, however that ends."""
    with disk(partial):
        file = (partial / "lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{partial} is being written by another process; wait for it.") from None
        yield


def _header(shape: list[int]) -> bytes:
    """The first bytes of an .npy file of this shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
    )
    return file.getvalue()


def _block_bytes(plan: dict[str, Any], block: int) -> int:
    count, height, width, channels = plan["shape"]
    return min(BLOCK, count - block * BLOCK) * height * width * channels


def _kept(partial: Path, plan: dict[str, Any], say: Callable[[str], None] | None) -> list[list[str]]:
    """The finished blocks of an earlier attempt, each verified; the images are cut behind them.

    A block is its own digest, of all its bytes, and the digest of each image.
    """
    images, progress, described = partial / "images.npy", partial / "blocks.txt", partial / "plan.json"
    say = say or (lambda _: None)
    blocks: list[list[str]] = []
    try:
        same, earlier = json.loads(described.read_text()) == plan and images.exists(), True
    except (OSError, ValueError):
        same, earlier = False, images.exists()
    head = _header(plan["shape"])
    if same:
        with images.open("rb") as file:
            if file.read(len(head)) == head:
                for line in progress.read_text(errors="replace").splitlines() if progress.exists() else []:
                    data, digests = file.read(_block_bytes(plan, len(blocks))), line.split()
                    whole = len(digests) == 1 + min(BLOCK, plan["shape"][0] - len(blocks) * BLOCK)
                    if not (data and whole and digests[0] == hashlib.sha256(data).hexdigest()):
                        break
                    blocks.append(digests)
        say(f"{partial}: {sum(len(block) - 1 for block in blocks):,} images of an earlier pack are kept.")
    elif earlier:
        say(f"{partial} holds an unfinished pack of other data or settings; it is started afresh.")
    write_whole(progress, "".join(" ".join(block) + "\n" for block in blocks))
    with disk(images), images.open("r+b" if same else "wb") as file:
        if not same:
            file.write(head)
        file.truncate(len(head) + sum(_block_bytes(plan, block) for block in range(len(blocks))))
    write_whole(described, json.dumps(plan))  # last: until here the old plan describes what lies there
    return blocks


def _fill(
    samples: Samples,
    partial: Path,
    plan: dict[str, Any],
    blocks: list[list[str]],
    size: int | None,
    fit: str,
    threads: int | None,
    progress: Progress | None,
) -> None:
    """Append the missing blocks to the images, and their digests to `blocks` and to disk."""
    count = len(samples)
    todo = sum(_block_bytes(plan, block) for block in range(len(blocks), -(-count // BLOCK)))
    if (free := shutil.disk_usage(partial).free) < todo:
        raise MachineError(
            f"{partial} needs {todo / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f}; "
            "free space and run the same command again."
        )

    def packed(index: int) -> tuple[bytes, str]:
        image = samples.image(index)
        image = image if size is None else evaluation_view(image, size, fit)
        if list(image.shape) != plan["shape"][1:]:
            raise DataError(f"{samples.paths[index]}: changed since it was scanned; run the command again.")
        return image.tobytes(), pixel_digest(image).hex()

    # Plain appends, not a memory map: a full disk is then an error, not a SIGBUS.
    with (
        ThreadPool(threads or cores()) as pool,
        disk(partial),
        (partial / "images.npy").open("ab") as images,
        (partial / "blocks.txt").open("a") as digests,
    ):
        for start in range(len(blocks) * BLOCK, count, BLOCK):
            whole, own, rows = hashlib.sha256(), [], range(start, min(start + BLOCK, count))
            for index, (data, digest) in zip(rows, pool.imap(packed, rows, chunksize=4), strict=True):
                whole.update(data)
                own.append(digest)
                images.write(data)
                if progress:
                    progress(index + 1, count)
            _flush(images)
            blocks.append([whole.hexdigest(), *own])
            digests.write(" ".join(blocks[-1]) + "\n")
            _flush(digests)


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _describe(samples: Samples, partial: Path, plan: dict[str, Any], blocks: list[list[str]]) -> None:
    """Write the table and the description, which make the folder a pack."""
    count, height, width, _ = plan["shape"]
    columns = samples.columns() | {"width": [width] * count, "height": [height] * count}
    columns["digest"] = [digest for block in blocks for digest in block[1:]]
    table = table_text(columns).encode("utf-8", "surrogateescape")
    write_whole(partial / "samples.csv", table)
    proof = {
        "block": BLOCK,
        "blocks": [block[0] for block in blocks],
        "samples": hashlib.sha256(table).hexdigest(),
    }
    write_whole(partial / "pack.json", json.dumps(plan | proof, indent=1))


def read_pack(folder: Path, *, every_block: bool = False) -> tuple[np.ndarray, dict[str, list[str]]]:
    """The (N, H, W, 3) uint8 memory-mapped images of a packed folder and the columns of its `samples.csv`.

    Raises:
        DataError: of another version, incomplete, or altered since it was packed.
    """
    again = "Pack the data again."
    try:
        described = json.loads((folder / "pack.json").read_text())
        version = described["version"]
        if version != VERSION:
            raise DataError(f"{folder} is packed by version {version}; this is version {VERSION}. {again}")
        shape, blocks, block = described["shape"], described["blocks"], described["block"]
        table = (folder / "samples.csv").read_bytes()
        size = (folder / "images.npy").stat().st_size
        head = _header(shape)
        wanted = len(head) + int(np.prod(shape, dtype=np.int64))
        if size != wanted:
            raise DataError(f"{folder / 'images.npy'} has {size:,} bytes, not {wanted:,}. {again}")
        with (folder / "images.npy").open("rb") as file:
            sound = file.read(len(head)) == head
        if not sound or len(blocks) != -(-shape[0] // block) or len(shape) != 4 or shape[3] != 3:
            raise DataError(f"{folder / 'images.npy'} is not described by pack.json. {again}")
        if hashlib.sha256(table).hexdigest() != described["samples"]:
            raise DataError(f"{folder / 'samples.csv'} was changed after packing. {again}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is not a readable pack ({error!r}). {again}") from None
    array = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    chosen = np.random.default_rng().permutation(len(blocks))[: None if every_block else SAMPLED]
    for number in sorted(chosen.tolist()):
        rows = array[number * block : (number + 1) * block]
        if hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest() != blocks[number]:
            first, last = number * block, number * block + len(rows) - 1
            raise DataError(f"{folder / 'images.npy'}: images {first:,}-{last:,} were changed. {again}")
    columns = read_own_table(folder / "samples.csv", COLUMNS)
    if any(len(column) != shape[0] for column in columns.values()):
        raise DataError(f"{folder / 'samples.csv'} has not {shape[0]:,} rows. {again}")
    return array, columns
