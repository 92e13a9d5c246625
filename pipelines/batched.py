"""Views by batched torch operations: the reference for all others, and the fallback.

Crop, resize and flips are one matrix per image and axis. Filter, border and rounding are DALI's (2.4), found
from its impulse responses.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from noisyssl.pipelines.colour import finish, sent
from noisyssl.pipelines.draws import Draws, Slot, draw
from noisyssl.pipelines.samples import Samples
from noisyssl.views import View


def apply(images: Tensor | Sequence[Tensor], view: View, draws: Draws) -> Tensor:
    """(B, 3, S, S) uint8 in channels-last memory: `view` of each image, on the images' device.

    Args:
        images: (B, H, W, 3) uint8, or B tensors (H, W, 3) whose sizes differ.
        view: decides size, and whether there is colour and blur at all.
        draws: of the same B samples.
    """
    rows, columns = torch.stack([torch.from_numpy(corner) for corner in draws.corners()]).unbind(2)
    if isinstance(images, Tensor):
        out = _resize(images, rows, columns, view.size)
    else:
        parts = [
            _resize(image[None], rows[:, i : i + 1], columns[:, i : i + 1], view.size)
            for i, image in enumerate(images)
        ]
        out = torch.cat(parts)
    return finish(out, view, draws)


def resize_matrix(start: Tensor, end: Tensor, source: int, size: int, device: torch.device) -> Tensor:
    """(B, size, source) float32 on `device`: antialiased linear resampling of [start, end) along one axis.

    A triangle as wide as one output pixel, at least as one source pixel; pixels beyond the image repeat its
    edge, pixels beyond the crop are read. `start > end` mirrors. Both are (B,) on the CPU: what they say of
    sizes must not wait for a GPU.
    """
    margin = int(((end - start) / size).abs().clamp(min=1).max().ceil()) + 1
    first, scale = sent(torch.stack([start, (end - start) / size]), device)[:, :, None, None]
    centre = first + (torch.arange(size, device=device)[:, None] + 0.5) * scale
    radius = scale.abs().clamp(min=1)
    pixel = torch.arange(-margin, source + margin, device=device) + 0.5
    weight = (1 - (pixel - centre).abs() / radius).clamp(min=0)
    weight = weight / weight.sum(2, keepdim=True)
    matrix = weight[:, :, margin:-margin].clone()
    matrix[:, :, 0] += weight[:, :, :margin].sum(2)
    matrix[:, :, -1] += weight[:, :, -margin:].sum(2)
    return matrix


def _resize(images: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """(B, size, size, 3) uint8, halves rounded up."""
    height, width = images.shape[1:3]
    along_y = resize_matrix(rows[0], rows[1], height, size, images.device)[:, None]
    along_x = resize_matrix(columns[0], columns[1], width, size, images.device)[:, None]
    out = along_y @ images.permute(0, 3, 1, 2).float() @ along_x.mT
    return out.add_(0.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class BatchedStream:
    """What `DaliStream` is, by torch operations; decodes one batch ahead."""

    def __init__(
        self,
        samples: Samples,
        views: Sequence[View],
        slots: Iterator[Slot],
        *,
        batch: int,
        seed: int,
        device: torch.device,
        threads: int,
    ) -> None:
        self.flying: list[Slot] = []
        self._samples, self._views, self._slots = samples, views, slots
        self._seed, self._device = seed, device
        self._pool = ThreadPoolExecutor(threads)
        self._decoding: list[Future[np.ndarray]] = []
        self._decode_ahead()

    def __next__(self) -> tuple[Tensor, ...]:
        slot, decoded = self.flying[0], [future.result() for future in self._decoding]
        self._decode_ahead()
        images: Tensor | list[Tensor]
        if len({image.shape for image in decoded}) == 1:
            images = torch.from_numpy(np.stack(decoded)).to(self._device)
        else:
            images = [torch.from_numpy(image).to(self._device) for image in decoded]
        heights, widths = self._samples.heights[slot.index], self._samples.widths[slot.index]
        views = tuple(
            apply(
                images,
                view,
                draw(view, self._seed, slot.place[0], slot.index, number, heights, widths),
            )
            for number, view in enumerate(self._views)
        )
        self.flying.pop(0)
        return views

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _decode_ahead(self) -> None:
        self.flying.append(next(self._slots))
        self._decoding = [self._pool.submit(self._samples.image, int(i)) for i in self.flying[-1].index]
