"""The compiled views against the batched reference, where loading whole data sets does not lead."""

import ast
import inspect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from noisyssl.pipelines import batched, compiled, jpeg, loops, turns
from noisyssl.pipelines.draws import draw
from noisyssl.views import View


def draws_of(count, **given):
    """Draws of a view without any randomness, but for what is given."""
    neutral = draw(View(size=8), 0, 0, np.arange(count), 0, np.full(count, 40), np.full(count, 60))
    return replace(
        neutral,
        **{
            name: np.broadcast_to(np.asarray(value, (was := getattr(neutral, name)).dtype), was.shape).copy()
            for name, value in given.items()
        },
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


ONLY = {
    "turn": View(size=40, flip=0.5, upside=0.5, turn=1.0),
    "angle": View(size=40, angle=45.0),
    "stain": View(size=40, stain=0.9, stain_factor=0.5, stain_shift=0.3),
    "solarise": View(size=40, solarise=0.5),
    "jpeg": View(size=40, jpeg=0.9, quality=(5, 100)),
}


@pytest.mark.parametrize("view", ONLY.values(), ids=ONLY)
def test_each_step_equals_the_reference_on_white_noise(view):
    """Crops of 40 x 40 images to 40 pixels, so that both sides start from the same bytes."""
    draws = draw(view, 0, 0, np.arange(24), 0, np.full(24, 40), np.full(24, 40))
    images = noise(40, 40, 24)
    got, expected = both(images, view, draws)
    assert (got - expected).abs().max() <= 1
    assert (got != expected).float().mean() < 0.001
    plain = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    assert (got != plain).float().mean() > 0.2, "it happened"


def test_views_of_all_steps_stay_close_to_the_reference():
    """One byte rounded apart may tip a whole JPEG block, or be enlarged by a stain: close on average."""
    view = View(
        size=48, area=(0.2, 1.0), flip=0.5, upside=0.5, jitter=0.8, brightness=0.4, contrast=0.4, blur=0.5,
        turn=1.0, angle=20.0, stain=0.8, stain_factor=0.3, stain_shift=0.1, solarise=0.3, jpeg=0.5,
    )  # fmt: skip
    draws = draw(view, 0, 0, np.arange(32), 0, np.full(32, 60), np.full(32, 70))
    got, expected = both(noise(60, 70, 32), view, draws)
    assert (got - expected).abs().float().mean() < 0.05
    assert ((got - expected).abs() > 1).float().mean() < 0.01


@pytest.mark.parametrize("size", [8, 33, 47])
def test_jpeg_of_sizes_that_are_no_whole_blocks(size):
    view = View(size=size, jpeg=1.0, quality=(10, 90))
    draws = draw(view, 0, 0, np.arange(6), 0, np.full(6, size), np.full(6, size))
    got, expected = both(noise(size, size, 6), view, draws)
    assert (got - expected).abs().max() <= 1


def test_images_are_changed_by_their_own_draws_only():
    """More images than a thread takes at a time, each like it comes out alone."""
    view = View(size=24, turn=1.0, angle=30.0, stain=0.5, stain_factor=0.4, solarise=0.5, jpeg=0.5)
    draws = draw(view, 0, 0, np.arange(19), 0, np.full(19, 30), np.full(19, 30))
    images = noise(30, 30, 19)
    together, _ = both(images, view, draws)
    for i in (0, 7, 8, 18):
        alone = draw(view, 0, 0, np.array([i]), 0, np.full(1, 30), np.full(1, 30))
        assert torch.equal(both(images[i : i + 1], view, alone)[0][0], together[i])


@pytest.mark.parametrize("module", [loops, turns, jpeg], ids=lambda module: module.__name__)
def test_compiled_code_depends_on_its_own_file_only(module):
    """numba keeps machine code until the file of the outer function changes; others would go unnoticed."""
    functions = [f for f in vars(module).values() if hasattr(f, "py_func")]
    assert functions
    for function in functions:
        assert function.py_func.__module__ == module.__name__
        tree = ast.parse(inspect.getsource(module))
        foreign = {
            alias.asname or alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module.startswith("noisyssl")
            for alias in node.names
        }
        assert not foreign & set(function.py_func.__code__.co_names)


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
