"""Question "loading": how many augmented images a second, ours against torchvision's DataLoader at its best.

Same JPEG files, same cores, same transforms, same process; an epoch of each side in turn. The opponent
gets every choice: Pillow or tensor transforms, 0, 1, 2 or one worker per core, its start-up not counted.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler

from noisyssl.benchmarks.measure import rate, ratio, synchronise
from noisyssl.benchmarks.records import Record, record
from noisyssl.benchmarks.torchvision_views import Files, transforms
from noisyssl.pipelines.generate import paint
from noisyssl.pipelines.loader import open_loader
from noisyssl.pipelines.pack import pack
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.scan import open_samples
from noisyssl.views import MODALITIES, View, adapt, pair, training

SIZE = 224
CPU = torch.device("cpu")


def measure(
    count: int = 1024, batch: int = 64, threads: int = 2, runs: int = 5, settings: int = 8
) -> Iterator[Record]:
    """Records for one view, two, two of each modality; and of packed arrays against files, 224 and 64 pixels.

    Args:
        count: images timed in one turn.
        batch: images per batch.
        threads: CPU threads of ours, and the most workers of the opponent.
        runs: turns of each side.
        settings: how many of the opponent's settings are tried.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        files = jpegs(Path(folder) / "images", count)
        cases: tuple[tuple[str, tuple[View, ...], int], ...] = (
            ("one view", training(SIZE), 0),
            ("two views", pair(SIZE), 0),
            ("two views, torchvision with SimCLR's own blur kernel", pair(SIZE), 23),
        )
        for name, views, kernel in cases:
            yield against_torchvision(name, files, views, batch, threads, runs, settings, kernel)
        for modality in MODALITIES:
            if (views := tuple(adapt(view, modality) for view in pair(SIZE))) != pair(SIZE):
                name = f"two views, {modality}"
                yield against_torchvision(name, files, views, batch, threads, runs, settings, 0)
        for size in (SIZE, 64):
            packed = pack(files, Path(folder) / f"packed-{size}", size=size)
            array = open_samples(packed, labelled=False)
            for name, views in (("one view", training(size)), ("two views", pair(size))):
                yield packed_against_files(f"packed, {name}", files, array, views, batch, threads, runs)


def jpegs(folder: Path, count: int, distinct: int = 64) -> Samples:
    """`count` 224-pixel JPEG files of painted tissue (quality 90), of which `distinct` differ."""
    folder.mkdir()
    for i in range(distinct):
        Image.fromarray(paint(0, i, SIZE)[0]).save(folder / f"{i:05}.jpg", quality=90)
    for i in range(distinct, count):
        (folder / f"{i:05}.jpg").write_bytes((folder / f"{i % distinct:05}.jpg").read_bytes())
    return open_samples(folder, labelled=False)


def against_torchvision(
    name: str, samples: Samples, views: tuple[View, ...], batch: int, threads: int, runs: int, settings: int,
    kernel: int, device: torch.device = CPU, workers: Sequence[int] = (0, 1, 2),
) -> Record:  # fmt: skip
    """Ours / the best of torchvision's settings, found by one turn of each beforehand.

    `kernel` is the width of torchvision's blur: 0 is 3 sigma either side, where ours is cut; SimCLR's
    implementations take a tenth of the image, 23 at 224 pixels. On a GPU `device` ours computes there, while
    torchvision's batches stay in the computer's memory: their copy is not counted.
    """
    choices = list(itertools.product(("pillow", "tensor"), sorted({*workers, threads})))[:settings]
    opponents = {
        f"{kind}, {count} workers": opponent(samples, views, kind, count, batch, kernel)
        for kind, count in choices
    }
    full = 2 * max(count for _, count in choices)  # batches that lie finished where workers are ahead
    pilot = {
        key: seconds_of(side, max(full, len(samples) // batch // 4), full) for key, side in opponents.items()
    }
    best = min(pilot, key=lambda key: pilot[key])
    sides = {"dali": ours(samples, views, batch, threads, device), "torchvision": opponents[best]}
    extra = {"torchvision": best}
    return _compared(name, sides, len(samples), batch, threads, runs, views[0].size, extra, full)


def packed_against_files(
    name: str, files: Samples, packed: Samples, views: tuple[View, ...], batch: int, threads: int, runs: int
) -> Record:
    """Ours from a packed array / ours from the JPEG files it was made of."""
    sides = {"packed": ours(packed, views, batch, threads), "jpeg": ours(files, views, batch, threads)}
    return _compared(name, sides, len(files), batch, threads, runs, views[0].size, {})


Side = Callable[[], Iterator[Any]]
"""Starts an endless stream of batches; closing the iterator ends its threads and workers."""


def seconds_of(side: Side, batches: int, warm: int = 0) -> float:
    """Seconds of `batches` batches in the steady state: after the start-up and `warm` more, at least four."""
    time.sleep(1)  # the workers of the side before are gone by then
    stream = side()
    for _ in itertools.islice(stream, max(4, warm)):
        pass
    synchronise()
    began = time.perf_counter()
    for _ in itertools.islice(stream, batches):
        pass
    synchronise()
    seconds = time.perf_counter() - began
    stream.close()  # type: ignore[attr-defined]
    return seconds


def ours(
    samples: Samples, views: tuple[View, ...], batch: int, threads: int, device: torch.device = CPU
) -> Side:
    """Our loader by DALI."""

    def stream() -> Iterator[Any]:
        loader = open_loader(
            samples, samples.where("train"), views, batch=batch, seed=0, device=device,
            kind="dali", drop_last=True, threads=threads,
        )  # fmt: skip
        try:
            while True:
                yield from loader
        finally:
            loader.close()

    return stream


def opponent(
    samples: Samples, views: tuple[View, ...], kind: str, workers: int, batch: int, kernel: int
) -> Side:
    """The opponent: torchvision's transforms v2 in torch's DataLoader, in one epoch without end.

    Between epochs its workers would stand still, and an epoch of few batches never have work for all of them.
    """

    def stream() -> Iterator[Any]:
        files = Files(samples, [transforms(view, kind, kernel) for view in views], kind)
        order = RandomSampler(files, replacement=True, num_samples=1 << 40)
        loader: DataLoader[Any] = DataLoader(
            files, batch, sampler=order, num_workers=workers, persistent_workers=workers > 0
        )
        try:
            yield from loader
        finally:
            loader._iterator = None  # ends the workers

    return stream


def _compared(
    name: str, sides: dict[str, Side], images: int, batch: int, threads: int, runs: int, size: int,
    extra: dict[str, Any], full: int = 0,
) -> Record:  # fmt: skip
    """The sides in turn, the order alternating; speeds and the ratio first / second, round by round.

    A turn takes the images once, and at least `full` batches after as many that do not count.
    """
    batches = max(full, images // batch)
    seconds: dict[str, list[float]] = {key: [] for key in sides}
    for turn in range(runs):
        for key in sorted(sides, key=list(sides).index, reverse=turn % 2 == 1):
            seconds[key].append(seconds_of(sides[key], batches, full))
    first, second = sides
    faster = ratio(seconds[second], seconds[first])
    speeds = {f"{key} images/s": rate(batches * batch, value) for key, value in seconds.items()}
    what = f"{first} / {second}"
    return record(
        "loading",
        settings={
            "case": name, "size": size, "files": f"{SIZE} px JPEG", "images": images, "batch": batch,
            "threads": threads, **extra,
        },
        figures={key: value.median for key, value in speeds.items()} | {what: faster.median},
        n=runs,
        spread={**speeds, what: faster},
    )  # fmt: skip
