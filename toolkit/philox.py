"""Counter-based random numbers: every draw is a pure function of a counter and a key.

Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. One implementation
serves NumPy and torch: it uses only `*`, `^`, `&` and `>>`, element by element.
"""

from typing import Any

import numpy as np

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

Words = tuple[Any, Any, Any, Any]
"""Four int64 arrays or tensors of 32-bit words."""


def _product(multiplier: int, word: Any) -> tuple[Any, Any]:
    """High and low word of a 64-bit product, from int64.

    The product wraps in int64, but its 64 bits are right, and the mask drops the sign that `>>` drags in.
    """
    product = word * multiplier
    return (product >> 32) & MASK, product & MASK


def philox(counter: Words, key: tuple[Any, Any]) -> Words:
    """Four int64 arrays (tensors) of uniform words in [0, 2**32).

    Args:
        counter: four words in [0, 2**32): int64 arrays (tensors) or integers, broadcast together.
        key: two more of the same kind.
    """
    with np.errstate(over="ignore"):  # NumPy scalars warn where arrays wrap silently
        return _rounds(counter, key)


def _rounds(counter: Words, key: tuple[Any, Any]) -> Words:
    """`philox` without NumPy's context, where torch.compile would have to break its graph."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def words(key: Any, stream: int, count: int) -> Any:
    """(B, count) int64 uniform words in [0, 2**32), one row per sample.

    Args:
        key: (B,) int64 array or tensor, all 64 bits count; the row depends on nothing else of the batch.
        stream: what the draws are for, in [0, 2**32): different streams of one key are independent.
        count: draws per sample; the first `n` are the same for every count >= n.
    """
    blocks = -(-count // 4)
    mix: Any
    stack: Any
    if isinstance(key, np.ndarray):
        block: Any = np.arange(blocks, dtype=np.int64)
        mix, stack = philox, np.stack
    else:
        import torch  # a caller with a tensor has it loaded; NumPy callers never pay for it

        # the mask changes nothing but that torch.compile takes these for numbers, not for places in memory:
        # those it multiplies in 32 bits on a GPU, which the multipliers do not fit into
        block = torch.arange(blocks, dtype=torch.int64, device=key.device) & MASK
        mix, stack = _rounds, torch.stack
    row = key[:, None]
    out = mix((block, stream, 0, 0), (row & MASK, (row >> 32) & MASK))
    return stack(out, -1).reshape(len(key), blocks * 4)[:, :count]


def uniform(key: Any, stream: int, count: int) -> Any:
    """(B, count) uniform floats in [0, 1): float64 for a NumPy key, float32 on its device for a torch key.

    24 bits each, so every value is exact in float32, both kinds agree, and 1.0 never appears. See `words`.
    """
    draws = words(key, stream, count) >> 8
    scale = 2.0**-24
    return draws * scale if isinstance(draws, np.ndarray) else draws.float() * scale
