"""Question "loading": how many augmented images a second, ours against torchvision's DataLoader at its best.

Same JPEG files, same cores, same transforms, same process; an epoch of each side in turn. The opponent
gets every choice: Pillow or tensor transforms, 0, 1, 2 or one worker per core, its start-up not counted.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import io
from torchvision.transforms import v2

from noisyssl.benchmarks.measure import Spread, interleaved, rate, ratio
from noisyssl.benchmarks.records import Record, record
from noisyssl.pipelines.generate import paint
from noisyssl.pipelines.loader import open_loader
from noisyssl.pipelines.pack import pack
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.scan import open_samples
from noisyssl.views import View, pair, training

SIZE = 224


def measure(count: int = 512, batch: int = 64, threads: int = 2, runs: int = 5) -> Iterator[Record]:
    """One record for one view, one for two, one for packed against JPEG files."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        files = jpegs(Path(folder) / "images", count)
        for name, views in (("one view", training(SIZE)), ("two views", pair(SIZE))):
            yield against_torchvision(name, files, views, batch, threads, runs)
        pack(files, Path(folder) / "packed")
        packed = open_samples(Path(folder) / "packed", labelled=False)
        yield packed_against_files(files, packed, pair(SIZE), batch, threads, runs)


def jpegs(folder: Path, count: int, distinct: int = 64) -> Samples:
    """`count` 224-pixel JPEG files of painted tissue (quality 90), of which `distinct` differ."""
    folder.mkdir()
    for i in range(distinct):
        Image.fromarray(paint(0, i, SIZE)[0]).save(folder / f"{i:05}.jpg", quality=90)
    for i in range(distinct, count):
        (folder / f"{i:05}.jpg").write_bytes((folder / f"{i % distinct:05}.jpg").read_bytes())
    return open_samples(folder, labelled=False)


def against_torchvision(
    name: str, samples: Samples, views: tuple[View, ...], batch: int, threads: int, runs: int
) -> Record:
    """Ours / the best of torchvision's settings, found by one epoch of each beforehand."""
    settings = list(itertools.product(("pillow", "tensor"), sorted({0, 1, 2, threads})))
    opponents = {
        f"{kind}, {workers} workers": Opponent(samples, views, kind, workers, batch)
        for kind, workers in settings
    }
    pilot = interleaved({key: side.epoch for key, side in opponents.items()}, warm=1, runs=1)
    best = min(pilot, key=lambda key: pilot[key][0])
    for key, side in opponents.items():
        if key != best:
            side.close()
    sides = {"dali": epoch_of(samples, views, batch, threads), "torchvision": opponents[best].epoch}
    seconds = interleaved(sides, warm=1, runs=runs)
    opponents[best].close()
    count = len(samples) // batch * batch
    faster = ratio(seconds["torchvision"], seconds["dali"])
    speeds = {key: rate(count, value) for key, value in seconds.items()}
    return _record(
        name, speeds, "dali / torchvision", faster, runs, count, batch, threads, {"torchvision": best}
    )


def packed_against_files(
    files: Samples, packed: Samples, views: tuple[View, ...], batch: int, threads: int, runs: int
) -> Record:
    """Ours from the packed array / ours from JPEG files, two views."""
    sides = {
        name: epoch_of(source, views, batch, threads)
        for name, source in (("packed", packed), ("jpeg", files))
    }
    seconds = interleaved(sides, warm=1, runs=runs)
    count = len(files) // batch * batch
    speeds = {key: rate(count, value) for key, value in seconds.items()}
    faster = ratio(seconds["jpeg"], seconds["packed"])
    return _record("packed, two views", speeds, "packed / jpeg", faster, runs, count, batch, threads, {})


def epoch_of(samples: Samples, views: tuple[View, ...], batch: int, threads: int) -> Callable[[], None]:
    """One epoch of our loader, its pipeline built and closed inside, so that no side prefetches in the other's time."""
    loader = open_loader(
        samples, samples.where("train"), views, batch=batch, seed=0, device=torch.device("cpu"),
        kind="dali", drop_last=True, threads=threads,
    )  # fmt: skip

    def epoch() -> None:
        loader.start(0, 0)
        for _ in loader:
            pass
        loader.close()

    return epoch


class Opponent:
    """torchvision's transforms v2 in torch's DataLoader, workers kept alive between epochs."""

    def __init__(
        self, samples: Samples, views: tuple[View, ...], kind: str, workers: int, batch: int
    ) -> None:
        self.loader: DataLoader[Any] = DataLoader(
            Files(samples, [transforms(view, kind) for view in views], kind),
            batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0,
        )  # fmt: skip

    def epoch(self) -> None:
        for _ in self.loader:
            pass

    def close(self) -> None:
        self.loader._iterator = None  # ends the workers


class Files(Dataset[Any]):
    """Reads, decodes once, and makes each view."""

    def __init__(self, samples: Samples, makers: list[Any], kind: str) -> None:
        self.paths = [str(samples.file(i)) for i in range(len(samples))]
        self.makers, self.kind = makers, kind

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Any]:
        path = self.paths[index]
        image = (
            Image.open(path).convert("RGB")
            if self.kind == "pillow"
            else io.decode_image(path, io.ImageReadMode.RGB)
        )
        return [make(image) for make in self.makers]


def transforms(view: View, kind: str) -> v2.Compose:
    """What `view` is, in torchvision's words; uint8 CHW out."""
    jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    radius = int(np.ceil(3 * view.sigma[1]))
    steps = [
        v2.RandomResizedCrop(view.size, view.area, view.ratio, antialias=True),
        v2.RandomHorizontalFlip(view.flip),
        v2.RandomApply([jitter], view.jitter),
        *([v2.RandomGrayscale(view.grey)] if view.grey else []),
        *([v2.RandomApply([v2.GaussianBlur(2 * radius + 1, view.sigma)], view.blur)] if view.blur else []),
        *([v2.PILToTensor()] if kind == "pillow" else []),
    ]
    return v2.Compose(steps)


def _record(
    name: str, speeds: dict[str, Spread], what: str, faster: Spread, runs: int, count: int, batch: int,
    threads: int, extra: dict[str, Any],
) -> Record:  # fmt: skip
    figures = {f"{key} images/s": value.median for key, value in speeds.items()} | {what: faster.median}
    spread = {f"{key} images/s": value for key, value in speeds.items()} | {what: faster}
    settings = {"case": name, "size": SIZE, "images": count, "batch": batch, "threads": threads, **extra}
    return record("loading", settings=settings, figures=figures, n=runs, spread=spread)
