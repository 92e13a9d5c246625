import dataclasses
import math

import numpy as np
import pytest
from torchvision.transforms import RandomResizedCrop

from noisyssl.geometry import evaluation_box
from noisyssl.philox import uniform
from noisyssl.pipelines.draws import ATTEMPTS, NO_BLUR, VIEW, draw, keys, order
from noisyssl.views import View, evaluation, pair

N = 4000
TURNED = {
    "turn": 0.7, "angle": 12.0, "stain": 0.6, "stain_factor": 0.3, "stain_shift": 0.1, "solarise": 0.2,
    "jpeg": 0.4, "quality": (30, 60),
}  # fmt: skip
LATER = ("turns", "angle", "stain_factor", "stain_shift", "solarised", "quality")
INDEX = np.arange(N)
HEIGHTS, WIDTHS = np.full(N, 150), np.full(N, 200)


def fields(draws):
    return {field.name: getattr(draws, field.name) for field in dataclasses.fields(draws)}


def same(a, b):
    return all(np.array_equal(x, fields(b)[name]) for name, x in fields(a).items())


def rows(draws, chosen):
    return type(draws)(**{name: x[chosen] for name, x in fields(draws).items()})


def test_order_is_a_new_permutation_every_epoch_and_seed():
    indices = np.arange(5, 505)
    orders = [order(seed, epoch, indices) for seed in (0, 1) for epoch in (0, 1)]
    for permutation in orders:
        assert np.array_equal(np.sort(permutation), indices)
        assert np.mean(permutation == indices) < 0.05
    assert len({tuple(x) for x in orders}) == 4
    assert np.array_equal(orders[0], order(0, 0, indices[::-1]))


def test_order_of_the_others_survives_a_removed_index():
    whole = order(3, 7, np.arange(100))
    kept = np.delete(np.arange(100), [4, 50, 99])
    assert np.array_equal(order(3, 7, kept), whole[np.isin(whole, kept)])


def test_order_places_every_index_everywhere():
    places = np.array([np.argsort(order(0, epoch, np.arange(8))) for epoch in range(4000)])
    counts = np.stack([np.bincount(places[:, i], minlength=8) for i in range(8)])
    assert abs(counts / 4000 - 1 / 8).max() < 5 * math.sqrt(7 / 64 / 4000)


def test_keys_differ_by_seed_epoch_and_index():
    every = np.concatenate([keys(seed, epoch, INDEX) for seed in (0, 1, 1 << 40) for epoch in (0, 1)])
    assert every.dtype == np.int64
    assert len(np.unique(every)) == len(every)


def test_draws_belong_to_the_index_not_to_the_batch():
    view = pair(64)[0]
    whole = draw(view, 0, 2, INDEX, 0, HEIGHTS, WIDTHS)
    chosen = np.array([7, 3, 1999])
    assert same(draw(view, 0, 2, chosen, 0, HEIGHTS[chosen], WIDTHS[chosen]), rows(whole, chosen))


@pytest.mark.parametrize("changed", [{"seed": 1}, {"epoch": 1}, {"number": 1}])
def test_seed_epoch_and_view_number_change_every_draw(changed):
    view = dataclasses.replace(
        pair(64)[0], jitter=1.0, grey=0.0, blur=1.0, upside=0.5, **{**TURNED, "stain": 1.0, "jpeg": 1.0}
    )
    base = {"seed": 0, "epoch": 0, "number": 0}
    first, second = (
        draw(view, s["seed"], s["epoch"], INDEX, s["number"], HEIGHTS, WIDTHS) for s in (base, base | changed)
    )
    for name, values in fields(first).items():
        coincidence = abs(np.corrcoef(values.ravel(), fields(second)[name].ravel())[0, 1])
        assert coincidence < 5 / math.sqrt(N), name


