"""Blur and colour of a view: one implementation, behind DALI's crops as behind torch's.

On the CPU torch takes less time than DALI 2.4's operators (`docs/decisions.md`), and one implementation
cannot disagree with itself.
"""

from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from noisyssl.pipelines.draws import NO_BLUR, Draws
from noisyssl.views import View

TO_YIQ = np.array([(0.299, 0.587, 0.114), (0.596, -0.274, -0.321), (0.211, -0.523, 0.311)])
"""DALI's constants; its way back is their inverse, not the textbook's rounded one."""
FROM_YIQ = np.linalg.inv(TO_YIQ)
MID_GREY = 128.0
CHUNK = 8
"""Images at a time on a CPU: their floats stay in its cache."""


def finish(images: Tensor, view: View, draws: Draws, pool: Executor | None = None) -> Tensor:
    """(B, 3, S, S) uint8 in channels-last memory: (B, S, S, 3) uint8 crops, blurred and coloured.

    In float32 between, clamped and rounded (halves up) once. On a CPU `pool` shares the chunks out: its
    threads beat torch's own, which wait for each other after every operation.
    """
    if not view.jitter and not view.grey and not view.blur:
        return images.permute(0, 3, 1, 2)
    device, out = images.device, torch.empty_like(images)
    matrix, offset = twist(draws)

    coloured = bool(view.jitter or view.grey)

    def chunk(rows: np.ndarray) -> None:
        where = sent(rows, device)
        planes = images[where].permute(0, 3, 1, 2).contiguous().float()
        plain = int((draws.sigma[rows] <= NO_BLUR).sum())  # these come first
        if plain < len(rows):
            planes[plain:] = blur(planes[plain:], torch.from_numpy(draws.sigma[rows[plain:]]))
        if coloured:
            change, shift = (sent(x[rows].astype(np.float32), device) for x in (matrix, offset + 0.5))
            planes = torch.baddbmm(shift[:, None, None], change, planes.flatten(2)).view_as(planes)
        else:
            planes += 0.5
        whole = torch.empty_like(planes, dtype=torch.uint8, memory_format=torch.channels_last)
        out[where] = whole.copy_(planes.clamp_(0, 255)).permute(0, 2, 3, 1)

    # in order of sigma: the images of a chunk share one width of kernel
    order = np.argsort(draws.sigma, kind="stable")
    size = CHUNK if device.type == "cpu" else len(order)
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    for _ in (pool.map if pool is not None else map)(chunk, chunks):
        pass
    return out.permute(0, 3, 1, 2)


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
