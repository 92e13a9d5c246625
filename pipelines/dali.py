"""Views of files by NVIDIA DALI, which reads ahead and decodes; `compiled` makes the views on the CPU.

No randomness inside: each run of the graph is handed its files.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noisyssl.images import decode
from noisyssl.pipelines import compiled
from noisyssl.pipelines.ahead import Drawn, drawn_ahead
from noisyssl.pipelines.compiled import TASK
from noisyssl.pipelines.draws import Slot
from noisyssl.pipelines.samples import Samples
from noisyssl.views import View


class DaliStream:
    """Views of the slots of a schedule, in order, computed on the CPU up to `prefetch` batches ahead.

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
        """Start reading ahead."""
        self.flying: list[Slot] = []
        """Slots taken from the schedule and not yet handed out, oldest first."""
        self._samples, self._views, self._device = samples, views, device
        self._pool, self._memory = ThreadPoolExecutor(threads), compiled.Memory()
        self._ahead = drawn_ahead(
            samples, views, slots, seed=seed, batch=batch, device=self.fused_on(device), pool=self._pool
        )
        self._reading: list[Future[list[np.ndarray]]] = []
        self._root = os.path.abspath(samples.root)
        self._names = samples.array is None and bool(samples.native.all())
        self._drawn: deque[Drawn] = deque()
        self._read_ahead()
        self._pipe: Any = None
        if samples.array is None:  # pixels of an array go straight to the compiled views
            self._pipe = self._graph(batch_size=batch, num_threads=threads, prefetch_queue_depth=prefetch)

    def __next__(self) -> tuple[Tensor, ...]:
        """Per view (B, 3, S, S) uint8, channels-last, safe to keep, of the oldest slot in flight."""
        if self._pipe is None:
            images = self._feed()
        else:
            (decoded,) = self._pipe.run()
            images = [np.asarray(decoded[i]) for i in range(len(decoded))]  # without a copy
        draws = self._drawn.popleft().draws
        views = compiled.apply(images, self._views, draws, self._pool, self._memory)
        self.flying.pop(0)
        return views

    @staticmethod
    def fused_on(device: torch.device) -> torch.device | None:
        """Where `fused` makes the views of batches that are wanted on this device; nowhere here."""
        return None

    def close(self) -> None:
        """Stop the threads and free the buffers."""
        self._pool.shutdown(cancel_futures=True)
        self._pipe = None

    def _read_ahead(self) -> None:
        self._next = next(self._ahead)
        index = self._next.slot.index
        self.flying.append(self._next.slot)
        if self._names:
            return
        parts = [index[i : i + TASK].tolist() for i in range(0, len(index), TASK)]
        self._reading = [self._pool.submit(self._read_part, part) for part in parts]

    def _read_part(self, part: list[int]) -> list[np.ndarray]:
        return [self._read(index) for index in part]

    def _read(self, index: int) -> np.ndarray:
        """The bytes of one file, or (H, W, 3) uint8 pixels of an array."""
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

    def _name(self, index: np.ndarray) -> np.ndarray:
        """(B, L) uint8: the files' absolute names, equally long by slashes in front, which mean nothing."""
        names = [os.fsencode(os.path.join(self._root, self._samples.paths[i])) for i in index.tolist()]
        length = max(map(len, names))
        return np.frombuffer(b"".join(n.rjust(length, b"/") for n in names), np.uint8).reshape(-1, length)

    def _feed(self) -> Any:
        files: Any = [file for part in self._reading for file in part.result()]
        if self._names:
            files = self._name(self._next.slot.index)
        self._drawn.append(self._next)
        self._read_ahead()
        return files

    def _graph(self, **settings: Any) -> Any:
        return self._decoder("cpu", device_id=None, **settings)

    def _decoder(self, device: str, **settings: Any) -> Any:
        return decoder(self._feed, device=device, names=self._names, **settings)


def decoder(source: Callable[[], Any], *, device: str, names: bool, **settings: Any) -> Any:
    """A DALI pipeline that decodes.

    Args:
        source: called once per batch; returns arrays of the bytes of files, or of their names.
        device: where: `cpu`, `mixed` (on the GPU), or `copied` (on the CPU, then copied to the GPU).
        names: the source names files, which DALI's threads read without Python's lock.
        settings: of `nvidia.dali.Pipeline`; `device_id=None` needs no GPU.
    """
    from nvidia.dali import fn, pipeline_def

    @pipeline_def
    def graph() -> tuple[Any, ...]:
        (files,) = fn.external_source(source=lambda: [source()], num_outputs=1, batch=True)
        if names:
            files = fn.io.file.read(files)  # type: ignore[attr-defined]
        where = "mixed" if device == "mixed" else "cpu"
        # Pillow decodes with libjpeg's smooth chroma upsampling; on the GPU it must be asked for
        image = fn.decoders.image(files, device=where, jpeg_fancy_upsampling=True)
        return (image.gpu() if device == "copied" else image,)

    pipe = graph(**settings)
    pipe.build()
    return pipe
