"""Views computed on the GPU by `fused`, from images that lie there, are copied there, or are decoded for it.

The counterparts of `dali.DaliStream`, with the same draws.
"""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noisyssl.pipelines.ahead import Drawn, drawn_ahead
from noisyssl.pipelines.colour import sent
from noisyssl.pipelines.dali import DaliStream
from noisyssl.pipelines.draws import Slot
from noisyssl.pipelines.resident import store
from noisyssl.pipelines.samples import Samples
from noisyssl.views import View


def can_fuse(device: torch.device) -> bool:
    """Whether the kernels run here."""
    return device.type == "cuda" and not unfused(device)


@cache
def unfused(device: torch.device) -> str:
    """Why the kernels do not run on this GPU; empty where they do, which one of them has shown."""
    if sys.platform != "linux" or find_spec("triton") is None:
        return "Triton, which comes with PyTorch on Linux, is not installed"
    if not torch.cuda.is_available():
        return ""  # nothing to try it on: whoever uses the device will say so
    try:
        from noisyssl.pipelines import fused

        fused.try_on(device)
    except Exception as error:  # Triton has no exception of its own for a compiler that it does not find
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return f"Triton fails ({why}); it takes a C compiler and Python's headers"
    return ""


def views_of(images: Tensor, views: Sequence[View], drawn: Drawn) -> tuple[Tensor, ...]:
    """Per view (B, 3, S, S) uint8, channels-last, of (B, 3) addresses and sizes."""
    from noisyssl.pipelines import fused

    together = zip(views, drawn.draws, drawn.numbers, strict=True)
    return tuple(fused.apply(images, view, draws, numbers) for view, draws, numbers in together)


class ResidentStream:
    """From pixels that stay in the GPU's memory."""

    def __init__(
        self,
        samples: Samples,
        views: Sequence[View],
        slots: Iterator[Slot],
        *,
        seed: int,
        batch: int,
        device: torch.device,
        threads: int,
    ) -> None:
        from noisyssl.pipelines import fused

        self._views, self._device = views, device
        self._store = store(samples, device)
        self._table = fused.table(self._store.pixels)
        self._pool = ThreadPoolExecutor(1)
        self._ahead = drawn_ahead(
            samples, views, slots, seed=seed, batch=batch, device=device, pool=self._pool
        )
        self._drawn = next(self._ahead)
        self.flying = [self._drawn.slot]

    def __next__(self) -> tuple[Tensor, ...]:
        drawn, self._drawn = self._drawn, next(self._ahead)
        self.flying = [self._drawn.slot]
        return views_of(self._table[sent(drawn.slot.index, self._device)], self._views, drawn)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class UploadStream:
    """From a packed array that does not fit: rows are gathered and copied while the batches before train."""

    AHEAD = 2
    """Batches in flight."""
    GATHERERS = 4
    """Threads that copy rows, at most: memory is no faster for more."""

    def __init__(
        self,
        samples: Samples,
        views: Sequence[View],
        slots: Iterator[Slot],
        *,
        seed: int,
        batch: int,
        device: torch.device,
        threads: int,
    ) -> None:
        assert samples.array is not None
        self._array, self._views, self._device = samples.array, views, device
        self._threads = min(threads, self.GATHERERS)
        self._pool, self._gatherers = ThreadPoolExecutor(2), ThreadPoolExecutor(self._threads)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead = drawn_ahead(
            samples, views, slots, seed=seed, batch=batch, device=device, pool=self._pool
        )
        self._coming: deque[tuple[Drawn, Future[tuple[Tensor, Any]]]] = deque()
        self.flying: list[Slot] = []
        for _ in range(self.AHEAD):
            self._start()

    def __next__(self) -> tuple[Tensor, ...]:
        from noisyssl.pipelines import fused

        drawn, copied = self._coming.popleft()
        pixels, done = copied.result()
        self._start()
        self.flying.pop(0)
        if done is not None:
            now = torch.cuda.current_stream(self._device)
            now.wait_event(done)
            pixels.record_stream(now)
        return views_of(fused.table(pixels), self._views, drawn)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._gatherers.shutdown(cancel_futures=True)

    def _start(self) -> None:
        drawn = next(self._ahead)
        self.flying.append(drawn.slot)
        self._coming.append((drawn, self._pool.submit(self._upload, drawn.slot.index)))

    def _upload(self, index: np.ndarray) -> tuple[Tensor, Any]:
        shape = (len(index), *self._array.shape[1:])
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self._side is not None)
        rows = pixels.numpy()

        def gather(part: slice) -> None:
            if self._array.flags.c_contiguous:  # one call that holds no lock; "clip" spares it a buffer
                np.take(self._array, index[part], axis=0, out=rows[part], mode="clip")
            else:  # a grey npz repeats its plane by stride 0: `take` would copy all of it first
                rows[part] = self._array[index[part]]

        step = -(-len(index) // self._threads)
        list(self._gatherers.map(gather, [slice(i, i + step) for i in range(0, len(index), step)]))
        if self._side is None:
            return pixels, None
        with torch.cuda.stream(self._side):
            copy = pixels.to(self._device, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return copy, done


class DecodedStream(DaliStream):
    """From files that DALI decodes: small ones on the CPU's cores, which is faster, large ones on the GPU."""

    LARGE = 1 << 17
    """Pixels of an image, on average, from which the GPU decodes: on an H100 with 16 cores it read 224-pixel
    JPEG files at 0.8 times the cores' speed, 512-pixel ones at 2.8 times, 2048-pixel ones at 6.4 times."""

    def __next__(self) -> tuple[Tensor, ...]:
        # bound to torch's stream, so that DALI waits for the kernels before it uses the memory again
        with torch.cuda.device(self._device):
            (decoded,) = self._pipe.run(torch.cuda.current_stream())
            table = np.array([(image.data_ptr(), *image.shape()[:2]) for image in decoded], np.int64)
            views = views_of(sent(table, self._device), self._views, self._drawn.popleft())
        self.flying.pop(0)
        return views

    @staticmethod
    def fused_on(device: torch.device) -> torch.device | None:
        return device

    def _graph(self, **settings: Any) -> Any:
        pixels = np.mean(self._samples.heights.astype(np.int64) * self._samples.widths)
        number = torch.cuda.current_device() if self._device.index is None else self._device.index
        device = "mixed" if pixels >= self.LARGE else "copied"
        return self._decoder(device, device_id=number, **settings)
