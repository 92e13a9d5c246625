"""Everything that needs an NVIDIA GPU, in one go: `noisyssl bench gpu`, about eight minutes on an H100.

A part that fails does not stop the others: its error is kept and raised at the end.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from noisyssl.benchmarks import feeding, inference, ladder, limits, loading
from noisyssl.benchmarks.records import Record
from noisyssl.errors import MachineError, TrainingError
from noisyssl.pipelines.samples import Samples
from noisyssl.views import pair

Parts = dict[str, Callable[[], Iterable[Record]]]


def measure(
    say: Callable[[str], None], threads: int, runs: int = 5, count: int = 2048, only: str = ""
) -> Iterator[Record]:
    """Records as they come.

    Args:
        say: told what each part took, and why it failed if it did.
        threads: CPU threads of loaders, and the most workers of torchvision's.
        runs: counted turns of every comparison.
        count: painted images.
        only: parts whose names hold this text.

    Raises:
        MachineError: there is no GPU.
        TrainingError: parts failed; raised after all others.
    """
    if not torch.cuda.is_available():
        raise MachineError(
            "PyTorch finds no NVIDIA GPU; `noisyssl bench all` measures a computer without one."
        )
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        known = limits.measure()
        yield known
        files, packed = feeding.images(Path(folder), count, loading.SIZE, threads)
        few = loading.jpegs(Path(folder) / "few", min(count, 512))
        for name, part in parts(files, packed, few, threads, runs, known).items():
            if only not in name:
                continue
            began = time.monotonic()
            try:
                yield from part()
            except Exception as error:  # the other parts must still run: a card may be there for minutes only
                failed.append(name)
                say(f"{name} failed, {type(error).__name__}: {' '.join(str(error).split())[:500]}")
            torch.compiler.reset()  # graphs hold their memory for as long as their code is kept
            gc.collect()
            torch.cuda.empty_cache()
            say(f"{name}: {time.monotonic() - began:.0f} s")
    if failed:
        raise TrainingError(f"{len(failed)} parts failed: {', '.join(failed)}; the reasons are above.")


def parts(files: Samples, packed: Samples, few: Samples, threads: int, runs: int, known: Record) -> Parts:
    """What is measured, in order of importance."""

    def fed(backbone: str, views: int, modality: str = "natural") -> Callable[[], list[Record]]:
        return lambda: [
            feeding.measure(backbone, views, files, packed, runs=runs, threads=threads, modality=modality)
        ]

    def climbed(backbone: str) -> Callable[[], list[Record]]:
        return lambda: [ladder.measure(backbone, runs=runs, known=known)]

    def loaded() -> list[Record]:  # torchvision takes long for an image: a few hundred are enough
        return [
            loading.against_torchvision(
                "two views, on the GPU", few, pair(loading.SIZE), 32, threads, runs, 8, 0,
                device=torch.device("cuda"), workers=(),  # as many as threads
            )
        ]  # fmt: skip

    return {
        "feeding resnet18 1": fed("resnet18", 1),
        "feeding resnet18 2": fed("resnet18", 2),
        "inference": lambda: inference.measure(threads=threads),
        "ladder resnet50": climbed("resnet50"),
        "feeding resnet50 1": fed("resnet50", 1),
        "feeding resnet50 2": fed("resnet50", 2),
        "feeding xray": fed("resnet18", 2, "xray"),  # the modality whose views take most: they turn, and JPEG
        "ladder resnet18": climbed("resnet18"),
        "loading": loaded,
    }
