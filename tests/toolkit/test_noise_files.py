"""Noise from files: a whole matrix, or candidates with a rate."""

import numpy as np
import pytest

from noisyssl.errors import ConfigError
from noisyssl.noise import inject, is_recoverable, matrix, parse, realised

CLASSES = ("benign", "normal", "tumour")


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "noise.csv"
        path.write_text(text)
        return path

    return write


def test_a_matrix_is_read_in_the_order_of_the_datas_classes(file):
    path = file("true,tumour,benign,normal\nnormal,0.1,0.2,0.7\n\ntumour,0.8, 0.2,0\nbenign,0,0.9,0.1\n")
    found = matrix(parse(f"class:{path}"), CLASSES)
    np.testing.assert_allclose(found, [[0.9, 0.1, 0], [0.2, 0.7, 0.1], [0.2, 0, 0.8]])
    labels = np.random.default_rng(0).integers(0, 3, 30_000)
    done = realised(labels, inject(labels, found, seed=3), 3)
    np.testing.assert_allclose(done.matrix, found, atol=0.015)
    assert (done.matrix[found == 0] == 0).all()


def test_candidates_share_the_rate_and_a_class_without_any_stays(file):
    path = file("class,candidate\nbenign,normal\nbenign,tumour\ntumour,benign\ntumour,tumour\n")
    found = matrix(parse(f"class:{path}:0.4"), CLASSES)
    np.testing.assert_allclose(found, [[0.6, 0.2, 0.2], [0, 1, 0], [0.4, 0, 0.6]])
    assert is_recoverable(found)
    assert not is_recoverable(matrix(parse(f"class:{path}:0.6"), CLASSES))


MATRIX = "true,benign,normal,tumour\nbenign,1,0,0\nnormal,0,1,0\ntumour,0,0,1\n"


@pytest.mark.parametrize(
    ("text", "rate", "remedy"),
    [
        (
            MATRIX.replace("tumour,0,0,1", "tumour,0.5,0,0.4"),
            "",
            r"row of 'tumour' has 3 shares that sum to 0\.9",
        ),
        (
            MATRIX.replace("tumour,0,0,1", "tumour,0,1"),
            "",
            r"row of 'tumour' has 2 shares.*have 3 that sum to 1",
        ),
        (MATRIX.replace("tumour,0,0,1", "tumour,0,0,x"), "", r"holds 'x'; each cell is a share in \[0, 1\]"),
        (MATRIX.replace("tumour,0,0,1", "tumour,-0.5,0.5,1"), "", r"holds '-0\.5'; each cell is a share"),
        (MATRIX.replace("tumour,0,0,1\n", ""), "", r"first column lacks tumour; it must name each of benign"),
        (MATRIX.replace("tumour,0,0,1", "normal,0,0,1"), "", r"first column lacks tumour"),
        (MATRIX + "benign,1,0,0\n", "", r"first column has a class twice"),
        (MATRIX.replace("tumour", "tumor"), "", r"class 'tumor' is unknown;.*Did you mean 'tumour'\?"),
        ("", "", r"which is empty"),
        (MATRIX, ":0.3", r"candidates have class,candidate.*whole matrix, leave the rate out"),
        ("class,candidate\nbenign,other\n", ":0.3", r"class 'other' is unknown"),
        ("class,candidate\nbenign,normal,tumour\n", ":0.3", r"'benign,normal,tumour' is no pair"),
    ],
)
def test_a_file_that_does_not_fit_says_what_to_change(file, text, rate, remedy):
    path = file(text)
    with pytest.raises(ConfigError, match=remedy):
        matrix(parse(f"class:{path}{rate}"), CLASSES)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"names .*gone\.csv, which is no readable CSV: No such file"):
        matrix(parse(f"class:{tmp_path / 'gone.csv'}"), CLASSES)
