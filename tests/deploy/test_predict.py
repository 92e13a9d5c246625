"""The stream, against a runtime whose logits are the mean colour: red, green or blue."""

import os
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from noisyssl.deploy import predict as module
from noisyssl.deploy.bundle import Geometry
from noisyssl.deploy.predict import predict, sources
from noisyssl.errors import ConfigError, DataError
from noisyssl.pipelines.sources import read_source
from noisyssl.pipelines.walk import images_below

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


class Runtime:
    manifest = SimpleNamespace(
        geometry=Geometry(size=8, fit="crop"), classes=tuple(COLOURS), temperature=lambda: 1.0
    )
    device = "cpu"

    def __init__(self):
        self.batches = []

    def logits(self, images):
        assert images.shape[1:] == (8, 8, 3)
        self.batches.append(len(images))
        return images.mean(axis=(1, 2), dtype=np.float32)


@pytest.fixture
def folder(tmp_path):
    """Seven images in two folders, one of them broken, and things that are no image."""
    (tmp_path / "b").mkdir()
    for i, name in enumerate(["a.png", "c.png", "d.JPG", "b/a.png", "b/z.bmp", "b/q.tif"]):
        Image.new("RGB", (10 + i, 12), list(COLOURS.values())[i % 3]).save(tmp_path / name)
    (tmp_path / "b" / "broken.png").write_bytes(b"<html>")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    return tmp_path


def names(items):
    return [path.rsplit("/", 1)[1] for path, _ in items]


def test_a_folder_gives_its_images_by_name(folder):
    assert names(sources([folder])) == ["a.png", "a.png", "broken.png", "q.tif", "z.bmp", "c.png", "d.JPG"]
    assert names(sources([folder / "c.png", folder / "b", folder / "a.png"])) == [
        "c.png", "a.png", "broken.png", "q.tif", "z.bmp", "a.png",
    ]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_rows_come_in_order_whatever_the_batch(folder, batch):
    runtime = Runtime()
    items = list(sources([folder]))
    rows = list(predict(runtime, items, batch=batch, threads=3))
    assert [row.path for row in rows] == [path for path, _ in items]
    assert runtime.batches == [n for n in runtime.batches if n <= batch]
    assert sum(runtime.batches) == 6
    for row, (path, file) in zip(rows, items, strict=True):
        if path.endswith("broken.png"):
            assert row.probabilities is None
            assert "HTML" in row.error
            assert path not in row.error
        else:
            assert row.error is None
            assert row.probabilities.sum() == pytest.approx(1)
            with Image.open(file) as image:
                assert row.probabilities.argmax() == np.argmax(np.asarray(image)[6, 5])


def test_at_most_three_batches_are_in_memory(monkeypatch):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield f"{taken}.png", None

    monkeypatch.setattr(module, "_view", lambda *_: np.zeros((8, 8, 3), np.uint8))
    runtime = Runtime()
    rows = predict(runtime, endless(), batch=4, threads=2)
    for served in range(1, 101):
        next(rows)
        assert taken <= served + 3 * 4  # one batch in the runtime, two ahead
    assert set(runtime.batches) == {4}
    threads = threading.active_count()
    rows.close()
    assert threading.active_count() == threads - 2


def test_nothing_good_in_a_batch_asks_the_runtime_nothing(tmp_path):
    runtime = Runtime()
    rows = list(predict(runtime, [("x.png", tmp_path / "x.png")] * 5, batch=2))
    assert [row.error for row in rows] == ["does not exist"] * 5
    assert runtime.batches == []


def test_a_csv_is_read_beside_itself_and_stays_there(folder):
    table = folder / "b" / "list.csv"
    table.write_bytes(
        b"\xef\xbb\xbflabel,path\r\nx,a.png\r\nx,../a.png\r\nx,x/../../a.png\r\nx,\r\nx,/etc/hostname\r\nx,z.bmp\r\nx\r\n"
    )
    rows = list(predict(Runtime(), sources([table]), batch=3))
    outside = "leads out of the folder of its CSV"
    assert [row.error for row in rows] == [None, outside, outside, outside, outside, None, outside]
    assert [row.path for row in rows][:2] == ["a.png", "../a.png"]


def test_a_folder_that_cannot_be_listed_is_one_row_and_the_rest_is_served(folder, monkeypatch):
    real = os.scandir

    def scandir(path):
        if Path(path) in refused:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    whole, refused = [path for path, _ in sources([folder])], [folder / "b"]
    monkeypatch.setattr("noisyssl.deploy.predict.os.scandir", scandir)
    rows = list(predict(Runtime(), sources([folder]), batch=3))
    inside = [path for path in whole if path.startswith(str(folder / "b") + "/")]
    assert inside, "the folder holds images"
    (refusal,) = [row for row in rows if row.path not in whole]
    assert (refusal.path, refusal.error) == (str(folder / "b"), "cannot be listed (Permission denied)")
    assert {row.path for row in rows} == {*whole, str(folder / "b")} - {*inside}
    refused.append(folder)
    with pytest.raises(DataError, match="cannot be listed"):
        sources([folder])


