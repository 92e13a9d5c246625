"""The served graph shows what `geometry.evaluation_view` shows, whatever the shape of the image."""

import io

import numpy as np
import pytest
from PIL import Image

from noisyssl.geometry import evaluation_view
from noisyssl.images import decode
from noisyssl.pipelines.dali_serving import FITS, serialized, viewer

pytest.importorskip("nvidia.dali")
SHAPES = [(100, 133), (133, 100), (64, 64), (300, 201), (40, 57), (33, 250), (125, 330), (1, 90), (33, 33)]


def encoded(shape, kind="PNG"):
    """A pattern without symmetry: a shift by one pixel, a flip or exchanged colours are seen."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    waves = [127 + 80 * np.sin(x / 9 + c) * np.cos(y / 7) + 40 * (x > shape[1] / 3) for c in range(3)]
    file = io.BytesIO()
    Image.fromarray(np.clip(np.stack(waves, -1), 0, 255).astype(np.uint8)).save(file, kind, quality=90)
    return file.getvalue()


@pytest.mark.parametrize("size", [33, 64])  # 125 rows of 330 columns are 12.5 rows of 33: halves go to even
@pytest.mark.parametrize("fit", sorted(FITS))
def test_every_shape_is_seen_alike(fit, size):
    view = viewer(serialized(size, fit, batch=4))
    for shape in SHAPES:
        for kind in ("PNG", "JPEG"):
            data = encoded(shape, kind)
            expected = evaluation_view(decode(data), size, fit).astype(int)
            assert np.abs(view(data).astype(int) - expected).mean() < 0.5, (shape, kind)


def test_padding_of_a_file_changes_nothing():
    view, data = viewer(serialized(32, "crop")), encoded((50, 60), "JPEG")
    assert np.array_equal(view(data), view(data + bytes(1000)))


def test_a_broken_file_is_said_and_the_next_one_seen():
    view, data = viewer(serialized(32, "crop")), encoded((50, 60))
    before = view(data)
    assert view(b"no image at all") is None
    assert np.array_equal(view(data), before)
