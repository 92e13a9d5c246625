"""Image files to labels, as a stream: any number of files in bounded memory, in the order given."""

import csv
import os
import posixpath
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from noisyssl.deploy.bundle import Geometry
from noisyssl.deploy.runtime import Runtime
from noisyssl.errors import ConfigError, DataError
from noisyssl.formats import MASKS, SUFFIXES, is_image_name
from noisyssl.geometry import evaluation_view
from noisyssl.images import BadImage, decode

Item = tuple[str, Path | str]
"""A path as shown to the user, and the file, or a sentence why it is not opened."""
OUTSIDE = "leads out of the folder of its CSV"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What became of one file: probabilities, or the reason why there are none."""

    path: str
    probabilities: np.ndarray | None = None
    """(K,) float32 in the order of the manifest's classes."""
    error: str | None = None


def sources(inputs: Sequence[Path], left_out: Counter[str] | None = None) -> Iterator[Item]:
    """Every image that `inputs` name: files as they are, folders walked by name, CSVs by their `path`.

    They are what training would take: links are followed, hidden names and masks beside `images` left out; a
    CSV's paths are relative to it and name nothing outside its folder. Inputs are looked at before the first
    item comes out; memory holds the names of one folder at a time.

    Args:
        left_out: counts the masks that were left out, under "masks", while the items are taken.

    Raises:
        ConfigError: an input does not exist.
        DataError: a folder holds no image, or a CSV has no rows or no column `path`.
    """
    for path in inputs:
        if not path.exists():
            raise ConfigError(
                f"{path} does not exist; give image files, folders or a CSV with a column 'path'."
            )
    parts = []
    left_out = Counter() if left_out is None else left_out
    for path in inputs:
        part: Iterator[Item] = iter([(str(path), path)])
        if path.is_dir() or path.suffix.lower() == ".csv":
            found = _folder(path, left_out) if path.is_dir() else _table(path)
            if (first := next(found, None)) is None:
                if path.is_dir():
                    endings = ", ".join(sorted(SUFFIXES))
                    raise DataError(f"{path} holds no image; supported endings are {endings}.")
                raise DataError(f"{path} has no rows; list one image per row.")
            part = chain([first], found)
        parts.append(part)
    return chain.from_iterable(parts)


def predict(
    runtime: Runtime, items: Iterable[Item], *, batch: int = 32, threads: int | None = None
) -> Iterator[Row]:
    """One row per item, in order; probabilities at the bundle's temperature.

    Files are decoded by `threads` threads, at most 2 batches ahead.

    A file that cannot be decoded gives a row with its reason; the others are served.
    """
    workers = threads or min(8, os.cpu_count() or 1)
    geometry, temperature = runtime.manifest.geometry, runtime.manifest.temperature()
    with ThreadPoolExecutor(workers) as pool, closing(_decoded(pool, items, geometry, 2 * batch)) as images:
        while group := list(islice(images, batch)):
            good = [image for _, image in group if isinstance(image, np.ndarray)]
            rows = iter(_softmax(runtime.logits(np.stack(good)) / temperature) if good else ())
            for path, image in group:
                if isinstance(image, np.ndarray):
                    yield Row(path=path, probabilities=next(rows))
                else:
                    yield Row(path=path, error=image)


def _decoded(
    pool: ThreadPoolExecutor, items: Iterable[Item], geometry: Geometry, ahead: int
) -> Generator[tuple[str, np.ndarray | str], None, None]:
    """(path, image in the evaluation geometry or the reason), in order, with `ahead` in work at most."""
    pending: deque[tuple[str, Future[np.ndarray | str]]] = deque()
    try:
        for path, file in items:
            pending.append((path, pool.submit(_view, file, geometry)))
            if len(pending) >= ahead:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        for _, future in pending:
            future.cancel()


def _view(file: Path | str, geometry: Geometry) -> np.ndarray | str:
    if isinstance(file, str):
        return file
    try:
        return evaluation_view(decode(file), geometry.size, geometry.fit)
    except BadImage as error:
        return str(error).removeprefix(f"{file}: ")


def _folder(folder: Path, left_out: Counter[str], above: tuple[str, ...] = ()) -> Iterator[Item]:
    """Images below `folder`, by name, as training finds them.

    An inner folder that cannot be listed, or that leads back by a link, is an item that cannot be read: the
    rest is served.
    """
    if (here := os.path.realpath(folder)) in above:
        yield str(folder), "leads back, by a link, to a folder above it"
        return
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                # a link may name itself: its own is_dir would raise
                (entry.name, os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir())
                for entry in entries
                if not entry.name.startswith(".") and entry.name != "__MACOSX"
            )
    except OSError as error:
        if above:
            yield str(folder), f"cannot be listed ({error.strerror})"
            return
        raise DataError(f"{folder} cannot be listed ({error.strerror}); check its permissions.") from None
    beside_images = any(name.lower() == "images" for name, _ in names)
    for name, is_folder in names:
        path = folder / name
        if is_folder and beside_images and MASKS.search(name):
            left_out["masks"] += sum(1 for _ in _folder(path, left_out, (*above, here)))
        elif is_image_name(str(path)):
            yield str(path), path
        elif is_folder:
            yield from _folder(path, left_out, (*above, here))


def _table(path: Path) -> Iterator[Item]:
    root = os.path.abspath(path.parent)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            columns = [name.strip().lower() for name in next(reader, [])]
            if "path" not in columns:
                hint = " Separate columns by commas." if any(";" in name for name in columns) else ""
                raise DataError(
                    f"{path} has columns {', '.join(columns) or 'none'}; it must have 'path'. Add it.{hint}"
                )
            place = columns.index("path")
            for row in filter(None, reader):
                name = row[place].strip() if place < len(row) else ""
                clean = _inside(root, name)
                yield name, OUTSIDE if clean is None else path.parent / clean
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no UTF-8 CSV ({error}); save it as one.") from None


def _inside(root: str, name: str) -> str | None:
    """`name` relative to the folder `root`, or None if it names something outside.

    By name, as for training data: a link in the folder may lead anywhere, as whoever made the folder wanted.
    """
    if not name or "\0" in name:
        return None
    clean = posixpath.relpath(posixpath.join(root, name), root)
    return None if clean in (".", "..") or clean.startswith("../") else clean


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
