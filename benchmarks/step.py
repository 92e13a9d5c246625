"""Question "step": what one training step of each method costs, next to its backbone alone on two views.

All sides of a round take turns in one process on the same preloaded tensors; nothing is loaded. The
yardstick is forward and backward of the backbone on two views, without heads, loss or optimizer. Peak
memory is measured in a process of its own for each method.
"""

import multiprocessing
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from noisyssl.backbones import build_backbone
from noisyssl.batch import Batch
from noisyssl.benchmarks.measure import interleaved, ratio
from noisyssl.benchmarks.records import Record, record
from noisyssl.config import Config, PretrainConfig
from noisyssl.methods import METHODS
from noisyssl.pipelines.fit import dtype_of, prepare
from noisyssl.pipelines.setup import device_of
from noisyssl.pipelines.stepping import step
from noisyssl.recipe import load

YARDSTICK = "backbone, two views"


def measure(
    methods: Iterable[str] = tuple(METHODS), recipe: str = "small", batch: int = 64, threads: int = 2,
    runs: int = 7, memory: bool = True,
) -> Record:  # fmt: skip
    """One record: per method the milliseconds of a step, its ratio to the yardstick, its peak memory.

    Args:
        methods: names in the table of methods.
        recipe: backbone, size, optimizer and the methods' widths.
        batch: samples per step.
        threads: of torch on the CPU.
        runs: counted rounds.
        memory: whether peak memory is measured too.
    """
    torch.set_num_threads(threads)
    configs = {name: config_of(name, recipe, batch) for name in methods}
    first = next(iter(configs.values()))
    sides: dict[str, Callable[[], object]] = {YARDSTICK: backbone_alone(first)}
    sides |= {name: method_step(config) for name, config in configs.items()}
    seconds = interleaved(sides, warm=2, runs=runs)
    figures, spread = {}, {}
    for name, taken in seconds.items():
        times = ratio(taken, seconds[YARDSTICK])
        milliseconds = sorted(1000 * one for one in taken)[len(taken) // 2]
        figures[name] = {"step ms": milliseconds, "times backbone": times.median}
        spread[name] = {"times backbone": times}
        if memory and name != YARDSTICK:
            figures[name]["peak MiB"] = peak(partial(method_step, configs[name]))
    settings = {
        "backbone": first.backbone, "size": first.data.size, "batch": batch, "threads": threads,
        "precision": str(dtype_of(first.pretrain, device_of("auto"))).removeprefix("torch."),
        "optimizer": first.pretrain.optimizer, "recipe": recipe,
    }  # fmt: skip
    return record("step", settings=settings, figures=figures, n=runs, spread=spread)


def config_of(method: str, recipe: str, batch: int) -> Config:
    """The recipe's settings for one method; a queue is a multiple of the batch by the recipe's own."""
    config = load(recipe, flags={"pretrain.method": method})
    return replace(config, pretrain=replace(config.pretrain, batch=batch))


def backbone_alone(config: Config) -> Callable[[], None]:
    """Forward and backward of the backbone on two views of a batch."""
    device = device_of("auto")
    backbone = build_backbone(config.backbone, config.stem).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = dtype_of(config.pretrain, device)
    images = torch.cat(views_of(config, device, (config.data.size,) * 2))

    def both() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            features = backbone(images)
        features.float().mean().backward()
        backbone.zero_grad(set_to_none=True)

    return both


def method_step(config: Config) -> Callable[[], None]:
    """A step as the loop takes it: forward, backward, optimizer, momentum networks and queues."""
    stage: PretrainConfig = config.pretrain
    device = device_of("auto")
    torch.manual_seed(0)
    kind = METHODS[stage.method]
    method = kind(build_backbone(config.backbone, config.stem), stage.options, config.data.size)
    state = prepare(method, stage, device)
    method.train()
    sizes = [view.size for view in kind.views(config.data.size)]
    index = torch.arange(stage.batch, device=device)
    batch = Batch(views=views_of(config, device, sizes), index=index, key=index * 7919)

    def one() -> None:
        _, ok = step(state, [batch], stage.lr, stage, device, dtype_of(stage, device))
        method.after_step(0.5, ok)

    return one


def views_of(config: Config, device: torch.device, sizes: Iterable[int]) -> tuple[torch.Tensor, ...]:
    """Random bytes in channels-last memory, one tensor per view."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randint(0, 256, (config.pretrain.batch, s, s, 3), dtype=torch.uint8, generator=generator)
        .permute(0, 3, 1, 2)
        .to(device)
        for s in sizes
    )


def peak(side: Callable[[], Callable[[], None]], steps: int = 3) -> float:
    """MiB that some steps take at most: of the GPU's memory, else of a new Linux process beyond imports."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        one = side()
        for _ in range(steps):
            one()
        return torch.cuda.max_memory_allocated() / 2**20
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth, (side, steps, torch.get_num_threads()))


def _growth(side: Callable[[], Callable[[], None]], steps: int, threads: int) -> float:
    torch.set_num_threads(threads)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak: a new process inherits its parent's
    before = _kib("VmRSS")
    one = side()
    for _ in range(steps):
        one()
    return (_kib("VmHWM") - before) / 2**10


def _kib(name: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1])
