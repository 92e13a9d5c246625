"""What the card itself can do, measured in the same run as what is compared with it."""

import time
from collections.abc import Callable

import torch

from noisyssl.benchmarks.records import Record, record

WORK: dict[str, tuple[float, float]] = {"resnet18": (10.9e9, 74e6), "resnet50": (24.5e9, 353e6)}
"""Per 224-pixel image of a training step: floating-point operations (forward and backward, 2 a multiply-add),
and bytes that activations of 2 bytes move through memory when BatchNorm is not fused with its neighbours (one
pass for the statistics, one to apply them, two backward). Weights are left out."""


def measure(runs: int = 5) -> Record:
    """Bytes/s of a copy in the card's memory, reads and writes counted; FLOP/s of a bf16 matrix product."""
    whole = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(whole)
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copied = fastest(lambda: other.copy_(whole), runs)
    multiplied = fastest(lambda: left @ right, runs)
    return record(
        "gpu limits",
        settings={"copy GiB": 2, "matrix": 8192, "dtype": "bfloat16"},
        figures={
            "copy GB/s": 2 * len(whole) / copied / 1e9,
            "matrix TFLOP/s": 2 * 8192**3 / multiplied / 1e12,
        },
        n=runs,
    )


def fastest(call: Callable[[], object], runs: int, calls: int = 10) -> float:
    """Seconds of one call in the best of `runs` turns: a limit is what the card reaches undisturbed."""
    seconds = []
    for _ in range(runs + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / calls)
    return min(seconds[1:])


def images_per_s(backbone: str, limits: Record) -> float:
    """Training images/s if neither arithmetic nor memory ever waited, one after the other (no overlap)."""
    operations, moved = WORK[backbone]
    figures = limits["figures"]
    return 1 / (operations / figures["matrix TFLOP/s"] / 1e12 + moved / figures["copy GB/s"] / 1e9)