@pytest.mark.parametrize(("height", "width"), [(150, 200), (40, 300), (300, 40), (1, 1), (9, 10)])
def test_crop_is_torchvisions_rule_on_the_same_numbers(height, width):
    view = View(size=32, area=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    index = np.arange(300)
    draws = draw(view, 5, 1, index, 2, np.full(300, height), np.full(300, width))
    numbers = uniform(keys(5, 1, index), VIEW + 2, 2 * ATTEMPTS + 2)
    for i in index:
        got = tuple(float(x[i]) for x in (draws.top, draws.left, draws.bottom, draws.right))
        assert got == naive_crop(numbers[i], height, width, view), i


def naive_crop(numbers, height, width, view):
    low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
    for k in range(ATTEMPTS):
        area = height * width * (view.area[0] + (view.area[1] - view.area[0]) * numbers[k])
        ratio = math.exp(low + (high - low) * numbers[ATTEMPTS + k])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(numbers[2 * ATTEMPTS] * (height - h + 1))
            left = int(numbers[2 * ATTEMPTS + 1] * (width - w + 1))
            return top, left, top + h, left + w
    w, h = width, height
    if width / height < view.ratio[0]:
        h = round(w / view.ratio[0])
    elif width / height > view.ratio[1]:
        w = round(h * view.ratio[1])
    top, left = (height - h) // 2, (width - w) // 2
    return top, left, top + h, left + w


def test_crops_are_distributed_like_torchvisions():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    view = View(size=32, area=(0.2, 1.0), ratio=(3 / 4, 4 / 3))
    draws = draw(view, 0, 0, INDEX, 0, HEIGHTS, WIDTHS)
    ours = np.stack([draws.top, draws.left, draws.bottom - draws.top, draws.right - draws.left], 1)
    image = torch.empty(3, 150, 200)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in INDEX])
    error = np.sqrt(ours.var(0) / N + theirs.var(0) / N)
    assert (abs(ours.mean(0) - theirs.mean(0)) < 5 * error).all()
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.08)
    assert (ours >= 0).all()
    assert (draws.bottom <= 150).all()
    assert (draws.right <= 200).all()


def test_the_evaluation_view_is_the_evaluation_box_and_nothing_else():
    heights, widths = np.array([10, 31, 10, 7]), np.array([10, 20, 10, 90])
    draws = draw(evaluation(8), 0, 0, np.arange(4), 0, heights, widths)
    boxes = np.stack([draws.top, draws.left, draws.bottom, draws.right], 1)
    np.testing.assert_array_equal(
        boxes, [evaluation_box(int(h), int(w), "crop") for h, w in zip(heights, widths, strict=True)]
    )
    assert not (draws.horizontal | draws.vertical).any()
    assert (draws.brightness == 1).all()
    assert (draws.contrast == 1).all()
    assert (draws.saturation == 1).all()
    assert (draws.hue == 0).all()
    assert (draws.sigma == NO_BLUR).all()
    for values in (draws.turns, draws.angle, draws.solarised, draws.quality):
        assert not values.any()
    assert (draws.stain_factor == 1).all()
    assert not draws.stain_shift.any()


def test_what_was_drawn_before_views_could_turn_is_still_drawn():
    """Numbers of a run made then, so that a resumed one goes on with the same views."""
    view = View(
        size=64, area=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, upside=0.5, jitter=1.0, brightness=0.4,
        contrast=0.4, saturation=0.4, hue=0.1, blur=1.0,
    )  # fmt: skip
    draws = draw(view, 7, 3, np.array([5]), 1, np.array([150]), np.array([200]))
    numbers = uniform(keys(7, 3, np.array([5])), VIEW + 1, 2 * ATTEMPTS + 12)[0, 2 * ATTEMPTS + 2 :]
    assert draws.horizontal[0] == (numbers[0] < 0.5)
    assert draws.vertical[0] == (numbers[1] < 0.5)
    got = [draws.brightness, draws.contrast, draws.saturation, draws.hue, draws.sigma]
    expected = [0.6 + 0.8 * numbers[3], 0.6 + 0.8 * numbers[4], 0.6 + 0.8 * numbers[5],
                -36 + 72 * numbers[6], 0.1 + 1.9 * numbers[9]]  # fmt: skip
    np.testing.assert_allclose(np.concatenate(got), expected, rtol=1e-6)


