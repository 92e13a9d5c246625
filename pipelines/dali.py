"""The DALI graph that feeds training: decode once, then one augmented copy per view.

No randomness inside: each run of the graph is handed its files and its draws. One graph for CPU and GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noisyssl.images import decode
from noisyssl.pipelines.draws import NO_BLUR, Draws, Slot, draw
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
        self._pool = ThreadPoolExecutor(threads)
        self._reading: list[Future[np.ndarray]] = []
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
            views = tuple(torch.from_dlpack(out.as_tensor()) for out in self._pipe.run())
        else:
            # bound to torch's stream, so that DALI waits for this copy before it reuses the buffers
            with torch.cuda.device(self._cuda):
                outputs = self._pipe.run(torch.cuda.current_stream())
                views = tuple(torch.from_dlpack(out.as_tensor()).clone() for out in outputs)
        self.flying.pop(0)
        return tuple(view.permute(0, 3, 1, 2) for view in views)

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
            return np.asarray(samples.array[index])
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
        fed: list[Any] = [files]
        for number, view in enumerate(self._views):
            fed += arguments(view, draw(view, self._seed, slot.place[0], slot.index, number, heights, widths))
        return fed


def arguments(view: View, draws: Draws) -> list[np.ndarray]:
    """The draws as the tensor arguments of `augment`, (B, ...) each: only what the view has."""
    vertical, horizontal = draws.vertical, draws.horizontal
    start = (np.where(vertical, draws.bottom, draws.top), np.where(horizontal, draws.right, draws.left))
    end = (np.where(vertical, draws.top, draws.bottom), np.where(horizontal, draws.left, draws.right))
    fed = [np.stack(start, 1), np.stack(end, 1)]
    if has_colour(view):
        neutral = (draws.brightness == 1) & (draws.contrast == 1) & (draws.saturation == 1) & (draws.hue == 0)
        fed += [~neutral, draws.brightness, draws.contrast, draws.saturation, draws.hue]
    if has_blur(view):
        fed += [draws.sigma > NO_BLUR, draws.sigma, draws.window()]
    return fed


def has_colour(view: View) -> bool:
    return view.jitter > 0 or view.grey > 0


def has_blur(view: View) -> bool:
    return view.blur > 0


def augment(image: Any, view: View, fed: Iterator[Any]) -> Any:
    """`view` of a batch of (H, W, 3) images of any size, (S, S, 3) uint8."""
    from nvidia.dali import fn

    # a region whose end lies before its start comes out mirrored: flips cost nothing
    image = fn.resize(
        image,
        size=[view.size, view.size],
        roi_start=next(fed),
        roi_end=next(fed),
        roi_relative=False,
        antialias=True,
    )
    # DALI traces these conditions on (B,) booleans: only the samples concerned pass through the operator
    if has_colour(view):
        coloured, brightness, contrast, saturation, hue = (next(fed) for _ in range(5))
        if coloured:
            image = fn.color_twist(
                image, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
            )
    if has_blur(view):
        blurred, sigma, window = (next(fed) for _ in range(3))
        if blurred:
            image = fn.gaussian_blur(image, sigma=sigma, window_size=window)
    return image


def view_graph(
    source: Callable[[], list[Any]], views: Sequence[View], *, encoded: bool, **settings: Any
) -> Any:
    """A DALI pipeline with one (B, S, S, 3) uint8 output per view.

    Args:
        source: called once per batch; returns encoded files (or pixels), then `arguments` of each view.
        views: what to compute.
        encoded: the source hands over files, not pixels.
        settings: of `nvidia.dali.Pipeline`; `device_id=None` computes on the CPU.
    """
    from nvidia.dali import fn, pipeline_def

    gpu = settings["device_id"] is not None
    counts = [2 + 5 * has_colour(view) + 3 * has_blur(view) for view in views]

    @pipeline_def(enable_conditionals=True)
    def graph() -> tuple[Any, ...]:
        image, *rest = fn.external_source(
            source=source,
            num_outputs=1 + sum(counts),
            batch=True,
            layout=None if encoded else ["HWC"] + [""] * sum(counts),
        )
        if encoded:
            # Pillow decodes with libjpeg's smooth chroma upsampling; on the GPU it must be asked for
            image = fn.decoders.image(image, device="mixed" if gpu else "cpu", jpeg_fancy_upsampling=True)
        elif gpu:
            image = image.gpu()
        fed = iter(rest)
        return tuple(augment(image, view, fed) for view in views)

    pipe = graph(**settings)
    pipe.build()
    return pipe
