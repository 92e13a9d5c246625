import numpy as np
import pytest
from PIL import Image

from noisyssl.cli import run
from noisyssl.pipelines.contact_sheet import GAP, LINE, MARGIN, chosen, contact_sheet, described
from noisyssl.pipelines.scan import open_samples
from noisyssl.views import View, pair

SIZE = 160


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NOISYSSL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    for i in range(60):
        path = tmp_path / "data" / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((SIZE, SIZE)).save(path)
    return tmp_path / "data"


def tile(sheet, column, row, lines, titles):
    """(SIZE, SIZE, 3) pixels of one tile below `lines` lines of text, right of `titles` titles."""
    left = MARGIN + column * (SIZE + GAP) + 2 * GAP * titles
    top = MARGIN + LINE * (lines + 2) + row * (SIZE + LINE + GAP) + LINE
    return np.asarray(sheet)[top : top + SIZE, left : left + SIZE]


def test_originals_stand_beside_what_training_will_see(data):
    samples = open_samples(data)
    views = (View(size=SIZE), View(size=SIZE, flip=1.0))
    sheet = contact_sheet(samples, [("view", views, 2)], title="t", size=SIZE, seed=3, rows=4)
    for row, index in enumerate(chosen(samples, 3, 4)):
        original = samples.image(int(index))
        expected = [original, original, original, original[:, ::-1], original[:, ::-1]]
        for column, pixels in enumerate(expected):
            shown = tile(sheet, column, row, 3, (column + 1) // 2)
            assert np.array_equal(shown, pixels), (row, column)


def test_draws_differ_between_epochs_and_repeat_with_the_seed(data):
    samples = open_samples(data)
    sheets = [
        contact_sheet(samples, [("v", pair(SIZE)[:1], 2)], title="t", size=SIZE, seed=s, rows=3)
        for s in (0, 0, 1)
    ]
    assert not np.array_equal(tile(sheets[0], 1, 0, 2, 1), tile(sheets[0], 2, 0, 2, 1))
    first, again, other = map(np.asarray, sheets)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_rows_take_the_classes_in_turn_from_the_training_split(data):
    samples = open_samples(data)
    rows = chosen(samples, 0, 7)
    assert len(set(rows)) == 7
    assert (samples.splits[rows] == "train").all()
    assert [samples.labels[i] for i in rows] == [0, 1, 2, 0, 1, 2, 0]
    assert len(chosen(samples, 0, 1000)) == len(samples.where("train"))


def test_the_sheet_says_what_differs_from_a_plain_resize():
    (line,) = described([("v", (View(size=32, flip=0.5, jpeg=0.25, quality=(40, 60)),) * 2, 1)])
    assert line == "v: 32 pixels, flip 0.5, jpeg 0.25, quality 40-60"


def test_the_command_writes_a_png(data, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    arguments = ["data", "views", str(data), "--size", "32", "--modality", "histology", "--out", str(out)]
    assert run([*arguments, "--images", "2"]) == 0
    assert "shows 2 training images" in capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 9 * 160
    assert run(arguments) == 2
    assert "already exists; name another file" in capsys.readouterr().err


def test_images_without_labels_are_shown_too(data, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in data.rglob("*.png"):
        (flat / path.name).write_bytes(path.read_bytes())
    out = str(tmp_path / "sheet.png")
    assert run(["data", "views", str(flat), "--size", "32", "--out", out, "--method", "rotation"]) == 0


def test_without_training_images_there_is_nothing_to_show(data, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("path,split\ndata/a/00.png,test\n")
    out = tmp_path / "sheet.png"
    assert run(["data", "views", str(tmp_path / "t.csv"), "--size", "32", "--out", str(out)]) == 5
    assert "has no train images" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--modality", "xrays"], "Did you mean 'xray'?"),
        (["data", "--method", "simcrl"], "Did you mean 'simclr'?"),
        (["data", "--out", "sheet.jpg"], "give it a name ending in .png"),
        (["data", "--out", "none/sheet.png"], "no folder none; create it first"),
        (["data", "--size", "4"], "--size"),
        (["data", "--images", "0"], "--images"),
        (["none"], "none does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(data, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(data.parent)
    assert run(["data", "views", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error: ") == 1
    assert not list(data.parent.glob("*.png"))
