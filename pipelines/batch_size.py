"""`batch = "auto"`: steps of a scratch network are timed at doubling sizes, before the run begins.

The network has random weights and sees noise. Loading, compilation and other processes have no part in it.
"""

import gc
from dataclasses import replace
from typing import Any

import torch

from noisyssl.batch import Batch
from noisyssl.config import AutoBatch, Config, Stage
from noisyssl.distributed import alone, exchange, rank, world
from noisyssl.errors import ConfigError, TrainingError
from noisyssl.pipelines.fit import dtype_of, prepare
from noisyssl.pipelines.loader import streams
from noisyssl.pipelines.resident import bytes_of
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.setup import device_of, seed_all
from noisyssl.pipelines.speedup import milliseconds
from noisyssl.pipelines.stepping import step

LEAST, MOST = 32, 4096
"""The smallest and the largest batch that are tried, of all processes together."""
STEPS = 8
"""Of an epoch: a batch too large for so many is tried only if it is the smallest."""
FULL = 0.8
"""Share of the GPU's free memory that a step may take: views are made there meanwhile, and gaps remain."""
NEAR = 0.95
"""Share of the best images/s that is as good: a larger batch costs steps of the optimizer for nothing."""


def is_open(config: Config, stage: Stage) -> bool:
    """Whether the batch will be measured, so that its number means nothing yet."""
    return isinstance(stage.batch, AutoBatch) and device_of(config.device).type == "cuda"


def settle(config: Config, name: str, samples: Samples, module: Any) -> tuple[Config, dict[str, Any]]:
    """`config` with numbers for a batch of auto and its learning rate; how they were found, empty without.

    Several processes call this together; the first one measures for all.

    Args:
        module: the stage called `name`; it says which sizes suit, and makes what is measured.

    Raises:
        ConfigError: no size suits.
    """
    stage: Stage = getattr(config, name)
    if not isinstance(stage.batch, AutoBatch):
        return config, {}
    named = batch = int(stage.batch)

    def at(size: int) -> Config:
        lr = scaled(stage.lr, stage.optimizer, size / named)
        settled_stage: dict[str, Any] = {name: replace(stage, batch=size, lr=lr)}
        settled = replace(config, **settled_stage)
        module.must_make_sense(settled)
        module.must_be_possible(settled, samples)
        return settled

    def suits(size: int) -> bool:
        try:
            return bool(at(size))
        except ConfigError:  # too small for a method, or its queue is no multiple
            return False

    speeds: dict[int, float] = {}
    why = f"batch auto is {batch}, as set or by default: a CPU gains nothing by another"
    if is_open(config, stage):
        sizes = [size for size in doubling(len(samples.where("train")), world()) if suits(size)]
        if rank() == 0:
            speeds = measured(config, stage, samples, module, sizes, world())
        gc.collect()
        torch.cuda.empty_cache()  # what is free decides where the images will lie
        speeds = dict(exchange([*speeds.items()])[0])
        batch = smallest(speeds) if speeds else [*sizes, named][0]
        told = ", ".join(f"{speed:,.0f} at {size}" for size, speed in speeds.items()) or "none fits"
        why = f"batch auto is {batch}, the smallest within 5 % of the best ({told}; images/s of one GPU)"
    settled = at(batch)
    lr = getattr(settled, name).lr
    why += f"; lr is {lr:.3g}, from {stage.lr:g} at {named}" if batch != named else ""
    return settled, {
        "message": f"{why}.", "batch": batch, "lr": lr,
        "asked": {"batch": named, "lr": stage.lr}, "images_per_s": {str(k): v for k, v in speeds.items()},
    }  # fmt: skip


def doubling(images: int, processes: int) -> list[int]:
    """The sizes to try, in equal shares for all processes."""
    first = -(-LEAST // processes) * processes
    most = max(first, min(MOST, images // STEPS))
    return [first << k for k in range(most.bit_length()) if first << k <= most]


def smallest(speeds: dict[int, float]) -> int:
    """The smallest batch that is as good as the best."""
    return min(size for size, speed in speeds.items() if speed >= NEAR * max(speeds.values()))


def scaled(lr: float, optimizer: str, ratio: float) -> float:
    """The learning rate for `ratio` times the batch: linear for SGD and LARS, else the square root.

    Goyal et al. 2017, arXiv:1706.02677, and Malladi et al., NeurIPS 2022, arXiv:2205.10287.
    """
    return lr * (ratio if optimizer in ("sgd", "lars") else ratio**0.5)


def measured(
    config: Config, stage: Stage, samples: Samples, module: Any, sizes: list[int], processes: int
) -> dict[int, float]:
    """Images/s of this GPU on its share of a batch, by the batch's size, until one does not fit."""
    device, stage = device_of(config.device), replace(stage, compile="off")
    kept = bytes_of(samples) if streams(config.data.loader, samples, device)[0] == "resident" else 0
    room = torch.cuda.memory_allocated(device) + FULL * (torch.cuda.mem_get_info(device)[0] - kept)
    found: dict[int, float] = {}
    with alone():
        seed_all(config.seed)
        objective, views = module.scratch(config, samples)
        state, dtype = prepare(objective, stage, device), dtype_of(stage, device)
        objective.heaviest()
        objective.train()
        for size in sizes:
            index = torch.arange(size // processes, device=device)
            shapes = [(len(index), view.size, view.size, 3) for view in views]
            pixels = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for shape in shapes]
            batch = Batch(
                views=tuple(rows.permute(0, 3, 1, 2) for rows in pixels), index=index % len(samples),
                key=index * 7919, label=index % max(1, len(samples.classes)),
            )  # fmt: skip

            def one(batch: Batch = batch) -> None:
                _, ok = step(state, [batch], 0.0, stage, device, dtype)
                objective.after_step(0.0, ok)

            torch.cuda.reset_peak_memory_stats(device)
            try:
                ms = milliseconds(one, device)
            except TrainingError:  # the memory is full, and the batch cannot be taken in parts
                break
            if state.parts > 1 or torch.cuda.max_memory_allocated(device) > room:
                break
            found[size] = round(1e3 * len(index) / ms, 1)
    return found
