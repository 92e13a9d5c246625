"""SIGTERM and Ctrl-C as a wish that the loop grants after its current step, in all processes at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist

from noisyssl.distributed import exchange, world


@contextmanager
def caught() -> Iterator[Callable[[], int | None]]:
    """A callable that gives the number of the first signal received, or None.

    A second Ctrl-C interrupts at once. Outside the main thread signals cannot be caught: always None.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Wishes:
    """What the processes agree on between steps: a signal that one of them received, a checkpoint due.

    A process that is alone has its answer at once. Among several the answer comes one step late: what each
    wishes travels while the next step is computed, so that no step waits for it.
    """

    def __init__(self, stopped: Callable[[], int | None]) -> None:
        self._stopped = stopped
        self._flying: tuple[torch.Tensor, dist.Work] | None = None

    def between_steps(self, due: bool) -> tuple[int, bool]:
        """The signal that asks to end (0 is none) and whether a checkpoint is due, alike in all processes."""
        if world() == 1:
            return self._stopped() or 0, due
        if self._flying is not None:
            wishes, work = self._flying
            work.wait()
            self._flying = None
            if wishes.any():
                return int(wishes[0]), bool(wishes[1])
        wishes = torch.tensor([self._stopped() or 0, due])
        self._flying = wishes, dist.all_reduce(wishes, dist.ReduceOp.MAX, async_op=True)
        return 0, False

    def now(self) -> int:
        """The signal that asks to end (0 is none), alike in all processes, which wait for each other."""
        return max(exchange(self._stopped() or 0))
