"""A run's own rows, from data in which files broke, went away, changed or moved since."""

import csv
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from noisyssl.config import Config
from noisyssl.errors import DataError
from noisyssl.pipelines.pack import pack
from noisyssl.pipelines.reopen import reopen_samples
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.scan import open_samples


def paint(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def folders(tmp_path):
    """Class folders without splits, so that these are made."""
    for i in range(40):
        paint(tmp_path / "data" / "ab"[i % 2] / f"{i:02d}.png", i)
    return tmp_path / "data"


@pytest.fixture
def table(folders):
    """The same as a CSV with train and test, groups and some true labels; val is made."""
    rows = [
        [p.relative_to(folders).as_posix(), p.parent.name, "test" if i % 5 == 0 else "train", f"g{i}", true]
        for i, (p, true) in enumerate(
            zip(sorted(folders.rglob("*.png")), ["a", "", "b", ""] * 10, strict=True)
        )
    ]
    with (folders / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split", "group", "true_label"], *rows])
    return folders / "t.csv"


def started(source, tmp_path, **how) -> tuple[Run, object]:
    samples = open_samples(source, **how)
    return Run.create(
        tmp_path / "run", Config(), "train" if samples.classes else "pretrain", samples
    ), samples


@pytest.mark.parametrize("how", [{}, {"labelled": False}, {"seed": 5}])
@pytest.mark.parametrize("kind", ["folders", "table", "pack"])
def test_untouched_data_comes_back_whole(folders, table, tmp_path, kind, how):
    source = {"folders": folders, "table": table}.get(kind) or pack(open_samples(table), tmp_path / "pack")
    run, samples = started(source, tmp_path, **how)
    again = reopen_samples(run, source)
    if how.get("labelled") is False:  # a pretraining's: the labels that its probe looks at are the source's
        labelled = open_samples(source)
        assert again.classes == labelled.classes
        assert again.labels.tolist() == labelled.labels.tolist()
        again = again.unlabelled()
    assert again.digest() == samples.digest()
    for name in ("heights", "widths", "native", "splits", "labels"):
        np.testing.assert_array_equal(getattr(again, name), getattr(samples, name))
    np.testing.assert_array_equal(again.image(7), samples.image(7))


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"?")])
@pytest.mark.parametrize("kind", ["folders", "table"])
def test_a_lost_file_keeps_its_row_and_all_others_theirs(folders, table, tmp_path, kind, spoil):
    source = {"folders": folders, "table": table}[kind]
    run, samples = started(source, tmp_path)
    for row in (0, 11, 39):  # of every split, the first and the last
        spoil(samples.file(row))
    with pytest.raises(DataError, match=rf"3 of the 40 files .* first: {samples.paths[0]}: .*--quarantine"):
        reopen_samples(run, source)
    again = reopen_samples(run, source, quarantine=True)
    assert again.digest() == samples.digest()
    assert "3 of the 40 files" in again.notes[-1]
    kept = np.setdiff1d(np.arange(40), [0, 11, 39])
    np.testing.assert_array_equal(again.native[kept], samples.native[kept])
    assert not again.native[[0, 11, 39]].any()


def test_a_class_that_is_gone_is_still_a_class(folders, tmp_path):
    run, samples = started(folders, tmp_path)
    shutil.rmtree(folders / "b")
    assert reopen_samples(run, folders, quarantine=True).digest() == samples.digest()


def test_what_the_run_left_out_from_the_start_is_no_new_file(folders, tmp_path):
    (folders / "a" / "broken.png").write_bytes(b"?")
    run, samples = started(folders, tmp_path, quarantine=True)
    assert reopen_samples(run, folders, quarantine=True).digest() == samples.digest()
    paint(folders / "a" / "broken.png", 99)
    with pytest.raises(DataError, match=r"a/broken\.png is new"):
        reopen_samples(run, folders, quarantine=True)


def edited(name, value, row=3):
    def edit(folder):
        with (folder / "t.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        rows[row][header.index(name)] = value
        with (folder / "t.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])

    return edit


def shortened(folder):
    lines = (folder / "t.csv").read_text().splitlines(keepends=True)
    (folder / "t.csv").write_text("".join(lines[:-1]))


@pytest.mark.parametrize("quarantine", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: paint(folder / "a" / "06.png", 77), r"a/06\.png is another image"),
        (shortened, r"b/39\.png is not listed any more"),
        (edited("label", "b"), r"a/06\.png has label 'b' instead of 'a'"),
        (edited("split", "test"), r"a/06\.png has split 'test' instead of 'train'"),
        (edited("group", "g9"), r"a/06\.png has group 'g9' instead of 'g3'"),
        (edited("true_label", "b"), r"a/06\.png has true_label 'b' instead of ''"),
    ],
)
def test_other_data_is_refused(table, tmp_path, change, message, quarantine):
    run, _ = started(table, tmp_path)
    change(table.parent)
    with pytest.raises(DataError, match=message):
        reopen_samples(run, table, quarantine=quarantine)


def test_a_split_that_was_made_came_from_training_samples(table, tmp_path):
    run, samples = started(table, tmp_path)
    made = int(samples.where("val")[0])
    edited("split", "test", made)(table.parent)
    with pytest.raises(DataError, match="has split 'test' instead of 'train'"):
        reopen_samples(run, table)


def test_a_new_file_and_another_set_are_refused(folders, tmp_path):
    run, _ = started(folders, tmp_path)
    paint(folders / "b" / "new.png", 50)
    with pytest.raises(DataError, match=r"b/new\.png is new"):
        reopen_samples(run, folders, quarantine=True)


def test_moved_data_is_the_same_data(table, tmp_path):
    run, samples = started(table, tmp_path)
    moved = shutil.move(table.parent, tmp_path / "elsewhere")
    again = reopen_samples(run, tmp_path / "elsewhere" / "t.csv")
    assert again.digest() == samples.digest()
    assert again.root == moved


def test_a_changed_table_of_the_run_is_noticed(folders, tmp_path):
    run, _ = started(folders, tmp_path)
    table = run.folder / "samples.csv"
    table.write_text(table.read_text().replace(",train,", ",val,", 1))
    with pytest.raises(DataError, match="digest differs"):
        reopen_samples(run, folders)


def test_where_the_data_is_and_what_is_accepted_may_change_and_nothing_else(folders, tmp_path):
    run, _ = started(folders, tmp_path)
    own = run.config()
    other = replace(own, data=replace(own.data, path="/elsewhere", quarantine=True))
    run.must_match(other)
    run.adopt(replace(other, seed=9))
    assert run.config() == other
