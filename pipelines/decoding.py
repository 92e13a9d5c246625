"""Decode every file of a source once and remember what came out, so that opening it again is cheap."""

import hashlib
import io
import os
import re
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import PIL

from noisyssl.disk import write_whole
from noisyssl.errors import MachineError
from noisyssl.images import BadImage, decode, header, patient, read
from noisyssl.machine import cores

Progress = Callable[[int, int], None]
"""Called with (images done, images in all), often."""

STAMP = f"2 pillow {PIL.__version__}"
"""Version of the cache; another decoder may decode to other pixels."""
SAMPLED = 64
"""Files whose bytes are compared at every opening."""
SAVE_EVERY_S = 60.0
"""A killed scan loses at most this much work."""
UNSEEN = -2
"""Size of a file that was not looked at yet; -1 is a file without a size (missing)."""


@dataclass(kw_only=True)
class Scan:
    """What decoding found, one entry per file of the source."""

    paths: list[str]
    sizes: np.ndarray
    """(N,) int64 bytes of each file."""
    mtime_ns: np.ndarray
    """(N,) int64."""
    digests: np.ndarray
    """(N, 32) uint8: SHA-256 of the file (of the pixels in array sources)."""
    pixels: np.ndarray
    """(N, 32) uint8: SHA-256 of shape and pixels; zeros where bad."""
    widths: np.ndarray
    """(N,) int32 pixels."""
    heights: np.ndarray
    """(N,) int32 pixels."""
    native: np.ndarray
    """(N,) bool: DALI decodes the same pixels."""
    patients: np.ndarray
    """(N, 8) uint8: equal in DICOM files of one patient; zeros where a file names none."""
    reasons: list[str]
    """Why a file is bad; "" for good ones."""

    @classmethod
    def blank(cls, paths: list[str]) -> "Scan":
        """Nothing looked at yet."""
        n = len(paths)
        return cls(
            paths=paths,
            sizes=np.full(n, UNSEEN, np.int64),
            mtime_ns=np.full(n, UNSEEN, np.int64),
            digests=np.zeros((n, 32), np.uint8),
            pixels=np.zeros((n, 32), np.uint8),
            widths=np.zeros(n, np.int32),
            heights=np.zeros(n, np.int32),
            native=np.zeros(n, bool),
            patients=np.zeros((n, 8), np.uint8),
            reasons=[""] * n,
        )

    def to_bytes(self) -> bytes:
        """The cache file: an .npz without pickle; texts are joined by NUL, which no path holds."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        packed = {name: _blob(value) if isinstance(value, list) else value for name, value in columns.items()}
        file = io.BytesIO()
        np.savez(file, stamp=_blob([STAMP]), **packed)  # type: ignore[arg-type] # numpy's stub
        return file.getvalue()

    @classmethod
    def from_file(cls, path: Path) -> "Scan | None":
        """What `to_bytes` wrote; None if it is missing, damaged or of another version."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if _texts(file["stamp"], 1) != [STAMP]:
                    return None
                count = len(file["sizes"])
                columns = {field.name: file[field.name] for field in fields(cls)}
            for name in ("paths", "reasons"):
                columns[name] = _texts(columns[name], count)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return cls(**columns) if {len(value) for value in columns.values()} <= {count} else None

    def reordered(self, paths: list[str]) -> "Scan":
        """The rows of these paths, in this order; blank where a path is new."""
        if paths == self.paths:
            return self
        place = {path: i for i, path in enumerate(self.paths)}
        old = np.fromiter((place.get(path, -1) for path in paths), np.int64, len(paths))
        new, known = Scan.blank(paths), np.flatnonzero(old >= 0)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                getattr(new, field.name)[known] = value[old[known]]
        new.reasons = [self.reasons[i] if i >= 0 else "" for i in old.tolist()]
        return new


def _blob(texts: Sequence[str]) -> np.ndarray:
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def _texts(blob: np.ndarray, count: int) -> list[str]:
    return blob.tobytes().decode("utf-8", "surrogateescape").split("\0") if count else []


def cache_folder(source: Path) -> Path:
    """Where the scan of this source is remembered: the data folder itself may be read-only."""
    absolute = os.path.abspath(source)
    name = re.sub(r"[^\w.-]+", "_", os.path.basename(absolute))[:40]
    key = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]
    if own := os.environ.get("NOISYSSL_CACHE"):
        base = Path(own)
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "noisyssl"
    return base / "scans" / f"{name}-{key}"


