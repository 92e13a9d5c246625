"""Everything that needs an NVIDIA GPU, in one go: `noisyssl bench gpu`, under eight minutes on a fast card.

A part that fails does not stop the others: its error is kept and raised at the end.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from noisyssl.benchmarks import feeding, inference, ladder, limits, loading
from noisyssl.benchmarks.records import Record
from noisyssl.errors import MachineError
from noisyssl.pipelines.samples import Samples
from noisyssl.views import pair

BACKBONES = ("resnet18", "resnet50")
Parts = dict[str, Callable[[], Iterable[Record]]]


def measure(
    threads: int, runs: int = 5, count: int = 4096, only: str = ""
) -> Iterator[tuple[str, Record | str]]:
    """(part, record) as they come, or (part, error in one line) for a part that failed.

    Args:
        threads: CPU threads of loaders, and the most workers of torchvision's.
        runs: counted turns of every comparison.
        count: painted images.
        only: parts whose names hold this text.

    Raises:
        MachineError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise MachineError(
            "PyTorch finds no NVIDIA GPU; `noisyssl bench all` measures a computer without one."
        )
    with tempfile.TemporaryDirectory() as folder:
        known = limits.measure()
        yield "limits", known
        files, packed = feeding.images(Path(folder), count, loading.SIZE, threads)
        for name, part in parts(files, packed, threads, runs, known).items():
            if only not in name:
                continue
            began = time.monotonic()
            try:
                for one in part():
                    yield name, one
            except Exception as error:  # the other parts must still run: a card is lent for minutes
                yield name, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            gc.collect()
            torch.cuda.empty_cache()
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def parts(files: Samples, packed: Samples, threads: int, runs: int, known: Record) -> Parts:
    """What is measured, in order of importance."""
    found: Parts = {}
    for backbone in BACKBONES:
        for views in (1, 2):
            found[f"feeding {backbone} {views}"] = partial(
                one, feeding.measure, backbone, views, files, packed, runs=runs, threads=threads
            )
        found[f"ladder {backbone}"] = partial(one, ladder.measure, backbone, runs=runs, known=known)
    found["loading"] = partial(
        one,
        loading.against_torchvision,
        "two views, on the GPU",
        files,
        pair(loading.SIZE),
        256,
        threads,
        runs,
        8,
        0,
        device=torch.device("cuda"),
        workers=(threads // 2,),
    )
    found["inference"] = partial(inference.measure, threads=threads)
    return found


def one(measure_it: Callable[..., Record], *arguments: object, **named: object) -> list[Record]:
    """A part of a single record."""
    return [measure_it(*arguments, **named)]
