"""Question "ladder": what each rung (precision, memory layout, compilation, graphs) adds to a training step.

Cross-entropy on one preloaded batch, all rungs in turn in one process; the lowest is float32 in contiguous
memory without TF32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from noisyssl.batch import Batch
from noisyssl.benchmarks import limits
from noisyssl.benchmarks.measure import as_in_training, interleaved, rate, ratio
from noisyssl.benchmarks.records import Record, record
from noisyssl.classifier import build_classifier
from noisyssl.config import TrainConfig
from noisyssl.errors import TrainingError
from noisyssl.objective import Given
from noisyssl.objectives import OBJECTIVES, build_objective
from noisyssl.pipelines.fit import dtype_of, prepare
from noisyssl.pipelines.setup import device_of
from noisyssl.pipelines.state import State
from noisyssl.pipelines.stepping import step

CLASSES = 9
RUNGS: dict[str, tuple[str, torch.memory_format, str]] = {  # precision, layout, `compile`
    "float32": ("float32", torch.contiguous_format, "off"),
    "bf16": ("bf16", torch.contiguous_format, "off"),
    "bf16, channels-last": ("bf16", torch.channels_last, "off"),
    "bf16, channels-last, compiled": ("bf16", torch.channels_last, "on"),
    "bf16, channels-last, CUDA graphs": ("bf16", torch.channels_last, "graphs"),
}
LOWEST, PLAIN, EAGER, COMPILED, GRAPHS = RUNGS


def measure(
    backbone: str,
    batch: int = 256,
    size: int = 224,
    steps: int = 4,
    runs: int = 5,
    known: Record | None = None,
) -> Record:
    """Images/s of each rung, what each adds to the one below it, and the GPU's memory that it takes.

    Args:
        backbone: torchvision's name.
        batch: images per step.
        size: pixels.
        steps: of each rung in a turn.
        runs: counted turns.
        known: the card's limits; adds the share of them that the highest rung reaches.
    """
    sides: dict[str, Callable[[], None]] = {}
    peaks: dict[str, float] = {}
    with as_in_training():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        for name, rung in RUNGS.items():
            with peak() as found:
                sides[name] = many(training_step(backbone, batch, size, *rung), steps)
                sides[name]()  # four steps: code is compiled in the first, graphs are recorded in the second
            peaks |= {f"{name}, GiB at most": gib for gib in found}
        seconds = interleaved(sides, warm=1, runs=runs)
    speeds = {name: rate(batch * steps, taken) for name, taken in seconds.items()}
    gains = {
        "bf16 channels-last / float32": ratio(seconds[LOWEST], seconds[EAGER]),
        "channels-last / contiguous": ratio(seconds[PLAIN], seconds[EAGER]),
        "compiled / eager": ratio(seconds[EAGER], seconds[COMPILED]),
        "CUDA graphs / compiled": ratio(seconds[COMPILED], seconds[GRAPHS]),
    }
    figures = {f"{name}, images/s": value.median for name, value in speeds.items()}
    figures |= {name: value.median for name, value in gains.items()} | peaks
    if known is not None:
        best = max(value.median for value in speeds.values())
        figures["share of the no-overlap limit"] = best / limits.images_per_s(backbone, known)
    settings = {"backbone": backbone, "size": size, "batch": batch, "device": device_of("auto").type}
    return record("ladder", settings=settings, figures=figures, n=runs, spread=gains)


def training_step(
    backbone: str, batch: int, size: int, precision: str, layout: torch.memory_format, compile: str
) -> Callable[[], None]:
    """One step as the loop takes it, on the same images every time."""
    device = device_of("auto")
    stage = replace(TrainConfig(), batch=batch, precision=precision, compile=compile)
    torch.manual_seed(0)
    given = Given(count=batch, train=np.arange(batch), classes=CLASSES)
    network = build_classifier(backbone, "plain", CLASSES)
    objective = build_objective("ce", network, OBJECTIVES["ce"][1](), given)
    state = prepare(objective, stage, device)
    state.objective.to(memory_format=layout)
    state.objective.train()
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    index = torch.arange(batch, device=device)
    views = (images.contiguous(memory_format=layout),)
    fixed = Batch(views=views, index=index, key=index, label=index % CLASSES)
    dtype = dtype_of(stage, device)

    def one() -> None:
        step(state, [fixed], stage.lr, stage, device, dtype)
        whole(state, batch)

    return one


@contextmanager
def peak() -> Iterator[list[float]]:
    """GiB of the GPU's memory that was taken inside at most, beyond what was before; nothing on a CPU."""
    found: list[float] = []
    if not torch.cuda.is_available():
        yield found
        return
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield found
    found.append((torch.cuda.max_memory_allocated() - before) / 2**30)


def whole(state: State, batch: int) -> None:
    """Raises TrainingError if steps are taken in parts: their figures are not those of the batch."""
    if state.parts > 1:
        raise TrainingError(f"a batch of {batch} does not fit into the GPU's memory; measure a smaller one.")


def many(one: Callable[[], None], count: int) -> Callable[[], None]:
    """`count` calls as one."""

    def all_of_them() -> None:
        for _ in range(count):
            one()

    return all_of_them
