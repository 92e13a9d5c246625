"""JPEG against its definition in plain loops, and against real files: Pillow's libjpeg, DALI's operator."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn, idctn

from noisyssl.pipelines.jpeg import compress, tables

QUALITIES = (5, 20, 49, 50, 75, 90, 95, 100)


def picture(size, seed=0):
    """Smooth colours with some grain, a sharp edge, and white and black places."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (size // 8 + 2, size // 8 + 2, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    image = image * 1.3 - 40 + rng.normal(0, 4, image.shape)
    image[: size // 3, : size // 5] = (200, 30, 60)
    return np.clip(image, 0, 255).astype(np.uint8)


def ours(image, quality):
    planes = torch.from_numpy(image[None]).permute(0, 3, 1, 2)
    return compress(planes, torch.from_numpy(tables(np.array([quality]))))[0].permute(1, 2, 0).numpy()


def file_of(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)  # 4:2:0, the default
    return buffer.getvalue()


@pytest.mark.parametrize("quality", [1, 13, 37, *QUALITIES])
def test_tables_are_those_in_a_real_file(quality):
    written = Image.open(io.BytesIO(file_of(picture(16), quality))).quantization
    luma, chroma = tables(np.array([quality]))[0].reshape(2, 64).astype(int).tolist()
    assert (written[0], written[1]) == (luma, chroma)


def naive(image, quality):
    """Pixel by pixel and block by block, in float64; the cosine transform is SciPy's."""
    size = len(image)
    half, whole = math.ceil(size / 2), 16 * math.ceil(size / 16)
    luma, blue, red = np.empty((3, whole, whole))
    for y in range(whole):
        for x in range(whole):
            r, g, b = (float(v) for v in image[min(y, size - 1), min(x, size - 1)])
            luma[y, x] = math.floor(0.299 * r + 0.587 * g + 0.114 * b + 0.5)
            blue[y, x] = math.floor(128 - 0.168736 * r - 0.331264 * g + 0.5 * b + 0.5 - 1e-4)
            red[y, x] = math.floor(128 + 0.5 * r - 0.418688 * g - 0.081312 * b + 0.5 - 1e-4)
    small = []
    for plane in (blue, red):
        out = np.empty((whole // 2, whole // 2))
        for y in range(whole // 2):
            for x in range(whole // 2):
                row = 2 * min(y, half - 1)
                out[y, x] = (plane[row : row + 2, 2 * x : 2 * x + 2].sum() + 1 + x % 2) // 4
        small.append(out)
    steps = tables(np.array([quality]))[0].astype(float)

    def through(plane, step):
        out = np.empty_like(plane)
        for y in range(0, len(plane), 8):
            for x in range(0, len(plane), 8):
                block = dctn(plane[y : y + 8, x : x + 8] - 128, norm="ortho")
                block = np.floor(block / step + 0.5 + 1e-4) * step
                out[y : y + 8, x : x + 8] = np.floor(idctn(block, norm="ortho") + 128.5 + 1e-4)
        return np.clip(out, 0, 255)

    luma, (blue, red) = through(luma, steps[0]), (through(plane, steps[1]) for plane in small)
    result = np.empty((size, size, 3))
    for y in range(size):
        for x in range(size):
            colours = []
            for plane in (blue, red):
                rows = y // 2, min(max(y // 2 + (1 if y % 2 else -1), 0), half - 1)
                columns = x // 2, min(max(x // 2 + (1 if x % 2 else -1), 0), half - 1)
                near, far = (3 * plane[rows[0], c] + plane[rows[1], c] for c in columns)
                colours.append((3 * near + far + 8 - x % 2) // 16 - 128)
            cb, cr = colours
            light = luma[y, x]
            result[y, x] = light + 1.402 * cr, light - 0.344136 * cb - 0.714136 * cr, light + 1.772 * cb
    return np.clip(np.floor(result + 0.5), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("size", "quality"), [(8, 30), (21, 10), (21, 77), (32, 95)])
def test_it_is_the_definition_on_white_noise(size, quality):
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    apart = np.abs(ours(image, quality).astype(int) - naive(image, quality))
    assert apart.max() <= 2  # one chroma value in hundreds is rounded apart, and spread over its neighbours
    assert (apart > 0).mean() < 0.01


@pytest.mark.parametrize("size", [8, 33, 64, 100])
@pytest.mark.parametrize("quality", QUALITIES)
def test_the_pixels_are_nearly_those_of_a_real_file(size, quality):
    """Nearly: libjpeg rounds within its cosine transform, so that some coefficients tip over by one step."""
    image = picture(size)
    real = np.asarray(Image.open(io.BytesIO(file_of(image, quality)))).astype(int)
    apart, damage = np.abs(ours(image, quality) - real).mean(), np.abs(real - image).mean()
    assert apart < 0.1 * damage


def test_chroma_is_halved_and_enlarged_as_in_a_real_file():
    """Colour that changes from pixel to pixel at one brightness: 4:4:4 or repeated chroma would stand out."""
    rng = np.random.default_rng(0)
    red = rng.integers(60, 200, (32, 32))
    image = np.stack([red, 128 - (red - 128) * 0.299 / 0.587, np.full_like(red, 128)], 2).astype(np.uint8)
    real = np.asarray(Image.open(io.BytesIO(file_of(image, 95)))).astype(int)
    assert np.abs(ours(image, 95) - real).mean() < 0.5
    assert np.abs(image - real).mean() > 10


def test_it_is_dalis_operator():
    pytest.importorskip("nvidia.dali", reason="needs nvidia-dali")
    from nvidia.dali import fn, pipeline_def

    images = np.stack([picture(64, seed) for seed in range(4)])
    quality = np.array([15, 40, 70, 92], np.int32)

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def peer():
        image = fn.external_source(source=lambda: images, batch=True, layout="HWC")
        return fn.jpeg_compression_distortion(
            image, quality=fn.external_source(source=lambda: quality, batch=True)
        )

    pipe = peer()
    pipe.build()
    theirs = np.array(pipe.run()[0].as_array()).astype(int)
    for image, q, real in zip(images, quality, theirs, strict=True):
        assert np.abs(ours(image, int(q)) - real).mean() < 0.1 * np.abs(real - image).mean()


def test_grey_stays_grey():
    grey = np.repeat(picture(40)[..., :1], 3, 2)
    out = ours(grey, 20)
    assert np.array_equal(out[..., 0], out[..., 1])
    assert np.array_equal(out[..., 0], out[..., 2])
    assert not np.array_equal(out, grey)


def test_worse_quality_does_more_damage():
    image = picture(64)
    damage = [np.abs(ours(image, q).astype(int) - image).mean() for q in QUALITIES]
    assert damage == sorted(damage, reverse=True)
