"""`noisyssl bench serving`: figure 3, one record per case."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from noisyssl.benchmarks.records import Record


def serving(rounds: int = 15, requests: int = 10_000) -> "Iterator[Record]":
    """Records of dynamic batching, the overhead of a call, and compared answers."""
    from noisyssl.benchmarks.serving import measure

    return measure(rounds=rounds, requests=requests)
