import json

import numpy as np
import pytest

from noisyssl import noise as noises
from noisyssl.errors import ConfigError
from noisyssl.noise import Noise, inject, is_recoverable, parse, realised

CLASSES = 4
NAMES = ("a", "b", "c", "d", "e", "f", "g", "h", "i")


def matrix(noise, classes):
    return noises.matrix(noise, NAMES[:classes])


LABELS = np.random.default_rng(0).choice(CLASSES, 3000, p=(0.4, 0.3, 0.2, 0.1))


def test_parse_reads_kind_and_rate_and_str_writes_them_back():
    assert parse("symmetric:0.4") == Noise("symmetric", 0.4)
    assert parse("symmetric:0") == Noise("symmetric", 0.0)
    assert parse("none") == Noise("none", 0.0)
    assert parse("class:a:b.csv") == Noise("class", None, "a:b.csv")
    assert parse("class:a.csv:0.3") == Noise("class", 0.3, "a.csv")
    assert parse("instance:0.3") == Noise("instance", 0.3)
    assert parse("instance:0.3:runs/pre") == Noise("instance", 0.3, "runs/pre")
    assert parse("column:given") == Noise("column", None, "given")
    for spec in (
        "none", "symmetric:0.4", "inclusive:0.5", "pair:0.3", "class:m.csv", "class:c.csv:0.2",
        "instance:0.3", "instance:0.3:runs/pre", "column:given",
    ):  # fmt: skip
        assert str(parse(spec)) == spec


@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        ("symetric:0.4", r"train\.noise is 'symetric:0\.4'; .* Did you mean 'symmetric'\?"),
        ("0.4", r"write none or KIND:RATE"),
        ("", r"write none or KIND:RATE"),
        ("symmetric:1.2", r"train\.noise is 'symmetric:1\.2'; the rate must be a number in \[0, 1\)"),
        ("symmetric:1", r"\[0, 1\)"),
        ("symmetric:-0.1", r"\[0, 1\)"),
        ("symmetric:nan", r"\[0, 1\)"),
        ("symmetric:", r"Write for example symmetric:0\.4"),
        ("symmetric", r"Write for example symmetric:0\.4"),
        ("symmetric:40%", r"Write for example symmetric:0\.4"),
        ("none:0.4", r"none takes no rate"),
        ("pair:2", r"must be a number in \[0, 1\)\. Write for example pair:0\.3"),
        ("instance", r"Write for example instance:0\.3 or instance:0\.3:RUN"),
        ("instance:runs/pre", r"Write for example instance:0\.3"),
        ("class", r"name a file\. Write class:MATRIX\.csv"),
        ("class::0.3", r"name a file"),
        ("class:m.csv:1.5", r"must be a number in \[0, 1\)"),
        ("column:", r"name a column of labels\. Write for example column:given"),
        ("column:path", r"name a column of labels"),
        ("instance:0.001", r"the rate of instance noise is 0 or in \[0\.01, 0\.99\]"),
    ],
)
def test_parse_refuses_with_the_remedy(spec, remedy):
    with pytest.raises(ConfigError, match=remedy):
        parse(spec)


def test_matrix_rows_are_given_knowing_true():
    expected = [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]]
    np.testing.assert_allclose(matrix(Noise("symmetric", 0.4), 3), expected)
    np.testing.assert_array_equal(matrix(Noise(), 3), np.eye(3))
    with pytest.raises(ConfigError, match="noise needs two or more"):
        matrix(Noise("symmetric", 0.4), 1)
    np.testing.assert_array_equal(matrix(Noise(), 1), [[1.0]])