def test_turns_stains_and_jpeg_leave_the_other_draws_as_they_were():
    view = dataclasses.replace(pair(64)[0], upside=0.5)
    before = fields(draw(view, 1, 2, INDEX, 1, HEIGHTS, WIDTHS))
    after = fields(draw(dataclasses.replace(view, **TURNED), 1, 2, INDEX, 1, HEIGHTS, WIDTHS))
    for name in before:
        assert np.array_equal(before[name], after[name]) == (name not in LATER), name


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_turn_is_made_of_mirrored_corners_and_a_transposition(flips, turns):
    box = np.arange(12).reshape(3, 4)
    draws = dataclasses.replace(
        draw(View(size=8), 0, 0, np.arange(1), 0, np.full(1, 3), np.full(1, 4)),
        top=np.zeros(1), left=np.zeros(1), bottom=np.full(1, 3.0), right=np.full(1, 4.0),
        horizontal=np.array([flips[0]]), vertical=np.array([flips[1]]), turns=np.array([turns]),
    )  # fmt: skip
    start, end = draws.corners()
    mirrored = (end < start)[0]
    made = box[:: -1 if mirrored[0] else 1, :: -1 if mirrored[1] else 1]
    made = made.T if draws.transposed()[0] else made
    flipped = box[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
    np.testing.assert_array_equal(made, np.rot90(flipped, turns))


def test_rates_and_ranges_of_turns_stains_and_jpeg_are_the_views():
    draws = draw(View(size=64, **TURNED), 0, 0, INDEX, 0, HEIGHTS, WIDTHS)
    stained = (draws.stain_factor != 1).any(1)

    def near(share, rate):
        return abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / N)

    assert all(near((draws.turns == k).mean(), 0.7 / 4 + (0.3 if k == 0 else 0)) for k in range(4))
    assert near(stained.mean(), 0.6)
    assert np.array_equal(stained, (draws.stain_shift != 0).all(1))
    assert near(draws.solarised.mean(), 0.2)
    compressed = draws.quality > 0
    assert near(compressed.mean(), 0.4)
    assert np.array_equal(np.unique(draws.quality[compressed]), np.arange(30, 61))
    for values, low, high in (
        (draws.angle, -12, 12),
        *((draws.stain_factor[stained, k], 0.7, 1.3) for k in range(3)),
        *((draws.stain_shift[stained, k], -0.1, 0.1) for k in range(3)),
        (draws.quality[compressed], 30, 60),
    ):
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * len(values))
    together = np.corrcoef(np.concatenate([draws.stain_factor, draws.stain_shift], 1)[stained].T)
    assert abs(together - np.eye(6)).max() < 5 / math.sqrt(stained.sum())


def test_rates_and_ranges_are_the_views():
    view = View(
        size=64, flip=0.3, upside=0.6, jitter=0.7, brightness=0.4, contrast=0.2, saturation=0.3, hue=0.1,
        grey=0.25, blur=0.4, sigma=(0.5, 1.5),
    )  # fmt: skip
    draws = draw(view, 0, 0, INDEX, 0, HEIGHTS, WIDTHS)
    jittered = draws.brightness != 1

    def near(share, rate):
        return abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / N)

    assert near(draws.horizontal.mean(), 0.3)
    assert near(draws.vertical.mean(), 0.6)
    assert near(jittered.mean(), 0.7)
    assert near((draws.saturation == 0).mean(), 0.25)
    assert near((draws.sigma > NO_BLUR).mean(), 0.4)
    assert np.array_equal(jittered, draws.contrast != 1)
    assert np.array_equal(jittered, draws.hue != 0)
    coloured = draws.saturation[(draws.saturation > 0) & jittered]
    for values, low, high in (
        (draws.brightness[jittered], 0.6, 1.4),
        (draws.contrast[jittered], 0.8, 1.2),
        (coloured, 0.7, 1.3),
        (draws.hue[jittered], -36, 36),
        (draws.sigma[draws.sigma > NO_BLUR], 0.5, 1.5),
    ):
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * len(values))
