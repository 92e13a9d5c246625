from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from noisyssl.pipelines.batched import apply, resize_matrix
from noisyssl.pipelines.draws import draw
from noisyssl.views import View


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny tensors: on a busy machine threads that wait for each other made these tests five times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture(height, width, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, height // 4 + 2, width // 4 + 2, generator=generator) * 255
    smooth = functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def plain(images, **changed):
    """Draws that do nothing but what is asked."""
    batch, height, width = images.shape[:3]
    neutral = draw(View(size=24), 0, 0, np.arange(batch), 0, np.full(batch, height), np.full(batch, width))
    changed = {"top": 0, "left": 0, "bottom": height, "right": width} | changed
    return replace(
        neutral,
        **{
            name: np.broadcast_to(np.asarray(value, (was := getattr(neutral, name)).dtype), was.shape).copy()
            for name, value in changed.items()
        },
    )


EVERYTHING = View(size=24, jitter=1.0, grey=0.5, blur=1.0)


def test_nothing_drawn_gives_the_same_bytes():
    images = picture(24, 24)
    assert torch.equal(apply(images, EVERYTHING, plain(images)).permute(0, 2, 3, 1), images)


def test_output_is_uint8_in_channels_last_memory():
    images = picture(30, 40)
    out = apply(images, EVERYTHING, plain(images))
    assert out.shape == (3, 3, 24, 24)
    assert out.dtype == torch.uint8
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("horizontal", "vertical", "dims"), [(True, False, [3]), (False, True, [2]), (True, True, [2, 3])]
)
def test_flips_mirror_the_unflipped_view(horizontal, vertical, dims):
    images = picture(31, 45)
    box = {"top": 3.0, "left": 7.0, "bottom": 29.0, "right": 30.0}
    straight = apply(images, View(size=24), plain(images, **box))
    flipped = apply(images, View(size=24), plain(images, horizontal=horizontal, vertical=vertical, **box))
    difference = (straight.flip(dims).int() - flipped.int()).abs()
    assert difference.max() <= 1  # sums in another order: halves may round apart
    assert difference.float().mean() < 0.01


@pytest.mark.parametrize("size", [24, 96])
def test_resize_is_torchs_antialiased_bilinear_inside(size):
    """At the very border torch leaves the missing pixels out, DALI repeats the edge."""
    images = picture(60, 48)
    theirs = functional.interpolate(
        images.permute(0, 3, 1, 2).float(), (size, size), mode="bilinear", antialias=True
    )
    ours = apply(images, View(size=size), plain(images)).float()
    edge = 3
    inside = (slice(None), slice(None), slice(edge, -edge), slice(edge, -edge))
    assert (ours - theirs)[inside].abs().max() <= 0.51


def test_resize_rows_sum_to_one_and_keep_a_ramp():
    start, end = torch.tensor([2.0, 10.5]), torch.tensor([50.0, 41.25])
    matrix = resize_matrix(start, end, 60, 16, torch.device("cpu"))
    torch.testing.assert_close(matrix.sum(2), torch.ones(2, 16))
    centres = torch.arange(60) + 0.5
    expected = start[:, None] + (torch.arange(16) + 0.5) / 16 * (end - start)[:, None]
    torch.testing.assert_close((matrix @ centres)[:, 1:-1], expected[:, 1:-1], atol=0.05, rtol=0)


def test_images_of_different_sizes_are_resized_one_by_one():
    images = picture(40, 40)
    draws = plain(
        images, top=[0, 3, 5], left=[1, 0, 4], bottom=[40, 30, 39], right=[37, 40, 22], brightness=1.2
    )
    together = apply(images, EVERYTHING, draws)
    assert torch.equal(apply(list(images), EVERYTHING, draws), together)
