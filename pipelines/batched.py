"""Views by batched torch operations: the reference for DALI, the fallback, and the GPU-resident path.

Crop, resize and flips are one matrix per image and axis. Filter, border and rounding are DALI's (2.4), found
from its impulse responses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from noisyssl.pipelines.colour import finish
from noisyssl.pipelines.draws import Draws
from noisyssl.views import View


def apply(images: Tensor | Sequence[Tensor], view: View, draws: Draws) -> Tensor:
    """(B, 3, S, S) uint8 in channels-last memory: `view` of each image, on the images' device.

    Args:
        images: (B, H, W, 3) uint8, or B tensors (H, W, 3) whose sizes differ.
        view: decides size, and whether there is colour and blur at all.
        draws: of the same B samples.
    """
    device = images[0].device
    rows, columns = torch.stack([torch.from_numpy(corner).to(device) for corner in draws.corners()]).unbind(2)
    if isinstance(images, Tensor):
        out = _resize(images, rows, columns, view.size)
    else:
        parts = [
            _resize(image[None], rows[:, i : i + 1], columns[:, i : i + 1], view.size)
            for i, image in enumerate(images)
        ]
        out = torch.cat(parts)
    return finish(out, view, draws)


def resize_matrix(start: Tensor, end: Tensor, source: int, size: int) -> Tensor:
    """(B, size, source) float32: antialiased linear resampling of [start, end) along one axis.

    A triangle as wide as one output pixel, at least as one source pixel; pixels beyond the image repeat its
    edge, pixels beyond the crop are read. `start > end` mirrors.
    """
    scale = ((end - start) / size)[:, None, None]
    centre = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    radius = scale.abs().clamp(min=1)
    margin = int(radius.max().ceil()) + 1
    pixel = torch.arange(-margin, source + margin, device=start.device) + 0.5
    weight = (1 - (pixel - centre).abs() / radius).clamp(min=0)
    weight = weight / weight.sum(2, keepdim=True)
    matrix = weight[:, :, margin:-margin].clone()
    matrix[:, :, 0] += weight[:, :, :margin].sum(2)
    matrix[:, :, -1] += weight[:, :, -margin:].sum(2)
    return matrix


def _resize(images: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """(B, size, size, 3) uint8, halves rounded up."""
    height, width = images.shape[1:3]
    along_y = resize_matrix(rows[0], rows[1], height, size)[:, None]
    along_x = resize_matrix(columns[0], columns[1], width, size)[:, None]
    out = along_y @ images.permute(0, 3, 1, 2).float() @ along_x.mT
    return out.add_(0.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
