"""The DALI graph that feeds training: decode once, then one crop per view; `colour` finishes it.

No randomness inside: each run of the graph is handed its files and its draws. One graph for CPU and GPU.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noisyssl.images import decode
from noisyssl.pipelines.colour import finish
from noisyssl.pipelines.draws import Draws, Slot, draw
from noisyssl.pipelines.samples import Samples
from noisyssl.views import View


class DaliStream:
    """Views of the slots of a schedule, in order, computed up to `prefetch` batches ahead.

    A broken file raises, maybe while an earlier slot is fetched; the stream is dead after that.
    """

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
        prefetch: int = 2,
    ) -> None:
        self.flying: list[Slot] = []
        """Slots taken from the schedule and not yet handed out, oldest first."""
        self._samples, self._views, self._slots, self._seed = samples, views, slots, seed
        self._cuda: int | None = None
        if device.type == "cuda":
            self._cuda = torch.cuda.current_device() if device.index is None else device.index
        self._pool = single_threaded(threads)
        self._reading: list[Future[np.ndarray]] = []
        self._drawn: deque[list[Draws]] = deque()
        self._read_ahead()
        self._pipe = view_graph(
            self._feed,
            views,
            encoded=samples.array is None,
            batch_size=batch,
            num_threads=threads,
            device_id=self._cuda,
            prefetch_queue_depth=prefetch,
        )

    def __next__(self) -> tuple[Tensor, ...]:
        """Per view (B, 3, S, S) uint8, channels-last, safe to keep, of the oldest slot in flight."""
        if self._cuda is None:
            # the executor hands its buffers over: a TensorList that is still referenced is never reused
            crops = [torch.from_dlpack(out.as_tensor()) for out in self._pipe.run()]
        else:
            # bound to torch's stream, so that DALI waits for this copy before it reuses the buffers
            with torch.cuda.device(self._cuda):
                outputs = self._pipe.run(torch.cuda.current_stream())
                crops = [torch.from_dlpack(out.as_tensor()).clone() for out in outputs]
        draws = self._drawn.popleft()
        pool = self._pool if self._cuda is None else None
        views = tuple(finish(*one, pool) for one in zip(crops, self._views, draws, strict=True))
        self.flying.pop(0)
        return views

    def close(self) -> None:
        """Stop the threads and free the buffers."""
        self._pool.shutdown(cancel_futures=True)
        self._pipe = None

    def _read_ahead(self) -> None:
        self.flying.append(next(self._slots))
        self._reading = [self._pool.submit(self._read, int(i)) for i in self.flying[-1].index]

    def _read(self, index: int) -> np.ndarray:
        """One file, or (H, W, 3) uint8 pixels of an array."""
        samples = self._samples
        if samples.array is not None:
            return np.ascontiguousarray(samples.array[index])  # a grey npz repeats its plane by stride 0
        if samples.native[index]:
            return np.frombuffer(samples.encoded(index), np.uint8)
        pixels = decode(samples.encoded(index))
        header = (
            f"P6 {pixels.shape[1]} {pixels.shape[0]} 255\n".encode()
        )  # a PPM is lossless and needs no encoder
        return np.frombuffer(header + pixels.tobytes(), np.uint8)

    def _feed(self) -> list[Any]:
        slot, files = self.flying[-1], [future.result() for future in self._reading]
        self._read_ahead()
        heights, widths = self._samples.heights[slot.index], self._samples.widths[slot.index]
        draws = [
            draw(view, self._seed, slot.place[0], slot.index, number, heights, widths)
            for number, view in enumerate(self._views)
        ]
        self._drawn.append(draws)
        return [files, *(edge for one in draws for edge in corners(one))]


def single_threaded(workers: int) -> ThreadPoolExecutor:
    """A pool whose threads each run torch's operations alone, while the calling thread keeps its number."""
    threads, ready = torch.get_num_threads(), Barrier(workers + 1)

    def alone() -> None:
        torch.set_num_threads(1)  # OpenMP keeps this per thread, MKL for all: hence the number again below
        torch.zeros(1 << 17).add_(1)  # a thread settles on its number at its first parallel operation
        ready.wait()

    pool = ThreadPoolExecutor(workers, initializer=alone)
    for _ in range(workers):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(threads)
    return pool


def corners(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """(B, 2) first and (B, 2) last corner of each crop; what ends before it starts comes out mirrored."""
    vertical, horizontal = draws.vertical, draws.horizontal
    start = (np.where(vertical, draws.bottom, draws.top), np.where(horizontal, draws.right, draws.left))
    end = (np.where(vertical, draws.top, draws.bottom), np.where(horizontal, draws.left, draws.right))
    return np.stack(start, 1), np.stack(end, 1)


def view_graph(
    source: Callable[[], list[Any]], views: Sequence[View], *, encoded: bool, **settings: Any
) -> Any:
    """A DALI pipeline with one (B, S, S, 3) uint8 output per view.

    Args:
        source: called once per batch; returns encoded files (or pixels), then the `corners` of each view.
        views: what to compute.
        encoded: the source hands over files, not pixels.
        settings: of `nvidia.dali.Pipeline`; `device_id=None` computes on the CPU.
    """
    from nvidia.dali import fn, pipeline_def

    gpu = settings["device_id"] is not None

    @pipeline_def
    def graph() -> tuple[Any, ...]:
        image, *rest = fn.external_source(
            source=source,
            num_outputs=1 + 2 * len(views),
            batch=True,
            layout=None if encoded else ["HWC"] + [""] * 2 * len(views),
        )
        if encoded:
            # Pillow decodes with libjpeg's smooth chroma upsampling; on the GPU it must be asked for
            image = fn.decoders.image(image, device="mixed" if gpu else "cpu", jpeg_fancy_upsampling=True)
        elif gpu:
            image = image.gpu()
        return tuple(
            fn.resize(
                image,
                size=[view.size, view.size],
                roi_start=rest[2 * number],
                roi_end=rest[2 * number + 1],
                roi_relative=False,
                antialias=True,
            )
            for number, view in enumerate(views)
        )

    pipe = graph(**settings)
    pipe.build()
    return pipe
