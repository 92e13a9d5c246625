"""Rotation against SciPy and torchvision, the direction of quarter turns against NumPy."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import rotate as torchvision_rotate

from noisyssl.pipelines.turns import rotate, rotate_images, rotation, transpose_images


def noise(count=2, size=31):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def turned(images, angle):
    """(B, 3, S, S) uint8."""
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    return rotate(planes, torch.from_numpy(rotation(np.asarray(angle))))


@pytest.mark.parametrize("size", [8, 31, 64])
def test_rotation_is_scipys_bilinear_with_the_border_repeated(size):
    images, angle = noise(size=size), np.array([17.0, -8.5])
    got = turned(images, angle).float()
    middle = (size - 1) / 2
    for i, radians in enumerate(np.deg2rad(angle)):
        cosine, sine = np.cos(radians), np.sin(radians)
        matrix = np.array([[cosine, sine], [-sine, cosine]])  # of row and column
        offset = middle - matrix @ [middle, middle]
        for channel in range(3):
            expected = ndimage.affine_transform(
                images[i, ..., channel].astype(float), matrix, offset, order=1, mode="nearest"
            )
            assert np.abs(got[i, channel].numpy() - expected).max() < 0.51


def test_positive_angles_turn_counter_clockwise_as_in_torchvision():
    images = noise(1, 64)
    planes = torch.from_numpy(images).permute(0, 3, 1, 2)
    theirs = torchvision_rotate(planes, 10.0, InterpolationMode.BILINEAR).int()
    inside = (..., slice(12, -12), slice(12, -12))  # there it fills with black
    assert (turned(images, [10.0]).int() - theirs)[inside].abs().max() <= 1
    assert (turned(images, [-10.0]).int() - theirs)[inside].abs().max() > 50


def test_ninety_degrees_are_numpys_quarter_turn():
    images = noise()
    expected = np.rot90(images, 1, (1, 2))
    assert np.array_equal(turned(images, [90.0, 90.0]).permute(0, 2, 3, 1).numpy(), expected)


def test_no_angle_changes_nothing():
    images = noise()
    assert np.array_equal(turned(images, [0.0, 0.0]).permute(0, 2, 3, 1).numpy(), images)
    again = images.copy()
    rotate_images(again, rotation(np.zeros(2)))
    assert np.array_equal(again, images)


def test_a_flat_image_stays_flat_to_its_corners():
    flat = np.full((1, 16, 16, 3), (10, 128, 250), np.uint8)
    assert np.array_equal(turned(flat, [33.0]).permute(0, 2, 3, 1).numpy(), flat)


def test_only_the_marked_images_are_transposed():
    images = noise()
    done = images.copy()
    transpose_images(done, np.array([False, True]))
    assert np.array_equal(done[0], images[0])
    assert np.array_equal(done[1], images[1].transpose(1, 0, 2))
