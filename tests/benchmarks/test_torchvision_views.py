"""The opponent does what is said of it."""

import numpy as np
import pytest
import torch
from PIL import Image

from noisyssl.benchmarks.torchvision_views import QuarterTurn, StainJitter, transforms
from noisyssl.pipelines.stain import stain
from noisyssl.views import MODALITIES, View, adapt, pair

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
TENSOR = torch.from_numpy(PIXELS).permute(2, 0, 1)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("kind", ["pillow", "tensor"])
def test_every_modality_has_its_words(modality, kind):
    view = adapt(pair(32)[0], modality)
    image = Image.fromarray(PIXELS) if kind == "pillow" else TENSOR
    for _ in range(3):
        out = transforms(view, kind, 0)(image)
        assert out.shape == (3, 32, 32)
        assert out.dtype == torch.uint8


def test_its_stain_jitter_is_ours():
    jitter = StainJitter(View(size=8, stain=1.0, stain_factor=0.3, stain_shift=0.1))
    torch.manual_seed(0)
    by_torch = jitter(TENSOR).int()
    torch.manual_seed(0)
    by_numpy = torch.from_numpy(np.array(jitter(Image.fromarray(PIXELS)))).permute(2, 0, 1).int()
    torch.manual_seed(0)
    factor, shift = 1 + 0.3 * (2 * torch.rand(3) - 1), 0.1 * (2 * torch.rand(3) - 1)
    change = jitter.apart * factor @ jitter.together
    offset = shift @ jitter.together / np.log(2)
    ours = stain(TENSOR[None], torch.cat([change.T, offset[:, None]], 1)[None])[0].int()
    assert (by_torch - by_numpy).abs().max() <= 1
    assert (by_torch - ours).abs().max() <= 1  # theirs cuts off, ours rounds


@pytest.mark.parametrize("kind", ["pillow", "tensor"])
def test_its_quarter_turns_are_all_four(kind):
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        image = Image.fromarray(PIXELS) if kind == "pillow" else TENSOR.permute(1, 2, 0).permute(2, 0, 1)
        out = QuarterTurn()(image)
        out = np.asarray(out) if kind == "pillow" else out.permute(1, 2, 0).numpy()
        seen |= {k for k in range(4) if np.array_equal(out, np.rot90(PIXELS, k))}
    assert seen == {0, 1, 2, 3}
