from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from noisyssl.images import BadImage
from noisyssl.pipelines.samples import Samples


@pytest.fixture
def samples(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((4 + i, 5, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    return Samples(
        root=tmp_path,
        paths=["0.png", "1.png", "2.png"],
        classes=("a", "b"),
        labels=np.array([0, 1, 0]),
        true_labels=np.array([0, -1, 1]),
        splits=np.array(["train", "test", "val"]),
        groups=["p", "q", "2.png"],
        heights=np.array([4, 5, 6], np.int32),
        widths=np.array([5, 5, 5], np.int32),
        native=np.ones(3, bool),
        digests=["00" * 32, "11" * 32, "22" * 32],
    )


def test_rows(samples):
    assert len(samples) == 3
    assert samples.where("train", "val").tolist() == [0, 2]
    assert samples.image(1).shape == (5, 5, 3)
    assert samples.encoded(0).startswith(b"\x89PNG")


def test_columns_name_the_labels(samples):
    columns = samples.columns()
    assert columns["label"] == ["a", "b", "a"]
    assert columns["true_label"] == ["a", "", "b"]
    assert samples.unlabelled().columns()["label"] == ["", "", ""]


def test_a_file_that_is_gone_is_named(samples):
    (samples.root / "1.png").unlink()
    with pytest.raises(BadImage, match=r"1\.png: "):
        samples.image(1)
    with pytest.raises(BadImage, match=r"1\.png: "):
        samples.encoded(1)


def test_images_of_a_broadcast_array_are_contiguous(samples):
    grey = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5, 1)
    image = replace(samples, array=np.broadcast_to(grey, (3, 4, 5, 3))).image(2)
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image[..., 1], grey[2, ..., 0])


@pytest.mark.parametrize(
    "changed",
    [
        {"paths": ["0.png", "1.png", "3.png"]},
        {"classes": ("a", "c")},
        {"labels": np.array([0, 1, 1])},
        {"true_labels": np.array([0, -1, -1])},
        {"splits": np.array(["train", "test", "train"])},
        {"groups": ["p", "p", "2.png"]},
        {"groups": ["p\n", "q", "2.png"]},
        {"digests": ["00" * 32, "11" * 32, "23" * 32]},
    ],
)
def test_the_digest_covers_each_column(samples, changed):
    assert replace(samples, **changed).digest() != samples.digest()


def test_the_digest_does_not_depend_on_where_the_data_lie(samples):
    elsewhere = replace(samples, root=Path("/elsewhere"), splits=samples.splits.astype("<U9"))
    assert elsewhere.digest() == samples.digest()