def test_the_other_matrices_are_their_definitions():
    np.testing.assert_allclose(matrix(Noise("pair", 0.3), 3), [[0.7, 0.3, 0], [0, 0.7, 0.3], [0.3, 0, 0.7]])
    inclusive = matrix(Noise("inclusive", 0.6), 3)
    np.testing.assert_allclose(inclusive, [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    assert 1 - inclusive[0, 0] == pytest.approx(0.6 * (1 - 1 / 3))  # of 0.6 asked, 0.4 is wrong
    assert not is_recoverable(matrix(Noise("pair", 0.5), 3))
    assert is_recoverable(matrix(Noise("pair", 0.49), 3))
    assert is_recoverable(matrix(Noise("inclusive", 0.99), 9))


@pytest.mark.parametrize("spec", ["symmetric:0.5", "pair:0.3", "inclusive:0.8", "symmetric:0"])
def test_exclusive_noise_never_keeps_a_flipped_class_and_pairs_go_to_the_next(spec):
    noise = parse(spec)
    out = inject(LABELS, matrix(noise, CLASSES), seed=1)
    flipped = out != LABELS
    expected = noise.rate * (1 - 1 / CLASSES) if noise.kind == "inclusive" else noise.rate
    assert flipped.mean() == pytest.approx(expected, abs=0.03)
    if noise.kind == "pair":
        np.testing.assert_array_equal(out[flipped], (LABELS[flipped] + 1) % CLASSES)


@pytest.mark.parametrize("spec", ["symmetric:0.4", "pair:0.3", "inclusive:0.6"])
def test_realised_matrix_lies_within_three_standard_errors_over_100_seeds(spec):
    noise = parse(spec)
    expected, support = matrix(noise, CLASSES), np.bincount(LABELS)[:, None]
    error = np.sqrt(expected * (1 - expected) / support)
    found = [realised(LABELS, inject(LABELS, matrix(noise, CLASSES), seed), CLASSES) for seed in range(100)]
    matrices, rates = np.stack([one.matrix for one in found]), np.array([one.rate for one in found])
    possible = expected > 0
    assert (matrices[:, ~possible] == 0).all()
    assert (np.abs(matrices - expected)[:, possible] < 3 * error[possible]).mean() > 0.985
    assert (np.abs(matrices.mean(axis=0) - expected) <= 3 * error / 10).all()
    rate = 1 - expected[0, 0]  # of every class alike
    assert (np.abs(rates - rate) < 3 * np.sqrt(rate * (1 - rate) / len(LABELS))).mean() > 0.97
    spread = (matrices.std(axis=0)[possible]) / error[possible]
    assert ((spread > 0.7) & (spread < 1.3)).all()  # seeds are independent


def test_a_draw_depends_on_seed_and_row_only():
    noise = Noise("symmetric", 0.4)
    full = inject(LABELS, matrix(noise, CLASSES), seed=5)
    np.testing.assert_array_equal(
        inject(LABELS[:100], matrix(noise, CLASSES), seed=5), full[:100]
    )  # rows added
    kept = np.arange(0, len(LABELS), 3)
    some = inject(LABELS, matrix(noise, CLASSES), seed=5, rows=kept[::-1])  # rows left out, any order
    np.testing.assert_array_equal(some[kept], full[kept])
    others = np.setdiff1d(np.arange(len(LABELS)), kept)
    np.testing.assert_array_equal(some[others], LABELS[others])
    assert (inject(LABELS, matrix(noise, CLASSES), seed=6) != full).any()
    assert (inject(LABELS, matrix(noise, CLASSES), seed=5 + 2**40) != full).any()
    assert (inject(LABELS, matrix(noise, CLASSES), seed=-1) != LABELS).mean() > 0.3


def test_rows_without_a_label_and_the_input_stay_as_they_are():
    labels = LABELS.copy()
    labels[::7] = -1
    before = labels.copy()
    out = inject(labels, matrix(Noise("symmetric", 0.9), CLASSES), seed=0)
    np.testing.assert_array_equal(labels, before)
    assert (out[::7] == -1).all()
    assert realised(labels, out, CLASSES).rate == pytest.approx((out != labels).sum() / (labels >= 0).sum())
    np.testing.assert_array_equal(inject(labels, matrix(Noise(), CLASSES), seed=0), labels)


def test_a_higher_rate_keeps_the_flips_of_a_lower_one():
    low, high = (inject(LABELS, matrix(Noise("symmetric", rate), CLASSES), seed=0) for rate in (0.2, 0.6))
    flipped = low != LABELS
    np.testing.assert_array_equal(high[flipped], low[flipped])


def test_realised_counts_what_happened():
    found = realised(np.array([0, 0, 0, 1, -1, 1]), np.array([0, 2, 0, 1, -1, 0]), 3)
    assert found.rate == pytest.approx(2 / 5)
    np.testing.assert_allclose(found.matrix[:2], [[2 / 3, 0, 1 / 3], [0.5, 0.5, 0]])
    assert found.flips == ((1, 0, 2), (5, 1, 0))
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["matrix"][2] == [None, None, None]
    assert plain["flips"][0] == {"index": 1, "from": 0, "to": 2}
    only = realised(np.array([0, 0, 0, 1, -1, 1]), np.array([0, 2, 0, 1, -1, 0]), 3, rows=np.array([5, 4, 0]))
    assert (only.rate, only.flips) == (0.5, ((5, 1, 0),))
    assert realised(np.array([-1]), np.array([-1]), 3).to_json()["rate"] is None


def test_recoverable_up_to_but_not_at_the_bound():
    for classes in (2, 3, 9):
        bound = (classes - 1) / classes
        assert is_recoverable(matrix(Noise("symmetric", bound - 1e-6), classes))
        assert not is_recoverable(matrix(Noise("symmetric", bound), classes))
        assert not is_recoverable(matrix(Noise("symmetric", bound + 1e-6), classes))
    assert is_recoverable(matrix(Noise(), 3))
