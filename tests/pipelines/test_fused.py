"""The fused kernels against the reference: on a GPU where there is one, else in Triton's interpreter."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch for NVIDIA GPUs on Linux")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are defined

from noisyssl.pipelines import batched, fused, fused_jpeg, jpeg  # noqa: E402
from noisyssl.pipelines.draws import draw  # noqa: E402
from noisyssl.views import View, adapt, asymmetric_pair, evaluation, pair, training  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)

INDEX = np.array([3, 0, 4, 1, 1, 2])
FEW = 0.02 if DEVICE.type == "cuda" else 0.005
"""Share of values that a tie may round otherwise: a GPU divides to two units in the last place."""
CASES = {
    "evaluation": evaluation(24),
    "training": training(32)[0],
    "enlarged": replace(pair(48)[0], area=(0.01, 0.2)),
    "reduced four times": View(size=10),
    "wide blur": View(size=16, blur=1.0, sigma=(6, 9)),
    "always blurred": asymmetric_pair(32)[0],
    "solarised": replace(asymmetric_pair(32)[1], solarise=0.5),
    "strong colour": View(size=24, jitter=1.0, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5),
    "turned": View(size=24, flip=0.5, upside=0.5, turn=1.0),
    "at an angle": View(size=23, angle=45.0),
    **{name: adapt(pair(32)[0], name) for name in ("natural", "histology", "xray", "fundus")},
}


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (5, 40, 60, 3), dtype=np.uint8)).to(DEVICE)


def apply(pixels, index, view, draws):
    return fused.apply(fused.table(pixels)[index], view, draws, fused.sent_numbers(draws, DEVICE))


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_equal_the_reference(name, pixels):
    """White noise: one column off, or one weight, changes every pixel."""
    view, index = CASES[name], torch.from_numpy(INDEX).to(DEVICE)
    draws = draw(view, 5, 2, INDEX, 0, np.full(6, 40), np.full(6, 60))
    got = apply(pixels, index, view, draws)
    expected = batched.apply(pixels[index], view, draws)
    assert got.is_contiguous(memory_format=torch.channels_last)
    difference = (got.int() - expected.int()).abs()
    assert difference.max() <= 4  # a crop that rounds otherwise by 1, times brightness and contrast
    assert (difference > 0).float().mean() < FEW


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1)])
def test_images_of_a_single_row_or_column(shape):
    pixels = torch.randint(0, 256, (2, *shape, 3), dtype=torch.uint8, device=DEVICE)
    draws = draw(View(size=16), 0, 0, np.arange(2), 0, np.full(2, shape[0]), np.full(2, shape[1]))
    got = apply(pixels, torch.arange(2, device=DEVICE), View(size=16), draws)
    assert (got.int() - batched.apply(pixels, View(size=16), draws).int()).abs().max() <= 1


def test_what_a_sample_becomes_hangs_on_no_other(pixels):
    view, alone = CASES["histology"], np.array([4])
    draws = draw(view, 5, 2, INDEX, 0, np.full(6, 40), np.full(6, 60))
    single = draw(view, 5, 2, alone, 0, np.full(1, 40), np.full(1, 60))
    together = apply(pixels, torch.from_numpy(INDEX).to(DEVICE), view, draws)[2]
    assert torch.equal(apply(pixels, torch.from_numpy(alone).to(DEVICE), view, single)[0], together)


def test_images_of_several_sizes_anywhere_in_memory():
    images = [
        torch.randint(0, 256, (20 + 9 * i, 50 - 7 * i, 3), dtype=torch.uint8).to(DEVICE) for i in range(4)
    ]
    view, sizes = CASES["natural"], np.array([image.shape[:2] for image in images])
    draws = draw(view, 0, 0, np.arange(4), 0, *sizes.T)
    table = torch.tensor([[image.data_ptr(), *image.shape[:2]] for image in images], device=DEVICE)
    got = fused.apply(table, view, draws, fused.sent_numbers(draws, DEVICE))
    difference = (got.int() - batched.apply(images, view, draws).int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < FEW


@pytest.mark.parametrize("size", [8, 21, 24, 33, 64])
def test_jpeg_is_the_reference_where_it_was_drawn(size):
    """White noise at every quality; odd sizes and sizes that end within a block or a pair of blocks."""
    view, every = View(size=size, jpeg=0.7, quality=(5, 100)), np.arange(12)
    images = torch.randint(0, 256, (12, size, size, 3), dtype=torch.uint8).to(DEVICE)
    draws = draw(view, 0, 0, every, 0, np.full(12, size), np.full(12, size))
    drawn = draws.quality > 0
    assert 0 < drawn.sum() < 12
    got = images.clone()
    fused_jpeg.compress(got, draws)
    steps = torch.from_numpy(jpeg.tables(np.maximum(draws.quality, 1))).to(DEVICE)
    expected = jpeg.compress(images.permute(0, 3, 1, 2), steps).permute(0, 2, 3, 1)
    difference = (got.int() - expected.int()).abs()[torch.from_numpy(drawn).to(DEVICE)]
    assert (difference > 0).float().mean() < FEW / 4  # a tie in a coefficient changes a whole block
    assert torch.equal(got[torch.from_numpy(~drawn).to(DEVICE)], images[torch.from_numpy(~drawn).to(DEVICE)])


def test_jpeg_that_no_image_was_drawn_changes_nothing():
    view = View(size=16, jpeg=0.5)
    draws = draw(view, 0, 0, np.arange(2), 0, np.full(2, 16), np.full(2, 16))
    draws = replace(draws, quality=np.zeros_like(draws.quality))
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8).to(DEVICE)
    kept = images.clone()
    fused_jpeg.compress(images, draws)
    assert torch.equal(images, kept)
