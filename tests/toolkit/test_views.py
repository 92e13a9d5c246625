"""What a modality does to a view."""

from dataclasses import fields, replace

import pytest

from noisyssl.errors import ConfigError
from noisyssl.methods import METHODS
from noisyssl.views import MODALITIES, View, adapt, asymmetric_pair, pair, training

ASYMMETRIC = replace(pair(64)[0], solarise=0.2)
UPRIGHT = View(size=64, area=(0.5, 1.0), jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
"""Of a method that does not flip: it may live on orientation."""


def test_natural_images_keep_the_papers_views():
    for view in (*pair(64), *training(64), ASYMMETRIC, UPRIGHT):
        assert adapt(view, "natural") is view


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_view_that_does_not_flip_gets_no_direction(modality):
    view = adapt(UPRIGHT, modality)
    assert (view.flip, view.upside, view.turn, view.angle, view.jpeg) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("modality", MODALITIES)
def test_crop_size_and_blur_are_the_methods(modality):
    for view in (*pair(64), *training(64), UPRIGHT):
        adapted = adapt(view, modality)
        for name in ("size", "area", "ratio", "jitter", "blur", "sigma"):
            assert getattr(adapted, name) == getattr(view, name)


@pytest.mark.parametrize("modality", MODALITIES)
def test_adapting_twice_is_adapting_once(modality):
    for view in (*pair(64), *training(64), UPRIGHT, ASYMMETRIC):
        once = adapt(view, modality)
        assert adapt(once, modality) == once


def test_tissue_is_turned_and_stained_instead_of_hued():
    view = adapt(ASYMMETRIC, "histology")
    assert (view.flip, view.upside, view.turn, view.angle) == (0.5, 0.5, 1.0, 0)
    assert (view.hue, view.saturation, view.solarise) == (0, 0, 0)
    assert (view.stain, view.stain_factor) == (0.8, pytest.approx(0.2))
    assert 0 < view.stain_shift <= 0.1
    assert adapt(training(64)[0], "histology").stain_factor == pytest.approx(0.1)
    assert not adapt(replace(UPRIGHT, hue=0.0, saturation=0.0), "histology").stain


def test_radiographs_are_never_mirrored_nor_coloured():
    for view in (*pair(64), *training(64), replace(UPRIGHT, flip=0.5, upside=0.5), ASYMMETRIC):
        adapted = adapt(view, "xray")
        assert (adapted.flip, adapted.upside, adapted.turn) == (0, 0, 0)
        assert (adapted.hue, adapted.saturation, adapted.grey, adapted.stain, adapted.solarise) == (0,) * 5
        assert 0 < adapted.angle <= 10
        assert adapted.jpeg > 0
        assert 0 < adapted.brightness <= 0.3


def test_an_eye_may_be_the_other_eye_but_not_upside_down():
    view = adapt(replace(pair(64)[0], upside=0.5), "fundus")
    assert (view.flip, view.upside, view.turn) == (0.5, 0, 0)
    assert 0 < view.angle <= 15
    assert 0 < view.hue <= 0.02
    assert (view.grey, view.solarise) == (0, 0)
    assert view.brightness > 0 < view.contrast


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_methods_views_can_be_adapted(method, modality):
    for view in METHODS[method].views(64):
        adapt(view, modality)


def test_an_unknown_modality_names_the_choices():
    with pytest.raises(
        ConfigError, match=r"data\.modality 'histolgy' is unknown; .*Did you mean 'histology'\?"
    ):
        adapt(UPRIGHT, "histolgy")


@pytest.mark.parametrize(
    "setting",
    [
        {"turn": 1.5}, {"stain": -0.1}, {"solarise": 2.0}, {"jpeg": -1.0}, {"angle": -3.0}, {"angle": 60.0},
        {"stain_factor": -0.1}, {"stain_shift": -0.1}, {"quality": (0, 50)}, {"quality": (90, 50)},
        {"quality": (50, 101)},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_with_their_value(setting):
    value = next(iter(setting.values()))
    with pytest.raises(ConfigError) as error:
        View(size=64, **setting)
    assert str(value) in str(error.value)


def test_a_view_without_settings_does_nothing():
    plain = {f.name: f.default for f in fields(View)}
    for name in ("flip", "upside", "jitter", "grey", "blur", "turn", "angle", "stain", "solarise", "jpeg"):
        assert plain[name] == 0


def test_the_asymmetric_pair_is_byols():
    first, second = asymmetric_pair(224)
    assert (first.blur, first.solarise) == (1.0, 0.0)
    assert (second.blur, second.solarise) == (0.1, 0.2)
    same = {"blur": 0.5, "solarise": 0.0}
    assert replace(first, **same) == replace(second, **same) == replace(pair(224)[0], saturation=0.2)
    (large, other, *small) = METHODS["dino"].views(224)
    assert [view.size for view in (large, other, *small)] == [224] * 2 + [96] * 6
    assert [(view.blur, view.solarise) for view in (large, other, *small)] == [(1, 0), (0.1, 0.2)] + [
        (0.5, 0)
    ] * 6
