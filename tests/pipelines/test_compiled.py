"""The compiled views against the batched reference, where loading whole data sets does not lead."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import torch

from noisyssl.pipelines import batched, compiled
from noisyssl.pipelines.draws import NO_BLUR, Draws
from noisyssl.views import View


def draws_of(count, **given):
    neutral = {
        "horizontal": False, "vertical": False, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0,
        "sigma": NO_BLUR,
    }  # fmt: skip
    dtypes = {"horizontal": bool, "vertical": bool}
    return Draws(
        **{
            field.name: np.broadcast_to(
                np.asarray((neutral | given)[field.name], dtypes.get(field.name, np.float32)), (count,)
            ).copy()
            for field in fields(Draws)
        }
    )


def both(images, view, draws):
    """(B, 3, S, S) int: the compiled view, and the reference's."""
    with ThreadPoolExecutor(2) as pool:
        (got,) = compiled.apply(images, [view], [draws], pool, compiled.Memory())
    return got.int(), batched.apply([torch.from_numpy(image) for image in images], view, draws).int()


def noise(height, width, count=3):
    return [
        np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8) for i in range(count)
    ]


@pytest.mark.parametrize("size", [8, 33, 96])
@pytest.mark.parametrize(
    "box", [(0, 0, 40, 60), (0, 0, 1, 1), (39, 59, 40, 60), (3, 50, 37, 53), (7, 0, 8, 60)]
)
@pytest.mark.parametrize("mirrored", [(False, False), (True, False), (False, True)])
def test_any_crop_at_any_scale_equals_the_reference(size, box, mirrored):
    """White noise: one column off, or one weight, changes every pixel."""
    top, left, bottom, right = box
    draws = draws_of(
        3, top=top, left=left, bottom=bottom, right=right, horizontal=mirrored[0], vertical=mirrored[1]
    )
    got, expected = both(noise(40, 60), View(size=size), draws)
    assert (got - expected).abs().max() <= 1
    assert (got != expected).float().mean() < 0.01


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1)])
def test_images_of_a_single_row_or_column(shape):
    draws = draws_of(3, top=0, left=0, bottom=shape[0], right=shape[1])
    got, expected = both(noise(*shape), View(size=16), draws)
    assert (got - expected).abs().max() <= 1


@pytest.mark.parametrize("sigma", [0.1, 0.9, 2.0, 9.0])
def test_blur_and_colour_equal_the_reference(sigma):
    rng = np.random.default_rng(0)
    draws = draws_of(
        12, top=2, left=5, bottom=38, right=60, sigma=sigma, brightness=rng.uniform(0.5, 1.5, 12),
        contrast=rng.uniform(0.5, 1.5, 12), saturation=rng.uniform(0, 1.5, 12),
        hue=rng.uniform(-180, 180, 12),
    )  # fmt: skip
    got, expected = both(noise(40, 60, 12), View(size=20, jitter=1, blur=1), draws)
    assert (got - expected).abs().max() <= 1
    assert (got != expected).float().mean() < 0.01


def test_colours_are_clamped_not_wrapped():
    images = [np.full((9, 9, 3), value, np.uint8) for value in (0, 255)]
    draws = draws_of(2, top=0, left=0, bottom=9, right=9, contrast=2.0)
    got, _ = both(images, View(size=8, jitter=1), draws)
    assert got[0].unique().tolist() == [0]
    assert got[1].unique().tolist() == [255]


def test_memory_is_used_again_only_when_nobody_holds_it():
    memory = compiled.Memory()
    first = torch.from_numpy(memory.empty((4, 5)))
    kept = first[1:, 2:]  # a part is enough to hold it
    second = memory.empty((4, 5))
    assert not np.shares_memory(second, first.numpy())
    address = first.data_ptr()
    del first
    assert memory.empty((4, 5)).ctypes.data != address
    del kept
    assert memory.empty((4, 5)).ctypes.data == address
    assert memory.empty((5, 5)).shape == (5, 5)
