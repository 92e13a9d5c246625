from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from noisyssl.pipelines.findings import Identical, identical_images, report_on, unmeasured
from noisyssl.pipelines.samples import SPLITS, Samples


def drawn(seed: int, count: int, kinds: int) -> tuple[Samples, np.ndarray]:
    """Samples with drawn labels and splits, and digests of which at most `kinds` differ."""
    rng = np.random.default_rng(seed)
    samples = Samples(
        root=Path(),
        paths=[f"{i}.png" for i in range(count)],
        classes=("a", "b"),
        labels=rng.integers(-1, 2, count),
        splits=rng.choice(SPLITS, count, p=(0.8, 0.1, 0.1)).astype("<U5"),
        groups=[f"{i}.png" for i in range(count)],
        heights=np.ones(count, np.int32),
        widths=np.ones(count, np.int32),
        native=np.ones(count, bool),
        digests=[""] * count,
    )
    return samples, rng.integers(0, 256, (kinds, 32), dtype=np.uint8)[rng.integers(0, kinds, count)]


def one_set_after_another(samples: Samples, digests: np.ndarray) -> Identical:
    """The same by a dictionary and a loop."""
    members: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        members.setdefault(digest.tobytes(), []).append(row)
    sets = [rows for rows in members.values() if len(rows) > 1]
    splits = samples.splits.tolist()
    across = [rows for rows in sets if len({splits[row] for row in rows}) > 1]
    first = None
    if across:
        one = across[0][0]
        other = next(row for row in across[0] if splits[row] != splits[one])
        first = f"{one}.png ({splits[one]})", f"{other}.png ({splits[other]})"
    return Identical(
        sets=tuple(tuple(samples.paths[row] for row in rows) for rows in sets),
        across=len(across),
        contradicting=sum(len({int(samples.labels[row]) for row in rows}) > 1 for rows in sets),
        first_across=first,
    )


@pytest.mark.parametrize(("count", "kinds"), [(0, 1), (1, 1), (40, 1), (40, 3), (200, 150), (60, 10_000)])
def test_sets_of_identical_images_are_what_a_loop_finds(count, kinds):
    for seed in range(6):
        samples, digests = drawn(seed, count, kinds)
        assert identical_images(samples, digests) == one_set_after_another(samples, digests)


def test_groups_that_are_the_paths_cross_nothing_and_others_are_found():
    samples, digests = drawn(0, 40, 10_000)
    assert report_on(Path("x"), samples, digests, []).crossing_groups == ()
    samples.groups[:2] = ["p", "p"]
    samples.splits[:2] = ["train", "test"]
    assert report_on(Path("x"), samples, digests, []).crossing_groups == (("p", ("train", "test")),)


def test_a_class_that_nothing_measures_is_named():
    samples, digests = drawn(0, 60, 10_000)
    labels = np.where(samples.splits == "test", 0, np.arange(60) % 2)
    some = replace(samples, labels=labels)
    assert unmeasured(some) == ["class b has no test images; nothing measures it."]
    assert report_on(Path("x"), some, digests, []).notes == (
        "class b has no test images; nothing measures it.",
    )
    neither = replace(some, classes=("a", "b", "c"), labels=np.where(samples.splits == "train", labels, 0))
    assert unmeasured(neither) == [
        "classes b, c have no validation images; nothing measures them there.",
        "classes b, c have no test images; nothing measures them.",
    ]
    true = np.where(samples.splits == "test", np.arange(60) % 2, -1)  # it is measured on the true ones
    assert not unmeasured(replace(some, true_labels=true))
    assert not unmeasured(replace(some, splits=np.full(60, "train")))
    assert not unmeasured(some.unlabelled())
