"""All of a view but its crop by torch, as the reference has it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from noisyssl.pipelines import jpeg
from noisyssl.pipelines.draws import NO_BLUR, Draws
from noisyssl.pipelines.stain import density_map, is_stained, stain
from noisyssl.pipelines.turns import rotate, rotation
from noisyssl.views import View

TO_YIQ = np.array([(0.299, 0.587, 0.114), (0.596, -0.274, -0.321), (0.211, -0.523, 0.311)])
"""DALI's constants; its way back is their inverse, not the textbook's rounded one."""
FROM_YIQ = np.linalg.inv(TO_YIQ)
MID_GREY = 128.0


def finish(images: Tensor, view: View, draws: Draws) -> Tensor:
    """(B, 3, S, S) uint8 in channels-last memory: (B, S, S, 3) uint8 crops, and `view`'s other steps.

    Which images a step changes is known on the host, so no step waits for the GPU.
    """
    planes = images.permute(0, 3, 1, 2)
    if view.stain:
        planes = changed(planes, is_stained(draws), stain, density_map(draws))
    if view.jitter or view.grey or view.blur:
        planes = blur_and_twist(planes, draws)
    if view.turn:
        planes = changed(planes, draws.transposed(), lambda some: some.transpose(2, 3))
    if view.angle:
        planes = changed(planes, draws.angle != 0, rotate, rotation(draws.angle))
    if view.solarise:
        planes = solarised(planes, draws)
    if view.jpeg:
        planes = changed(planes, draws.quality > 0, jpeg.compress, jpeg.tables(np.maximum(draws.quality, 1)))
    return planes


def solarised(images: Tensor, draws: Draws) -> Tensor:
    """(B, ...) uint8: those drawn with what is brighter than the middle turned to its negative."""
    return changed(images, draws.solarised, lambda some: torch.minimum(some, 255 - some))


def changed(planes: Tensor, which: np.ndarray, by: Callable[..., Tensor], *arrays: np.ndarray) -> Tensor:
    """`planes` with those at `which` replaced by `by(planes, *arrays)`, whose arrays have B rows too."""
    if not len(rows := np.flatnonzero(which)):
        return planes
    where = sent(rows, planes.device)
    new = by(planes[where], *(sent(array[rows], planes.device) for array in arrays))
    planes = planes.clone(memory_format=torch.preserve_format)
    planes[where] = new
    return planes


def blur_and_twist(images: Tensor, draws: Draws) -> Tensor:
    """(B, 3, S, S) uint8 in channels-last memory; float32 between, clamped and rounded (halves up) once."""
    device = images.device
    planes = images.contiguous().float()
    blurred = np.flatnonzero(draws.sigma > NO_BLUR)
    if len(blurred):
        where = sent(blurred, device)
        planes[where] = blur(planes[where], torch.from_numpy(draws.sigma[blurred]))
    matrix, offset = twist(draws)
    change, shift = (sent(x.astype(np.float32), device) for x in (matrix, offset + 0.5))
    planes = torch.baddbmm(shift[:, None, None], change, planes.flatten(2)).view_as(planes)
    out = torch.empty_like(planes, dtype=torch.uint8, memory_format=torch.channels_last)
    return out.copy_(planes.clamp_(0, 255))


def sent(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """`values` on `device`; through pinned memory, since a copy from ordinary memory waits for the GPU."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def blur(planes: Tensor, sigma: Tensor) -> Tensor:
    """(B, 3, S, S) float: each image by its own Gaussian, cut at 3 `sigma`, mirrored at the border."""
    count, channels, height, width = planes.shape
    windows = torch.ceil(3 * sigma)
    reach = min(int(windows.max()), height - 1, width - 1)
    offset = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]).square()) * (offset.abs() <= windows[:, None])
    kernel = sent(kernel / kernel.sum(1, keepdim=True), planes.device).repeat_interleave(channels, 0)
    groups = count * channels
    out = planes.reshape(1, groups, height, width)
    out = F.conv2d(F.pad(out, (reach, reach, 0, 0), mode="reflect"), kernel[:, None, None], groups=groups)
    out = F.conv2d(F.pad(out, (0, 0, reach, reach), mode="reflect"), kernel[:, None, :, None], groups=groups)
    return out.view_as(planes)


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
