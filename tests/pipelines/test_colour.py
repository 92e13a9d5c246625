"""Blur and colour: against their formulas, and against DALI's own operators as a peer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from noisyssl.pipelines.colour import blur, finish, twist
from noisyssl.pipelines.draws import NO_BLUR, Draws, draw
from noisyssl.views import View

SIZE = 40
EVERYTHING = View(size=SIZE, jitter=1.0, grey=0.5, blur=0.5)


def pictures(count: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 12, 12, generator=generator) * 255
    smooth = functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 255)
    return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def draws(count: int = 20, **changed) -> Draws:
    """Neutral draws, but for what is given."""
    neutral = draw(View(size=SIZE), 0, 0, np.arange(count), 0, np.full(count, SIZE), np.full(count, SIZE))
    return replace(
        neutral,
        **{
            name: np.broadcast_to(np.asarray(value, (was := getattr(neutral, name)).dtype), was.shape).copy()
            for name, value in changed.items()
        },
    )


def random_draws(count: int = 20) -> Draws:
    rng = np.random.default_rng(0)
    return draws(
        count, brightness=rng.uniform(0.6, 1.4, count), contrast=rng.uniform(0.6, 1.4, count),
        saturation=rng.uniform(0, 1.4, count), hue=rng.uniform(-36, 36, count),
        sigma=np.where(rng.random(count) < 0.5, rng.uniform(0.1, 2, count), NO_BLUR),
    )  # fmt: skip


def test_it_computes_what_dalis_operators_do():
    """gaussian_blur and color_twist of DALI, float between them, as an independent implementation."""
    pytest.importorskip("nvidia.dali", reason="needs nvidia-dali")
    from nvidia.dali import fn, pipeline_def, types

    images, given = pictures(), random_draws()
    window = np.where(given.sigma > NO_BLUR, 2 * np.ceil(3 * given.sigma) + 1, 1).astype(np.int32)

    @pipeline_def(batch_size=20, num_threads=1, device_id=None)
    def peer():
        def fed(values):
            return fn.external_source(source=lambda: values, batch=True)

        image = fn.external_source(source=lambda: images.numpy(), batch=True, layout="HWC")
        image = fn.gaussian_blur(image, sigma=fed(given.sigma), window_size=fed(window), dtype=types.FLOAT)
        image = fn.cast(image, dtype=types.UINT8)  # color_twist's mid-grey is 128 for bytes only
        factors = {
            name: fed(getattr(given, name)) for name in ("brightness", "contrast", "saturation", "hue")
        }
        return fn.color_twist(image, **factors, dtype=types.FLOAT)

    pipe = peer()
    pipe.build()
    expected = torch.from_numpy(np.array(pipe.run()[0].as_array())).clamp(0, 255).permute(0, 3, 1, 2)
    apart = (finish(images, EVERYTHING, given).float() - expected).abs()
    assert apart.mean((1, 2, 3)).max() < 0.6  # DALI rounds once more between the two
    assert apart.max() < 3


def test_no_image_depends_on_the_others():
    images, given = pictures(), random_draws()
    together = finish(images, EVERYTHING, given)
    assert together.is_contiguous(memory_format=torch.channels_last)
    for i in (0, 7, 19):
        one = Draws(**{name: getattr(given, name)[i : i + 1] for name in Draws.__slots__})
        apart = finish(images[i : i + 1], EVERYTHING, one).int() - together[i : i + 1].int()
        assert apart.abs().max() <= 1  # a wider window of zeros may round another way


def test_a_view_without_colour_and_blur_is_the_crop():
    images = pictures()
    out = finish(images, View(size=SIZE), random_draws())
    assert torch.equal(out.permute(0, 2, 3, 1), images)
    assert out.data_ptr() == images.data_ptr()


def test_steps_on_a_view_without_colour_leave_the_crops_as_they_were():
    images = pictures()
    kept = images.clone()
    view = View(size=SIZE, turn=1.0, stain=1.0, stain_factor=0.2, solarise=0.5, jpeg=0.5, angle=5.0)
    out = finish(images, view, draws(turns=1, angle=5.0, solarised=True, quality=60, stain_factor=1.2))
    assert torch.equal(images, kept)
    assert not torch.equal(out.permute(0, 2, 3, 1), kept)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_solarised_values_from_128_on_are_inverted():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    out = finish(images, View(size=16, solarise=1.0), draws(1, solarised=True))[0, 0].flatten().tolist()
    assert out == [value if value < 128 else 255 - value for value in range(256)]


def test_neutral_draws_change_nothing():
    images = pictures()
    assert torch.equal(finish(images, EVERYTHING, draws()).permute(0, 2, 3, 1), images)


def test_saturation_zero_is_grey_with_the_luma_weights():
    images = pictures()
    out = finish(images, View(size=SIZE, grey=1.0), draws(saturation=0)).float()
    luma = (images.float() * torch.tensor([0.299, 0.587, 0.114])).sum(3)
    for channel in range(3):
        assert (out[:, channel] - luma).abs().max() <= 1.5


def test_contrast_turns_about_mid_grey_before_brightness():
    images = torch.full((1, SIZE, SIZE, 3), 200, dtype=torch.uint8)
    out = finish(images, View(size=SIZE, jitter=1.0), draws(1, contrast=0.5, brightness=0.8))
    assert out.unique().item() == pytest.approx(0.8 * (128 + 0.5 * (200 - 128)), abs=0.5)


def test_colours_are_clamped_not_wrapped():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, SIZE, SIZE, 3).contiguous()
    out = finish(images, View(size=SIZE, jitter=1.0), draws(2, contrast=2.0))
    assert out[0].unique().tolist() == [0]
    assert out[1].unique().tolist() == [255]


def test_hue_turns_add_up_and_keep_grey():
    third, back = (twist(draws(1, hue=angle))[0][0] for angle in (120, -240))
    np.testing.assert_allclose(third, back, atol=1e-5)
    np.testing.assert_allclose(third @ third @ third, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(third @ np.ones(3), np.ones(3), atol=0.01)
    red = twist(draws(1, hue=120))[0][0] @ np.array([1.0, 0, 0])
    assert red.argmax() != 0  # a third of the circle makes red another primary


def test_blur_is_a_reflected_convolution():
    sigma = torch.tensor([0.4, 1.7])
    planes = torch.rand(2, 3, 20, 20)
    blurred = blur(planes, sigma)
    for i in range(2):
        reach = int(torch.ceil(3 * sigma[i]))
        weight = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma[i]) ** 2)
        weight = weight / weight.sum()
        padded = functional.pad(planes[i], (reach,) * 4, mode="reflect")
        expected = functional.conv2d(padded[:, None], (weight[:, None] * weight)[None, None])[:, 0]
        torch.testing.assert_close(blurred[i], expected, rtol=1e-4, atol=1e-5)


def test_blur_wider_than_the_image_still_averages():
    planes = torch.rand(1, 3, 8, 8)
    blurred = blur(planes, torch.tensor([9.0]))
    assert blurred.shape == planes.shape
    assert blurred.var() < 0.2 * planes.var()
    torch.testing.assert_close(blur(torch.ones(1, 3, 8, 8), torch.tensor([9.0])), torch.ones(1, 3, 8, 8))