def test_a_table_names_what_training_would_take(folder):
    """The images of a table often lie elsewhere, behind a link beside it."""
    (folder / "set").mkdir()
    (folder / "set" / "im").symlink_to(folder / "b")
    (folder / "set" / "one.png").symlink_to(folder / "a.png")
    inside = ["im/a.png", "one.png", "./im//z.bmp", "x/../one.png", str(folder / "set" / "one.png")]
    outside = ["../a.png", "im/../../a.png", "/etc/hostname", ".", "/"]
    table = folder / "set" / "list.csv"
    for name in [*inside, *outside]:
        table.write_text(f"path\n{name}\n")
        (row,) = predict(Runtime(), sources([table]))
        assert row.error == (None if name in inside else "leads out of the folder of its CSV")
        if name in inside:
            assert len(read_source(table).paths) == 1
        else:
            with pytest.raises(DataError, match="path"):
                read_source(table)


def test_a_folder_is_walked_as_training_walks_it(folder):
    elsewhere = folder / "elsewhere"
    for name in ("linked/1.png", "Hand/images/2.png", "Hand/Masks/2.png", "Hand/lung masks/deep/2.png",
                 "__MACOSX/3.png", ".trash/4.png", "masks/5.png", "6.png/inside.png"):  # fmt: skip
        (elsewhere / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / "set" / name).write_bytes((folder / "a.png").read_bytes())
    (elsewhere / "set" / "linked").rename(elsewhere / "away")
    (elsewhere / "set" / "link").symlink_to(elsewhere / "away")
    (elsewhere / "set" / "file.png").symlink_to(folder / "a.png")
    (elsewhere / "set" / "self").symlink_to("self")
    left_out, root = Counter(), elsewhere / "set"
    found = [str(Path(path).relative_to(root)) for path, _ in sources([root], left_out)]
    assert sorted(found) == sorted(images_below(str(root), "", Counter()))
    assert found == ["6.png", "Hand/images/2.png", "file.png", "link/1.png", "masks/5.png"]
    assert left_out == {"masks": 2}
    (elsewhere / "away" / "back").symlink_to(root)
    rows = {row.path: row.error for row in predict(Runtime(), sources([root]))}
    assert rows.pop(str(root / "link" / "back")) == "leads back, by a link, to a folder above it"
    assert len(rows) == len(found)


def test_columns_are_named_as_in_training_data(folder):
    """In any case, with spaces around names and cells, blank lines between the rows."""
    (folder / "list.csv").write_text("Label, PATH\n\nx, a.png \n\n")
    assert [path for path, _ in sources([folder / "list.csv"])] == ["a.png"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\na.png,x\n", "has columns file, label; it must have 'path'"),
        ("path;label\na.png;x\n", "Separate columns by commas"),
        ("", "has columns none"),
        ("path\n", "has no rows; list one image per row"),
        ('path\n"a.png\n', "is no UTF-8 CSV"),
        ("path\n\udce9.png\n", "is no UTF-8 CSV"),
    ],
)
def test_a_csv_that_is_none_is_one_line(tmp_path, text, words):
    (tmp_path / "list.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=words) as caught:
        list(sources([tmp_path / "list.csv"]))
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_empty_is_said_before_the_first_row(folder):
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"nowhere does not exist"):
        sources([folder, folder / "nowhere"])
    with pytest.raises(DataError, match="empty holds no image; supported endings are"):
        sources([folder, folder / "empty"])


@pytest.mark.filterwarnings(r"ignore:::pydicom\.")
def test_dicom_files_are_found_by_content_and_answered_as_their_twins(tmp_path):
    pytest.importorskip("pydicom", reason="needs noisyssl[dicom]")
    from noisyssl.benchmarks import dicom_phantoms as phantoms

    stored = phantoms.picture(12)
    window = {"WindowWidth": 2001}
    seen = phantoms.dataset(stored, 12, WindowCenter=1500, **window)
    twin = phantoms.dataset(4095 - stored, 12, kind="MONOCHROME1", WindowCenter=4096 - 1500, **window)
    kinds = (seen, phantoms.RLELossless), (twin, phantoms.JPEG2000Lossless), (seen, phantoms.JPEGLSLossless)
    for number, (d, syntax) in enumerate(kinds):
        (tmp_path / f"1.2.3.{number}").write_bytes(phantoms.file(d, syntax))
    (tmp_path / "report").write_bytes(b"no image")
    (tmp_path / "z.dcm").write_bytes(phantoms.file(seen)[:900])
    rows = list(predict(Runtime(), sources([tmp_path])))
    assert [Path(row.path).name for row in rows] == ["1.2.3.0", "1.2.3.1", "1.2.3.2", "z.dcm"]
    assert rows[3].error.startswith("is a truncated DICOM file")
    assert len({tuple(row.probabilities) for row in rows[:3]}) == 1
