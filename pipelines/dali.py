"""Views by NVIDIA DALI: it reads ahead and decodes; on a GPU it also crops, on a CPU `compiled` does.

No randomness inside: each run of the graph is handed its files and its draws.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noisyssl.images import decode
from noisyssl.pipelines import compiled
from noisyssl.pipelines.colour import finish
from noisyssl.pipelines.compiled import TASK
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
        crop: bool | None = None,
    ) -> None:
        """Start reading ahead.

        Args:
            crop: whether DALI crops and torch finishes; by default on a GPU only.
        """
        self.flying: list[Slot] = []
        """Slots taken from the schedule and not yet handed out, oldest first."""
        self._samples, self._views, self._slots, self._seed = samples, views, slots, seed
        self._cuda: int | None = None
        if device.type == "cuda":
            self._cuda = torch.cuda.current_device() if device.index is None else device.index
        self._crop = device.type == "cuda" if crop is None else crop
        self._pool, self._memory = ThreadPoolExecutor(threads), compiled.Memory()
        self._reading: list[Future[list[np.ndarray]]] = []
        self._drawn: deque[list[Draws]] = deque()
        self._read_ahead()
        self._pipe: Any = None
        if self._crop or samples.array is None:  # pixels of an array go straight to the compiled views
            self._pipe = view_graph(
                self._feed,
                views if self._crop else (),
                encoded=samples.array is None,
                batch_size=batch,
                num_threads=threads,
                device_id=self._cuda,
                prefetch_queue_depth=prefetch,
            )

    def __next__(self) -> tuple[Tensor, ...]:
        """Per view (B, 3, S, S) uint8, channels-last, safe to keep, of the oldest slot in flight."""
        views = self._cropped_by_dali() if self._crop else self._compiled()
        self.flying.pop(0)
        return views

    def _cropped_by_dali(self) -> tuple[Tensor, ...]:
        if self._cuda is None:
            # the executor hands its buffers over: a TensorList that is still referenced is never reused
            crops = [torch.from_dlpack(out.as_tensor()) for out in self._pipe.run()]
        else:
            # bound to torch's stream, so that DALI waits for this copy before it reuses the buffers
            with torch.cuda.device(self._cuda):
                outputs = self._pipe.run(torch.cuda.current_stream())
                crops = [torch.from_dlpack(out.as_tensor()).clone() for out in outputs]
        return tuple(map(finish, crops, self._views, self._drawn.popleft()))

    def _compiled(self) -> tuple[Tensor, ...]:
        if self._pipe is None:
            images = self._feed()[0]
        else:
            (decoded,) = self._pipe.run()
            images = [np.asarray(decoded[i]) for i in range(len(decoded))]  # without a copy
        return compiled.apply(images, self._views, self._drawn.popleft(), self._pool, self._memory)

    def close(self) -> None:
        """Stop the threads and free the buffers."""
        self._pool.shutdown(cancel_futures=True)
        self._pipe = None

    def _read_ahead(self) -> None:
        self.flying.append(next(self._slots))
        slot = self.flying[-1]
        parts = [slot.index[i : i + TASK].tolist() for i in range(0, len(slot.index), TASK)]
        self._reading = [self._pool.submit(self._read_part, part) for part in parts]
        self._drawing = self._pool.submit(self._draw, slot)

    def _draw(self, slot: Slot) -> list[Draws]:
        heights, widths = self._samples.heights[slot.index], self._samples.widths[slot.index]
        return [
            draw(view, self._seed, slot.place[0], slot.index, number, heights, widths)
            for number, view in enumerate(self._views)
        ]

    def _read_part(self, part: list[int]) -> list[np.ndarray]:
        return [self._read(index) for index in part]

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
        files = [file for part in self._reading for file in part.result()]
        draws = self._drawing.result()
        self._read_ahead()
        self._drawn.append(draws)
        return [files, *(edge for one in draws for edge in one.corners())] if self._crop else [files]


def view_graph(
    source: Callable[[], list[Any]], views: Sequence[View], *, encoded: bool, **settings: Any
) -> Any:
    """A DALI pipeline with one (B, S, S, 3) uint8 output per view; without views, the decoded images.

    Args:
        source: called once per batch; returns encoded files (or pixels), then the corners of each view.
        views: what to crop.
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
        if not views:
            return (image,)
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
