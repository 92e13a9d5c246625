import numpy as np
import pytest

from noisyssl.benchmarks import image_zoo as zoo
from noisyssl.errors import ConfigError
from noisyssl.geometry import FITS, evaluation_box, evaluation_view


def resampled(image: np.ndarray, axis: int, low: float, high: float, size: int) -> np.ndarray:
    """The textbook: a triangle as wide as one output pixel, centred on it, over the input pixels' centres."""
    scale = (high - low) / size
    weights = np.zeros((size, image.shape[axis]))
    for i in range(size):
        centre = low + (i + 0.5) * scale
        weights[i] = np.maximum(0, 1 - np.abs(np.arange(image.shape[axis]) + 0.5 - centre) / max(scale, 1))
    weights /= weights.sum(1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)


@pytest.mark.parametrize("shape", [(61, 90), (90, 61), (20, 33), (64, 65)])
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_evaluation_view_is_one_antialiased_bilinear_resampling(shape, fit):
    image = zoo.paint(100, 3)[: shape[0], : shape[1]]
    top, left, bottom, right = evaluation_box(*shape, fit)
    reference = resampled(resampled(image, 0, top, bottom, 32), 1, left, right, 32)
    view = evaluation_view(image, 32, fit)
    assert view.shape == (32, 32, 3)
    assert np.abs(view - reference).max() <= 1.1


def test_evaluation_boxes():
    assert evaluation_box(10, 15) == (0, 2.5, 10, 12.5)
    assert evaluation_box(15, 10, "crop") == (2.5, 0, 12.5, 10)
    assert evaluation_box(15, 10, "squash") == evaluation_box(15, 10, "pad") == (0, 0, 15, 10)


@pytest.mark.parametrize("fit", FITS)
def test_an_image_of_the_right_size_is_left_alone(fit):
    image = zoo.paint(48, 4)[:, :48]
    assert np.array_equal(evaluation_view(image, 48, fit), image)


@pytest.mark.parametrize("fit", FITS)
def test_the_view_of_the_turned_image_is_the_turned_view(fit):
    image = zoo.paint(64, 5)
    turned = evaluation_view(np.ascontiguousarray(np.rot90(image)), 32, fit)
    assert np.abs(turned.astype(int) - np.rot90(evaluation_view(image, 32, fit))).max() <= 1


def test_pad_keeps_proportions_on_black():
    view = evaluation_view(np.full((50, 100, 3), 200, np.uint8), 32, "pad")
    assert (view[8:24] == 200).all()
    assert not view[:8].any()
    assert not view[24:].any()
    assert evaluation_view(np.full((1, 1000, 3), 9, np.uint8), 32, "pad").any()


def test_unknown_fit_names_the_choices():
    with pytest.raises(
        ConfigError, match=r"data\.fit 'crp' is unknown; choose one of crop, pad, squash\. Did you mean"
    ):
        evaluation_view(np.zeros((8, 8, 3), np.uint8), 32, "crp")
