import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisyssl.errors import DataError
from noisyssl.pipelines.splits import find_units, identical, make_splits


def data(seed, groups=60, classes=3, mixed=False, most=6):
    """Group names, labels and unique pixel digests of groups of 1 to `most` images."""
    rng = np.random.default_rng(seed)
    names, labels = [], []
    for number in range(groups):
        count = int(rng.integers(1, most + 1))
        names += [f"p{number:03d}"] * count
        labels += rng.integers(0, classes, count).tolist() if mixed else [number % classes] * count
    return names, np.array(labels), rng.integers(0, 256, (len(names), 32), dtype=np.uint8)


def parts_of(units, splits):
    return {unit: set(splits[units == unit].tolist()) for unit in np.unique(units).tolist()}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(3, 40),
    st.integers(2, 5),
    st.booleans(),
    st.sampled_from(["", "test", "val"]),
)
def test_no_unit_is_divided_and_every_class_keeps_a_training_group(seed, groups, classes, mixed, have):
    names, labels, pixels = data(seed, groups * classes, classes, mixed)
    pixels[[0, len(names) // 2]] = pixels[-1]  # one image in up to three groups
    given = None
    if have:
        given = np.where([int(name[1:]) % 5 == 0 for name in names], have, "train")
    splits = make_splits(names, labels, given, pixels, seed=seed)
    moved = np.ones(len(names), bool) if given is None else given == "train"
    units = find_units([n for n, m in zip(names, moved, strict=True) if m], pixels[moved])
    assert all(len(parts) == 1 for parts in parts_of(units, splits[moved]).values())
    assert {"train", "val", "test"} == set(splits)
    assert set(labels[splits == "train"]) == set(labels[moved])
    if given is not None:
        assert (splits[~moved] == have).all()
        assert not (splits[moved] == have).any()


def test_fifteen_percent_of_the_training_groups_each():
    names, labels, pixels = data(0, 200, 4)
    splits = make_splits(names, labels, None, pixels, seed=3)
    units = find_units(names, pixels)
    counts = {part: len(np.unique(units[splits == part])) for part in ("train", "val", "test")}
    assert counts == {"train": 140, "val": 30, "test": 30}
    for label in range(4):  # 50 groups of each class: 7 or 8 of them go into each part
        for part in ("val", "test"):
            assert 6 <= len(np.unique(units[(splits == part) & (labels == label)])) <= 9


def test_given_test_then_validation_is_fifteen_percent_of_what_trains():
    names, labels, pixels = data(1, 100, 2)
    given = np.where([name < "p040" for name in names], "test", "train")
    splits = make_splits(names, labels, given, pixels)
    assert len(np.unique(np.array(names)[splits == "val"])) == 9  # of 60
    np.testing.assert_array_equal(splits == "test", given == "test")


def test_rare_classes_reach_every_part():
    names = [f"common{i}" for i in range(300)] + [f"rare{i}" for i in range(3)] + ["single"]
    labels = np.array([0] * 300 + [1] * 3 + [2])
    for seed in range(20):
        splits = make_splits(names, labels, seed=seed)
        assert sorted(splits[labels == 1]) == ["test", "train", "val"]
        assert splits[-1] == "train"


def test_the_order_of_the_samples_plays_no_role():
    names, labels, pixels = data(2, mixed=True)
    pixels[5] = pixels[40]
    splits = make_splits(names, labels, None, pixels, seed=7)
    order = np.random.default_rng(0).permutation(len(names))
    again = make_splits([names[i] for i in order], labels[order], None, pixels[order], seed=7)
    np.testing.assert_array_equal(again, splits[order])


def test_the_seed_matters():
    names, labels, pixels = data(3)
    one, two = (make_splits(names, labels, None, pixels, seed=seed) for seed in (0, 1))
    assert (one != two).any()


def test_complete_splits_stay():
    given = np.array(["train", "val", "test", "train"])
    np.testing.assert_array_equal(make_splits(list("aaab"), np.array([0, 0, 0, 1]), given), given)


def test_too_few_groups():
    with pytest.raises(DataError, match="form 2 groups; 3 are needed to make the missing test and val"):
        make_splits(list("aabb"), np.array([0, 0, 1, 1]))
    with pytest.raises(DataError, match="no group is left for test: every class needs a training group"):
        make_splits(list("abcd"), np.array([0, 1, 2, 3]))


def test_units_are_connected_components():
    groups = ["a", "b", "c", "d", "d", "e"]
    pixels = np.arange(6, dtype=np.uint8)[:, None].repeat(32, 1)
    pixels[4] = pixels[0]  # a - d
    pixels[5] = pixels[2]  # c - e
    assert find_units(groups, pixels).tolist() == [0, 1, 2, 0, 0, 2]


@pytest.mark.parametrize("places", [[0, 1, 2, 3, 4], [0, 7, 8, 20, 31]])  # first eight bytes decide, or not
def test_identical_is_what_a_dictionary_finds(places):
    digests = np.zeros((300, 32), np.uint8)
    digests[:, places] = np.random.default_rng(0).integers(0, 2, (300, 5), dtype=np.uint8)  # 32 kinds
    sets: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        sets.setdefault(digest.tobytes(), []).append(row)
    assert [rows.tolist() for rows in identical(digests)] == list(sets.values())


def test_identical_compares_whole_digests():
    digests = np.zeros((5, 32), np.uint8)
    digests[1, 31] = digests[3, 31] = 1  # the first bytes are all equal
    digests[4] = 9
    assert [rows.tolist() for rows in identical(digests)] == [[0, 2], [1, 3]]
    assert identical(digests[[0, 1, 4]]) == []
    assert identical(np.zeros((0, 32), np.uint8)) == []
