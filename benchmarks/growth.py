"""Question "growth": is time proportional to the data, and memory flat, from a thousand images to a million?

Three cases: an epoch over packed images of 32 pixels, opening a CSV whose files were scanned before, and the
loader's memory while training and validation take turns.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from noisyssl.benchmarks.loading import jpegs
from noisyssl.benchmarks.measure import Spread
from noisyssl.benchmarks.records import Record, record
from noisyssl.benchmarks.scanning import empty_cache
from noisyssl.pipelines.loader import open_loader
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.scan import open_samples
from noisyssl.views import evaluation, pair, training

SIZE = 32
STEADY = 20_000
CPU = torch.device("cpu")


def measure(
    largest: int = 1_000_000,
    threads: int = 2,
    turns: int = 20,
    parts: str = "epoch,opening,memory",
    images: int = 512,
) -> Iterator[Record]:
    """A record of each part.

    Args:
        largest: images; the steps before are a tenth of it, a hundredth and a thousandth.
        threads: CPU threads.
        turns: alternations of training and validation.
        parts: which of the three.
        images: files that the loaders of the third part read.
    """
    with tempfile.TemporaryDirectory(prefix="noisyssl-") as folder:
        if "epoch" in parts:
            yield epochs(Path(folder), [largest // 1000, largest // 100, largest // 10, largest], threads)
        if "opening" in parts:
            yield opening(Path(folder) / "files", largest, threads)
        if "memory" in parts:
            yield memory(Path(folder) / "images", images, threads, turns)


def epochs(folder: Path, counts: list[int], threads: int, batch: int = 256) -> Record:
    """Microseconds an image in an epoch of one view by each number of images; memory at both ends of it.

    Small sets run several epochs: what counts is the steady state, at least `STEADY` images of it.
    """
    array = np.lib.format.open_memmap(
        folder / "images.npy", mode="w+", dtype=np.uint8, shape=(counts[-1], SIZE, SIZE, 3)
    )
    rng = np.random.default_rng(0)
    for first in range(0, len(array), 100_000):
        part = array[first : first + 100_000]
        part[...] = rng.integers(0, 256, part.shape, dtype=np.uint8)
    array.flush()
    figures = {}
    for count in counts:
        loader = open_loader(
            stored(array[:count]), np.arange(count), training(SIZE), batch=min(batch, count), seed=0,
            device=CPU, threads=threads, drop_last=True,
        )  # fmt: skip
        for _ in loader:  # buffers are there after one epoch of a small set, or a part of a large one
            if loader.position[1] * batch > STEADY:
                break
        loader.start(1, 0)
        before, began, seen = anonymous(), time.perf_counter(), 0
        while seen < STEADY:
            seen += sum(len(one.index) for one in loader)
        seconds = time.perf_counter() - began
        loader.close()
        figures[f"{count:,} images"] = {
            "us / image": 1e6 * seconds / seen, "memory before, MiB": before,
            "memory after, MiB": anonymous(),
        }  # fmt: skip
    (folder / "images.npy").unlink()
    settings = {"case": "epoch", "size": SIZE, "batch": batch, "threads": threads, "views": 1}
    return record("growth", settings=settings, figures=figures, n=len(counts))


def stored(array: np.ndarray) -> Samples:
    """Samples of an array without a table of its own."""
    count = len(array)
    sizes = np.full(count, SIZE, np.int32)
    return Samples(
        root=Path(), paths=[""] * count, classes=(), labels=np.full(count, -1),
        splits=np.full(count, "train"), groups=[""] * count, heights=sizes, widths=sizes,
        native=np.ones(count, bool), digests=[""] * count, array=array,
    )  # fmt: skip


def opening(folder: Path, count: int, threads: int, distinct: int = 1000) -> Record:
    """Seconds to open a CSV of `count` files for the first time, which decodes them all, and after that.

    The files are `distinct` ones under many names (hard links): each name is opened, decoded and remembered.
    """
    folder.mkdir()
    distinct = min(distinct, count)
    rng = np.random.default_rng(0)
    from PIL import Image

    for i in range(distinct):
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    for i in range(distinct, count):
        os.link(folder / f"{i % distinct}.jpg", folder / f"{i}.jpg")
    splits = ["train"] * 8 + ["val", "test"]
    lines = (f"{i}.jpg,{i % 9},{splits[i % distinct % 10]}\n" for i in range(count))
    with (folder / "data.csv").open("w") as file:
        file.write("path,label,split\n")
        file.writelines(lines)
    seconds = []
    with empty_cache():
        for _ in range(2):
            began = time.perf_counter()
            found = open_samples(folder / "data.csv", allow_leaks=True, threads=threads)
            seconds.append(time.perf_counter() - began)
    assert len(found) == count
    figures = {"first time, s": seconds[0], "scanned before, s": seconds[1]}
    settings = {"case": "opening a CSV", "images": count, "size": SIZE, "threads": threads}
    return record("growth", settings=settings, figures=figures, n=1)


def memory(folder: Path, count: int, threads: int, turns: int) -> Record:
    """MiB of this process after each turn of an epoch of two views and an epoch of evaluation views."""
    files = jpegs(folder, count)
    rows = np.arange(len(files))
    common = {"batch": 64, "seed": 0, "device": CPU, "threads": threads}
    train = open_loader(files, rows, pair(224), drop_last=True, **common)  # type: ignore[arg-type]
    val = open_loader(files, rows, (evaluation(224),), shuffle=False, **common)  # type: ignore[arg-type]
    taken = []
    for _ in range(turns):
        for _ in itertools.chain(train, val):
            pass
        taken.append(anonymous())
    train.close()
    val.close()
    third = max(1, turns // 3)  # the first third opens threads, buffers and the allocator's pools
    early, late = float(np.median(taken[third : 2 * third])), float(np.median(taken[-third:]))
    settings = {
        "case": "training and validation in turn",
        "turns": turns,
        "images": count,
        "threads": threads,
    }
    figures = {
        "middle third, MiB": early,
        "last third, MiB": late,
        "most, MiB": max(taken),
        "growth": late / early,
    }
    return record("growth", settings=settings, figures=figures, n=turns, spread={"MiB": Spread.of(taken)})


def anonymous() -> float:
    """MiB of memory that is this process's own; pages of mapped files, which can be dropped, are not."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024
