"""Views by batched torch operations: the reference for DALI, the fallback, and the GPU-resident path.

Crop, resize and flips are one matrix per image and axis, blur another, colour a 3x3 matrix and an offset.
Filters, borders and rounding are DALI's (2.4), found from its impulse responses.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from noisyssl.pipelines.draws import Draws
from noisyssl.views import View

TO_YIQ = np.array([(0.299, 0.587, 0.114), (0.596, -0.274, -0.321), (0.211, -0.523, 0.311)])
"""DALI's constants; its way back is their inverse, not the textbook's rounded one."""
FROM_YIQ = np.linalg.inv(TO_YIQ)
MID_GREY = 128.0


def apply(images: Tensor | Sequence[Tensor], view: View, draws: Draws) -> Tensor:
    """(B, 3, S, S) uint8 in channels-last memory: `view` of each image, on the images' device.

    Args:
        images: (B, H, W, 3) uint8, or B tensors (H, W, 3) whose sizes differ.
        view: decides size, and whether there is colour and blur at all.
        draws: of the same B samples.
    """
    device = images[0].device
    edge = {name: _floats(getattr(draws, name), device) for name in ("top", "left", "bottom", "right")}
    horizontal, vertical = (torch.from_numpy(x).to(device) for x in (draws.horizontal, draws.vertical))
    rows = torch.where(
        vertical, torch.stack([edge["bottom"], edge["top"]]), torch.stack([edge["top"], edge["bottom"]])
    )
    columns = torch.where(
        horizontal, torch.stack([edge["right"], edge["left"]]), torch.stack([edge["left"], edge["right"]])
    )
    if isinstance(images, Tensor):
        out = _resize(images, rows, columns, view.size)
    else:
        parts = [
            _resize(image[None], rows[:, i : i + 1], columns[:, i : i + 1], view.size)
            for i, image in enumerate(images)
        ]
        out = torch.cat(parts)
    if view.jitter or view.grey:
        matrix, offset = twist(draws)
        colours = torch.baddbmm(
            _floats(offset, device)[:, None, None], _floats(matrix, device), out.flatten(2)
        )
        out = _rounded(colours).view_as(out)
    if view.blur:
        kernel = blur_matrix(
            _floats(draws.sigma, device), torch.from_numpy(draws.window()).to(device), view.size
        )
        out = _rounded(_separable(out, kernel, kernel))
    return out.to(torch.uint8).contiguous(memory_format=torch.channels_last)


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


def blur_matrix(sigma: Tensor, window: Tensor, size: int) -> Tensor:
    """(B, size, size) float32: Gaussian blur along one axis, mirrored about the border pixels."""
    reach = int(window.max()) // 2
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (offset / sigma[:, None]).square())
    weight = weight * (offset.abs() <= (window // 2)[:, None])
    weight = weight / weight.sum(1, keepdim=True)
    pixel = torch.arange(size, device=sigma.device)
    period = 2 * (size - 1)
    target = (pixel[:, None] + offset) % period
    target = torch.minimum(target, period - target).expand(len(sigma), -1, -1)
    matrix = weight.new_zeros(len(sigma), size, size)
    return matrix.scatter_add_(2, target, weight[:, None].expand(-1, size, -1))


def twist(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """(B, 3, 3) matrix and (B,) offset on RGB in 0-255: hue, saturation, contrast, then brightness."""
    angle = np.deg2rad(draws.hue.astype(np.float64))
    chroma = np.zeros((len(angle), 3, 3))
    chroma[:, 0, 0] = 1
    chroma[:, 1, 1] = chroma[:, 2, 2] = draws.saturation * np.cos(angle)
    chroma[:, 1, 2] = draws.saturation * np.sin(angle)
    chroma[:, 2, 1] = -chroma[:, 1, 2]
    matrix = FROM_YIQ @ chroma @ TO_YIQ
    gain = (draws.brightness * draws.contrast)[:, None, None]
    return gain * matrix, draws.brightness * (1 - draws.contrast) * MID_GREY


def _resize(images: Tensor, rows: Tensor, columns: Tensor, size: int) -> Tensor:
    height, width = images.shape[1:3]
    along_y = resize_matrix(rows[0], rows[1], height, size)
    along_x = resize_matrix(columns[0], columns[1], width, size)
    return _rounded(_separable(images.permute(0, 3, 1, 2).float(), along_y, along_x))


def _separable(planes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, None] @ planes @ columns[:, None].mT


def _rounded(values: Tensor) -> Tensor:
    """Whole numbers in 0-255, halves up: both libraries store bytes between their steps."""
    return values.add(0.5).floor().clamp(0, 255)


def _floats(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).to(device)