def scan_files(
    root: Path,
    paths: list[str],
    source: Path,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> Scan:
    """What decoding each file found; only files that are new, changed or were bad are opened.

    Size and time of every file and the bytes of 64 random ones are compared with the cache; if any of
    the 64 differs, all are decoded again.
    """
    cache = cache_folder(source) / "scan.npz"
    scan = (Scan.from_file(cache) or Scan.blank(paths)).reordered(paths)
    folder = f"{root}/"
    with ThreadPool(threads or cores()) as pool:
        sizes, times = _statuses(folder, paths, pool)
        bad = np.fromiter(map(bool, scan.reasons), bool, len(paths))
        fresh = (scan.sizes == sizes) & (scan.mtime_ns == times) & ~bad
        known = np.flatnonzero(fresh)
        sampled = np.random.default_rng().permutation(known)[:SAMPLED].tolist()
        now = pool.map(_file_digest, [folder + paths[row] for row in sampled])
        if any(scan.digests[row].tobytes() != digest for row, digest in zip(sampled, now, strict=True)):
            fresh[:] = False
        todo = np.flatnonzero(~fresh).tolist()
        stale = scan.paths != paths or bool(todo)
        saved = time.monotonic()
        results = pool.imap(_examine, (folder + paths[row] for row in todo), chunksize=8)
        for done, (row, found) in enumerate(zip(todo, results, strict=True), start=1):
            digest, pixels, width, height, native, person, reason = found
            scan.digests[row] = np.frombuffer(digest, np.uint8)
            scan.pixels[row] = np.frombuffer(pixels, np.uint8)
            scan.widths[row], scan.heights[row], scan.native[row] = width, height, native
            scan.patients[row] = np.frombuffer(person, np.uint8)
            scan.reasons[row] = reason
            scan.sizes[row], scan.mtime_ns[row] = sizes[row], times[row]
            if progress:
                progress(done, len(todo))
            if time.monotonic() - saved > SAVE_EVERY_S:
                _remember(cache, scan, notes)
                saved = time.monotonic()
    if stale:
        _remember(cache, scan, notes)
    return scan


def _remember(cache: Path, scan: Scan, notes: list[str] | None) -> None:
    """Write the cache; a machine where that is impossible scans every time, and is told so."""
    try:
        write_whole(cache, scan.to_bytes())
    except MachineError as error:
        note = f"The scan is not remembered ({error}); set NOISYSSL_CACHE to a writable folder."
        if notes is not None and note not in notes:
            notes.append(note)


def _statuses(folder: str, paths: list[str], pool: ThreadPool) -> tuple[np.ndarray, np.ndarray]:
    """(N,) sizes and times of files; -1 where there is no file. Threads hide a network disk's latency."""
    blocks = ((folder, paths[i : i + 4096]) for i in range(0, len(paths), 4096))
    found = [np.empty((2, 0), np.int64), *pool.imap(_status_block, blocks)]
    sizes, times = np.concatenate(found, axis=1)
    return sizes, times


def _status_block(block: tuple[str, list[str]]) -> np.ndarray:
    (folder, paths), sizes, times = block, [], []
    for path in paths:
        try:
            status = os.stat(folder + path)
        except (OSError, ValueError):
            status = None
        sizes.append(status.st_size if status else -1)
        times.append(status.st_mtime_ns if status else -1)
    return np.array([sizes, times], np.int64)


def _file_digest(name: str) -> bytes:
    with suppress(BadImage):
        return hashlib.sha256(read(name)).digest()
    return bytes(32)


def _examine(name: str) -> tuple[bytes, bytes, int, int, bool, bytes, str]:
    """Digests of the file and of its pixels, width, height, native, patient, and the reason if it is bad."""
    try:
        data = read(name)
    except BadImage as error:
        return bytes(32), bytes(32), 0, 0, False, bytes(8), str(error).removeprefix(f"{name}: ")
    digest = hashlib.sha256(data).digest()
    try:
        image = decode(data)
        native, person = header(data).native, patient(data) or bytes(8)
    except BadImage as error:
        return digest, bytes(32), 0, 0, False, bytes(8), str(error)
    return digest, pixel_digest(image), image.shape[1], image.shape[0], native, person, ""


def pixel_digest(image: np.ndarray) -> bytes:
    """SHA-256 of shape and pixels: 2 x 8 and 4 x 4 images of the same bytes differ."""
    digest = hashlib.sha256(str(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


def scan_array(array: np.ndarray, paths: list[str], digests: list[str] | None) -> Scan:
    """The same table for images that are decoded already; `digests` (hex, of the pixels) where known."""
    scan = Scan.blank(paths)
    known = (bytes.fromhex(text) for text in digests) if digests else map(pixel_digest, array)
    scan.digests[:] = np.frombuffer(b"".join(known), np.uint8).reshape(len(paths), 32)
    scan.pixels = scan.digests
    scan.heights[:], scan.widths[:] = array.shape[1:3]
    return scan
