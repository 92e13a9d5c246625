"""Stain jitter against the papers' steps pixel by pixel, and its laws."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from noisyssl.pipelines.draws import draw
from noisyssl.pipelines.stain import STAINS, density_map, is_stained, stain
from noisyssl.views import View


def draws_of(factor, shift):
    one = draw(View(size=8), 0, 0, np.arange(1), 0, np.full(1, 8), np.full(1, 8))
    return replace(
        one, stain_factor=np.array([factor], np.float32), stain_shift=np.array([shift], np.float32)
    )


def stained(pixels, factor, shift=(0, 0, 0)):
    """(N, 3) uint8 pixels, jittered."""
    planes = torch.from_numpy(pixels.T.reshape(1, 3, len(pixels), 1).copy())
    return stain(planes, torch.from_numpy(density_map(draws_of(factor, shift))))[0, :, :, 0].T.numpy()


def naive(pixel, factor, shift):
    """Ruifrok and Johnston's deconvolution, Tellez's jitter, and back, for one pixel."""
    vectors = [np.array(v) for v in ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))]
    unit = [v / math.sqrt(sum(x * x for x in v)) for v in vectors]
    density = [-math.log(max(int(value), 1) / 255) for value in pixel]
    amounts = np.linalg.solve(np.array(unit).T, density)  # density = sum of amounts times vectors
    amounts = [f * c + s for f, c, s in zip(factor, amounts, shift, strict=True)]
    light = [255 * math.exp(-sum(c * v[k] for c, v in zip(amounts, unit, strict=True))) for k in range(3)]
    return [min(math.floor(value + 0.5), 255) for value in light]


@pytest.mark.parametrize(
    ("factor", "shift"), [((1.3, 0.8, 1.1), (0.05, -0.1, 0.02)), ((0.7, 1.2, 1.0), (0, 0, 0))]
)
def test_it_is_deconvolution_jitter_and_recombination(factor, shift):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 3), dtype=np.uint8)
    expected = np.array([naive(pixel, factor, shift) for pixel in pixels])
    assert np.abs(stained(pixels, factor, shift) - expected).max() <= 1
    assert (stained(pixels, factor, shift) != expected).mean() < 0.01


def test_an_amount_of_one_is_a_density_of_one():
    np.testing.assert_allclose(np.linalg.norm(STAINS, axis=1), 1)


def test_neutral_draws_change_nothing_but_black():
    pixels = np.random.default_rng(0).integers(1, 256, (300, 3), dtype=np.uint8)
    assert np.array_equal(stained(pixels, (1, 1, 1)), pixels)
    assert stained(np.zeros((1, 3), np.uint8), (1, 1, 1)).tolist() == [[1, 1, 1]]
    assert not is_stained(draws_of((1, 1, 1), (0, 0, 0)))[0]
    assert is_stained(draws_of((1, 1, 1), (0, 0, 0.1)))[0]


def test_a_stain_changes_its_own_colour_only():
    """Pixels of pure eosin do not care about haematoxylin, and the other way round."""
    amounts = np.linspace(0.2, 2, 20)[:, None]
    for own in range(3):
        pure = np.round(255 * np.exp(-amounts * STAINS[own])).astype(np.uint8)
        others = [1.4 if k != own else 1.0 for k in range(3)]
        itself = [1.4 if k == own else 1.0 for k in range(3)]
        assert np.abs(stained(pure, others).astype(int) - pure).max() <= 2  # the bytes are rounded
        thicker = 255 * np.exp(-1.4 * amounts * STAINS[own])
        assert np.abs(stained(pure, itself) - thicker).max() <= 2


def test_twice_all_stains_is_the_light_squared():
    pixels = np.random.default_rng(1).integers(40, 256, (200, 3), dtype=np.uint8)
    expected = pixels.astype(float) ** 2 / 255
    assert np.abs(stained(pixels, (2, 2, 2)) - expected).max() <= 0.51


def test_white_takes_the_shifts_colour_and_cannot_get_brighter():
    white = np.full((1, 3), 255, np.uint8)
    tinted = stained(white, (1, 1, 1), (0.1, 0, 0))[0]
    np.testing.assert_allclose(tinted, 255 * np.exp(-0.1 * STAINS[0]), atol=0.51)
    assert stained(white, (1, 1, 1), (-0.1, 0, 0)).tolist() == [[255, 255, 255]]
