"""Question "feeding": does the data path keep up with the training step?

The same step on real batches and on one batch that never changes, in turn in one process: their ratio is what
loading and augmentation cost. Also how many views a second each source makes when nothing trains.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from noisyssl.backbones import build_backbone
from noisyssl.batch import Batch
from noisyssl.benchmarks.ladder import whole
from noisyssl.benchmarks.measure import as_in_training, interleaved, rate, ratio
from noisyssl.benchmarks.records import Record, record
from noisyssl.classifier import build_classifier
from noisyssl.config import PretrainConfig, Stage, TrainConfig
from noisyssl.methods import METHODS
from noisyssl.objective import Given, Objective
from noisyssl.objectives import OBJECTIVES, build_objective
from noisyssl.pipelines.fit import dtype_of, prepare
from noisyssl.pipelines.loader import Kind, open_loader
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.setup import device_of
from noisyssl.pipelines.stepping import step
from noisyssl.views import View, adapt, pair, training

Next = Callable[[], Batch]
SYNTHETIC = "synthetic"
CLASSES = 9


def sources(files: Samples, packed: Samples, device: torch.device) -> dict[str, tuple[Samples, Kind]]:
    """What is compared with synthetic batches: packed images on the GPU, by DALI, and files by DALI."""
    found: dict[str, tuple[Samples, Kind]] = {}
    if device.type == "cuda":
        found["packed, resident"] = (packed, "resident")
    return found | {"packed, streamed": (packed, "dali"), "files, DALI": (files, "dali")}


def measure(
    backbone: str, views: int, files: Samples, packed: Samples, batch: int = 256, size: int = 224,
    steps: int = 6, runs: int = 5, threads: int = 16, compile: str = "off", modality: str = "natural",
) -> Record:  # fmt: skip
    """Per source: step on its batches / step on synthetic ones, and views/s without training.

    Args:
        backbone: torchvision's name.
        views: 1 trains a classifier by cross-entropy, 2 SimCLR.
        files: images in files.
        packed: the same images packed.
        batch: images per step.
        size: pixels of a view.
        steps: of each side in a turn.
        runs: counted turns.
        threads: CPU threads of the loaders.
        compile: whether the step is compiled.
        modality: what the views are adapted to.
    """
    device = device_of("auto")
    stage, objective, wanted = work(backbone, views, size, batch, compile)
    wanted = tuple(adapt(view, modality) for view in wanted)
    state, dtype = prepare(objective, stage, device), dtype_of(stage, device)
    objective.train()
    with ExitStack() as stack:
        stack.enter_context(as_in_training())
        feeds = {SYNTHETIC: synthetic(batch, views, size, device)}
        for name, (samples, kind) in sources(files, packed, device).items():
            feeds[name] = endless(samples, kind, wanted, batch, device, threads, stack)

        def train(following: Next) -> None:
            for _ in range(steps):
                _, ok = step(state, [following()], stage.lr, stage, device, dtype)
                objective.after_step(0.5, ok)
            whole(state, batch)

        def load(following: Next) -> None:
            for _ in range(steps):
                following()

        trained = interleaved({name: bound(train, feed) for name, feed in feeds.items()}, warm=2, runs=runs)
        real = {name: feed for name, feed in feeds.items() if name != SYNTHETIC}
        loaded = interleaved({name: bound(load, feed) for name, feed in real.items()}, warm=1, runs=runs)
    costs = {name: ratio(trained[name], trained[SYNTHETIC]) for name in real}
    eaten = rate(views * batch * steps, trained[SYNTHETIC]).median
    figures = {
        name: {
            "step / synthetic step": costs[name].median,
            "images/s": rate(batch * steps, trained[name]).median,
            "views/s alone": (alone := rate(views * batch * steps, loaded[name]).median),
            "views made / eaten": alone / eaten,
        }
        for name in real
    }
    settings = {
        "backbone": backbone, "views": views, "size": size, "batch": batch, "device": device.type,
        "threads": threads, "compiled": compile, "modality": modality,
    }  # fmt: skip
    spread = {f"{name}.step / synthetic step": cost for name, cost in costs.items()}
    return record("feeding", settings=settings, figures=figures, n=runs, spread=spread)


def work(
    backbone: str, views: int, size: int, batch: int, compile: str
) -> tuple[Stage, Objective, tuple[View, ...]]:
    """Settings, objective and views of supervised training (one view) or SimCLR (two)."""
    torch.manual_seed(0)
    if views == 1:
        network = build_classifier(backbone, "plain", CLASSES)
        stage: Stage = replace(TrainConfig(), batch=batch, compile=compile)
        given = Given(count=batch, train=np.arange(batch), classes=CLASSES)
        return stage, build_objective("ce", network, OBJECTIVES["ce"][1](), given), training(size)
    kind = METHODS["simclr"]
    stage = replace(PretrainConfig(), batch=batch, compile=compile)
    return stage, kind(build_backbone(backbone), kind.Config(), size), pair(size)


def synthetic(batch: int, views: int, size: int, device: torch.device) -> Next:
    """The same random bytes every time, where and as a loader puts them."""
    shape = (batch, size, size, 3)
    images = tuple(
        torch.randint(0, 256, shape, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
        for _ in range(views)
    )
    index = torch.arange(batch, device=device)
    fixed = Batch(views=images, index=index, key=index * 7919, label=index % CLASSES)
    return lambda: fixed


def endless(
    samples: Samples, kind: Kind, views: tuple[View, ...], batch: int, device: torch.device, threads: int,
    stack: ExitStack,
) -> Next:  # fmt: skip
    """Batches of a loader, epoch after epoch."""
    loader = open_loader(
        samples, samples.where("train"), views, batch=batch, seed=0, device=device, kind=kind, drop_last=True,
        threads=threads, labels=torch.arange(len(samples)) % CLASSES,
    )  # fmt: skip
    stack.callback(loader.close)
    batches: Iterator[Batch] = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    return lambda: next(batches)


def bound(call: Callable[[Next], None], feed: Next) -> Callable[[], None]:
    return lambda: call(feed)


def images(folder: Path, count: int, size: int, threads: int) -> tuple[Samples, Samples]:
    """Painted JPEG files, and the same packed at `size` pixels."""
    from noisyssl.benchmarks.loading import jpegs
    from noisyssl.pipelines.pack import pack
    from noisyssl.pipelines.scan import open_samples

    files = jpegs(folder / "images", count)
    return files, open_samples(pack(files, folder / "packed", size=size, threads=threads), labelled=False)
