"""Stain jitter: more or less haematoxylin, eosin and DAB, as staining differs between laboratories.

Each pixel's optical density is taken apart into the three stains of Ruifrok and Johnston (Anal. Quant. Cytol.
Histol. 23, 2001); each amount c becomes factor * c + shift (Tellez et al., IEEE TMI 37, 2018, and MedIA 58,
2019, arXiv:1902.06543); and they are put together again. On densities that is one affine map per image.
"""

import numpy as np
import torch
from torch import Tensor

from noisyssl.pipelines.draws import Draws

STAINS = np.array([(0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78)])
"""Density in red, green and blue of haematoxylin, eosin and DAB, each of length 1 below."""
STAINS = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)


def is_stained(draws: Draws) -> np.ndarray:
    """(B,) bool: any stain changes."""
    return (draws.stain_factor != 1).any(1) | (draws.stain_shift != 0).any(1)


def density_map(draws: Draws) -> np.ndarray:
    """(B, 3, 4) float32 on (red, green, blue, 1): densities in bits, since processors have base 2."""
    factor = draws.stain_factor.astype(np.float64)[:, None]
    change = np.linalg.inv(STAINS) * factor @ STAINS
    shift = draws.stain_shift @ STAINS / np.log(2)
    return np.concatenate([change.transpose(0, 2, 1), shift[:, :, None]], 2).astype(np.float32)


def stain(planes: Tensor, maps: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 of the same, by `density_map`'s (B, 3, 4); halves rounded up, black taken as 1."""
    density = (255 / planes.clamp(min=1).float()).log2_().flatten(2)
    density = torch.baddbmm(maps[:, :, 3:], maps[:, :, :3], density)
    return (255 * density.neg_().exp2_()).add_(0.5).clamp_(0, 255).to(torch.uint8).view_as(planes)
