"""Python loops as machine code (numba)."""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., object]) -> Any:
    """`function` as machine code that holds no interpreter lock; kept on disk where there is a place.

    The kept code is thrown away when the function's own file changes, not when another does: a compiled
    function may only call compiled functions of its own file.
    """
    rules: dict[str, Any] = {
        "nogil": True,
        "fastmath": {"contract"},
    }  # "contract": multiply and add in one instruction
    try:
        return njit(cache=True, **rules)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(**rules)(function)
