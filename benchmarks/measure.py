"""Timing of several sides in one process, side by side, so that a busy machine slows all of them alike."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """What repeated measurements of one figure look like."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median, 10th and 90th percentile (linear interpolation)."""
        p10, median, p90 = np.percentile(np.asarray(values, dtype=float), (10, 50, 90))
        return cls(median=float(median), p10=float(p10), p90=float(p90))


def interleaved(
    sides: Mapping[str, Callable[[], object]], warm: int = 1, runs: int = 7
) -> dict[str, list[float]]:
    """Seconds of each of `runs` calls of every side; entry i of all sides comes from the same round.

    Rounds alternate their order (A B, B A, A B, ...): neither side always follows the other. `warm` rounds
    come first and do not count. Each call ends with a CUDA synchronisation where torch uses CUDA.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-warm, runs):
        for name in sorted(sides, key=list(sides).index, reverse=turn % 2 == 1):
            synchronise()
            start = time.perf_counter()
            sides[name]()
            synchronise()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(of: Sequence[float], to: Sequence[float]) -> Spread:
    """`of[i] / to[i]` round by round: "how many times faster is `to`", for the seconds of `interleaved`.

    Dividing within a round, before taking the median, cancels what slowed the whole round.
    """
    return Spread.of([a / b for a, b in zip(of, to, strict=True)])


def rate(count: int, seconds: Sequence[float]) -> Spread:
    """Items per second when each run handled `count` items."""
    return Spread.of([count / one for one in seconds])


@contextmanager
def as_in_training() -> Iterator[None]:
    """Let cuDNN try which of its kernels is fastest, as in training; what is set inside is put back."""
    from torch.backends import cuda, cudnn

    before = cudnn.benchmark, cudnn.allow_tf32, cuda.matmul.allow_tf32
    cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, cuda.matmul.allow_tf32 = before


def synchronise() -> None:
    """Wait for the GPU where torch uses one."""
    torch = sys.modules.get("torch")  # a side that uses CUDA through torch has imported it
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
