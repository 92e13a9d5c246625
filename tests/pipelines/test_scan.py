import csv
import hashlib
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from noisyssl.benchmarks.image_zoo import REASONS, bad, good
from noisyssl.errors import DataError, MachineError
from noisyssl.pipelines import decoding
from noisyssl.pipelines.decoding import cache_folder
from noisyssl.pipelines.scan import check, open_samples


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NOISYSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def draw(path, seed, size=6):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def folders(tmp_path):
    """20 images of each of two classes."""
    for i in range(40):
        draw(tmp_path / "data" / "ab"[i % 2] / f"{i:02d}.png", i)
    return tmp_path / "data"


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that were decoded."""
    seen = []
    examine = decoding._examine
    monkeypatch.setattr(
        decoding, "_examine", lambda name: seen.append(os.path.basename(name)) or examine(name)
    )
    return seen


def test_samples_of_class_folders(folders):
    samples = open_samples(folders)
    assert samples.classes == ("a", "b")
    assert samples.labels.tolist() == [0] * 20 + [1] * 20
    assert [len(samples.where(split)) for split in ("train", "val", "test")] == [28, 6, 6]
    assert samples.groups == samples.paths
    assert set(samples.widths.tolist()) == {6}
    assert samples.native.all()
    expected = np.array(Image.open(folders / samples.paths[7]))
    np.testing.assert_array_equal(samples.image(7), expected)
    assert "test was made from 6 training groups, 6 images (seed 0)." in samples.notes


def test_every_broken_kind_is_found_and_no_good_one(tmp_path):
    kinds = good(tmp_path / "good", 130, 48)
    broken = bad(tmp_path / "bad", 2)
    assert check(tmp_path / "good").bad == ()
    assert open_samples(tmp_path / "good").paths == sorted(kinds)
    found = dict(check(tmp_path / "bad").bad)
    assert found.keys() == broken.keys()
    wrong = {path: found[path] for path, kind in broken.items() if REASONS[kind] not in found[path]}
    assert wrong == {}


def test_bad_files_stop_or_get_no_row(folders):
    (folders / "a" / "06.png").write_bytes(b"")
    (folders / "b" / "link.png").symlink_to("nowhere")
    with pytest.raises(
        DataError, match=r"2 of 41 files .*a/06\.png: is empty; b/link\.png: is a link .*--quarantine"
    ):
        open_samples(folders)
    samples = open_samples(folders, quarantine=True)
    assert len(samples) == 39
    assert "a/06.png" not in samples.paths
    assert [path for path, _ in samples.quarantined] == ["a/06.png", "b/link.png"]
    assert "2 of 41 files are left out, the first: a/06.png (is empty)." in samples.notes
    contents = [(folders / path).read_bytes() for path in samples.paths]
    assert samples.digests == [hashlib.sha256(data).hexdigest() for data in contents]


def test_a_class_whose_files_are_all_bad_is_no_silent_loss(folders):
    (folders / "c").mkdir()
    for name in ("1.png", "2.png"):
        (folders / "c" / name).write_bytes(b"")
    what = r"class 'c' has no good image: its files, 2 in all, are bad, the first: c/1\.png \(is empty\)"
    with pytest.raises(DataError, match=rf"{what}.*take the class out of the data"):
        open_samples(folders, quarantine=True)
    for lenient in ({"classify": False}, {"evaluation": True}):
        samples = open_samples(folders, quarantine=True, **lenient)
        assert samples.classes == ("a", "b")
        assert any("class 'c' has no good image" in note for note in samples.notes)
    assert not any("class 'c'" in n for n in open_samples(folders, quarantine=True, labelled=False).notes)


def test_all_images_broken(tmp_path):
    bad(tmp_path / "data", 1)
    with pytest.raises(DataError, match="all 12 images are bad, first"):
        open_samples(tmp_path / "data", quarantine=True)


def test_the_second_opening_decodes_nothing(folders, opened):
    first = open_samples(folders)
    assert len(opened) == 40
    second = open_samples(folders)
    assert len(opened) == 40
    assert second.digest() == first.digest()


def test_only_new_and_changed_files_are_decoded(folders, opened):
    open_samples(folders)
    opened.clear()
    draw(folders / "a" / "new.png", 99)
    draw(folders / "b" / "05.png", 98)
    (folders / "a" / "08.png").unlink()
    samples = open_samples(folders)
    assert sorted(opened) == ["05.png", "new.png"]
    np.testing.assert_array_equal(
        samples.image(samples.paths.index("b/05.png")), np.array(Image.open(folders / "b" / "05.png"))
    )
    fresh = open_samples(shutil.copytree(folders, folders.with_name("copy")))
    assert fresh.digest() == samples.digest()


def test_a_change_that_keeps_size_and_time_is_seen(folders, opened):
    open_samples(folders)
    path = folders / "a" / "00.png"
    data, status = bytearray(path.read_bytes()), path.stat()
    data[60] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    opened.clear()
    with pytest.raises(DataError, match=r"a/00\.png: "):
        open_samples(folders)
    assert len(opened) == 40  # nothing that was remembered can be trusted


def test_a_repaired_file_is_seen_whatever_its_time(folders, monkeypatch):
    monkeypatch.setattr(decoding, "SAMPLED", 0)
    path = folders / "a" / "00.png"
    data, status = path.read_bytes(), path.stat()
    path.write_bytes(data[:-20] + bytes(20))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError):
        open_samples(folders)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(open_samples(folders)) == 40


@pytest.mark.parametrize("damage", [b"", b"not a zip", None])
def test_an_unreadable_cache_is_scanned_again(folders, opened, damage, monkeypatch):
    whole = open_samples(folders)
    cache = cache_folder(folders) / "scan.npz"
    data = cache.read_bytes()
    cache.write_bytes(data[: len(data) // 2] if damage is None else damage)
    opened.clear()
    assert open_samples(folders).digest() == whole.digest()
    assert len(opened) == 40


def test_a_cache_of_another_version_is_scanned_again(folders, opened, monkeypatch):
    open_samples(folders)
    monkeypatch.setattr(decoding, "STAMP", "another")
    open_samples(folders)
    assert len(opened) == 80


def test_a_killed_scan_goes_on_where_it_was_saved(folders, opened, monkeypatch):
    monkeypatch.setattr(decoding, "SAVE_EVERY_S", 0.0)

    def killed(done, total):
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_samples(folders, progress=killed)
    opened.clear()
    assert len(open_samples(folders)) == 40
    assert len(opened) == 11


def test_a_cache_that_cannot_be_written_is_said(folders, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NOISYSSL_CACHE", str(tmp_path / "file"))
    samples = open_samples(folders)
    assert len(samples) == 40
    assert any("not remembered" in note and "NOISYSSL_CACHE" in note for note in samples.notes)


def test_findings_are_told_where_the_cache_cannot_be_written(folders, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NOISYSSL_CACHE", str(tmp_path / "file"))
    report = check(folders)
    assert (report.images, report.folder) == (40, "")
    assert any("tables are not kept" in note and "--out" in note for note in report.notes)
    assert check(folders, out=tmp_path / "out").folder == str(tmp_path / "out")
    assert (tmp_path / "out" / "samples.csv").is_file()
    with pytest.raises(MachineError, match="cannot be written"):
        check(folders, out=tmp_path / "file" / "out")


def test_a_class_whose_name_is_no_text_is_refused(folders):
    (folders / "a").rename(folders / "a\udcff")
    with pytest.raises(DataError, match="is not valid UTF-8; rename its folder"):
        open_samples(folders)


def test_backslashes_in_paths_are_explained(folders):
    (folders / "t.csv").write_text("path,label\na\\00.png,a\nb\\01.png,b\n")
    with pytest.raises(DataError, match=r"does not exist\. Separate the folders of a path by /"):
        open_samples(folders / "t.csv")


def test_the_cache_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(tmp_path).is_relative_to(tmp_path / "cache")
    monkeypatch.delenv("NOISYSSL_CACHE")
    assert cache_folder(tmp_path).is_relative_to(tmp_path / "xdg" / "noisyssl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(tmp_path).is_relative_to(tmp_path / "home" / ".cache" / "noisyssl")


def split_folders(root, train=4, test=2):
    for i in range(train):
        draw(root / "train" / "ab"[i % 2] / f"{i}.png", i)
    for i in range(test):
        draw(root / "test" / "ab"[i % 2] / f"{i}.png", 100 + i)
    for i in range(2):
        draw(root / "val" / "ab"[i % 2] / f"{i}.png", 200 + i)
    return root


def test_identical_files_across_splits_are_a_leak(tmp_path):
    root = split_folders(tmp_path / "data")
    shutil.copy(root / "train/a/0.png", root / "test/a/9.png")
    with pytest.raises(DataError, match=r"test/a/9\.png \(test\) = train/a/0\.png \(train\).*--allow-leaks"):
        open_samples(root)
    assert len(open_samples(root, allow_leaks=True)) == 9
    report = check(root)
    assert report.leak
    assert (report.same_bytes.across, report.same_pixels.across) == (1, 1)
    assert report.same_bytes.sets == (("test/a/9.png", "train/a/0.png"),)


def test_identical_pixels_in_other_bytes_are_a_leak(tmp_path):
    root = split_folders(tmp_path / "data")
    Image.open(root / "train/a/0.png").save(root / "val/a/9.bmp")
    report = check(root)
    assert report.leak
    assert report.same_bytes.sets == ()
    assert report.same_pixels.sets == (("train/a/0.png", "val/a/9.bmp"),)


def test_identical_images_within_a_split_are_no_leak_but_two_labels_are_told(tmp_path):
    root = split_folders(tmp_path / "data")
    shutil.copy(root / "train/a/0.png", root / "train/b/9.png")
    report = check(root)
    assert not report.leak
    assert (len(report.same_pixels.sets), report.same_pixels.across, report.same_pixels.contradicting) == (
        1,
        0,
        1,
    )


def test_groups_across_splits_are_a_leak(tmp_path):
    root = split_folders(tmp_path / "data")
    draw(root / "train/a/p7/1.png", 300)
    draw(root / "test/b/p7/2.png", 301)
    draw(root / "test/b/p8/3.png", 302)
    with pytest.raises(DataError, match="1 group in more than one split, first: p7 in train and test"):
        open_samples(root)
    assert check(root).crossing_groups == (("p7", ("train", "test")),)


def test_made_splits_never_divide_a_group_or_identical_images(tmp_path):
    rows = ["path,label,group"]
    for i in range(60):
        draw(tmp_path / f"{i}.png", i if i % 10 else 0)  # every tenth image is the same one
        rows.append(f"{i}.png,{'xy'[i // 3 % 2]},p{i // 3}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    for seed in range(5):
        report = check(tmp_path / "t.csv", seed=seed)
        assert not report.leak
        assert len(report.same_pixels.sets) == 1
        assert set(report.counts) == {"train", "val", "test"}


def test_classes_that_cannot_be_trained(tmp_path):
    root = split_folders(tmp_path / "data")
    draw(root / "test" / "aa" / "1.png", 400)
    with pytest.raises(
        DataError, match=r"class 'aa' \(1 images\) is in test but not in train.*Did you mean 'a'\?"
    ):
        open_samples(root)
    shutil.rmtree(root / "test")
    shutil.rmtree(root / "val")
    shutil.rmtree(root / "train" / "b")
    with pytest.raises(DataError, match="one class only"):
        open_samples(root)
    assert open_samples(root, labelled=False).classes == ()


def test_labels_can_be_demanded_or_dropped(folders, tmp_path):
    assert open_samples(folders, labelled=True).classes == ("a", "b")
    dropped = open_samples(folders, labelled=False)
    assert (dropped.classes, set(dropped.labels.tolist())) == ((), {-1})
    np.testing.assert_array_equal(dropped.splits, open_samples(folders).splits)  # the test stays unseen
    flat = open_samples(folders / "a")
    assert (flat.classes, set(flat.splits)) == ((), {"train"})
    with pytest.raises(DataError, match="has no labels"):
        open_samples(folders / "a", labelled=True)


def test_a_set_that_is_only_measured_on(tmp_path):
    for i in range(3):
        draw(tmp_path / "data" / "a" / f"{i}.png", i)
    samples = open_samples(tmp_path / "data", evaluation=True)
    assert (samples.classes, set(samples.splits)) == (("a",), {"test"})


def test_only_evaluation_takes_true_labels_that_no_given_label_has(tmp_path):
    for i in range(9):
        draw(tmp_path / f"{i}.png", i)
    rows = [f"{i}.png,{'xy'[i % 2]},{'zx'[i % 2] if i else ''}" for i in range(9)]
    (tmp_path / "t.csv").write_text("path,label,true_label\n" + "\n".join(rows))
    for classify in (True, False):
        with pytest.raises(DataError, match=r"t\.csv:4: true_label 'z' is no class of column label"):
            open_samples(tmp_path / "t.csv", classify=classify)
    assert open_samples(tmp_path / "t.csv", labelled=False).classes == ()
    samples = open_samples(tmp_path / "t.csv", evaluation=True)
    assert samples.classes == ("x", "y", "z")
    assert samples.true_labels.tolist() == [-1, 0, 2, 0, 2, 0, 2, 0, 2]


def test_folds_are_refused_where_labels_matter(tmp_path):
    for i in range(12):
        draw(tmp_path / "data" / f"fold{i % 3}" / "ab"[i % 2] / f"{i}.png", i)
    for classify in (True, False):
        with pytest.raises(
            DataError, match=r"data: the folders fold0, fold1, fold2 look like splits or folds"
        ):
            open_samples(tmp_path / "data", classify=classify)
    assert len(open_samples(tmp_path / "data", labelled=False)) == 12


def test_npz_is_opened_like_files(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 8), ("test", 4)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 8, 9), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2)[:, None]
    np.savez(tmp_path / "x.npz", **arrays)
    samples = open_samples(tmp_path / "x.npz")
    assert samples.classes == ("0", "1")
    assert (samples.heights[0], samples.widths[0]) == (8, 9)
    assert samples.image(9).shape == (8, 9, 3)
    arrays["test_images"][1] = arrays["train_images"][2]
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=r"train/000002 \((train|val)\) = test/000001 \(test\)"):
        open_samples(tmp_path / "x.npz")


def test_check_writes_the_tables(tmp_path):
    root = split_folders(tmp_path / "data")
    draw(root / "train" / "a" / "=1,\n2.png", 500)
    (root / "train" / "b" / "bad.png").write_bytes(b"")
    report = check(root, out=tmp_path / "out")
    for folder in (tmp_path / "out", cache_folder(root)):
        with (folder / "samples.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 9
        assert rows[3] == {
            "path": "train/a/2.png", "label": "a", "split": "train", "group": "train/a/2.png",
            "true_label": "", "width": "6", "height": "6", "digest": rows[3]["digest"],
        }  # fmt: skip
        assert "train/a/=1,\n2.png" in {row["path"] for row in rows}
        with (folder / "quarantine.csv").open(newline="") as file:
            assert list(csv.reader(file)) == [["path", "reason"], ["train/b/bad.png", "is empty"]]
    assert report.folder == str(tmp_path / "out")
    assert report.counts["train"] == {"a": 3, "b": 2}


def test_names_that_are_no_utf8_and_read_only_folders(folders):
    draw(folders / "a" / "x.png", 600)
    os.rename(folders / "a" / "x.png", os.fsencode(folders / "a") + b"/\xff.png")
    check(folders)
    samples = open_samples(folders)
    row = samples.paths.index("a/\udcff.png")
    assert samples.image(row).shape == (6, 6, 3)
    assert len(samples.digest()) == 64


def test_classes_that_look_alike_stay_two_and_are_named(folders):
    for old, new in (("a", "Tumor"), ("b", "tumor ")):
        (folders / old).rename(folders / new)
    for name, accent in (("caf\u00e9", "x"), ("cafe\u0301", "y"), ("other", "z")):
        for i in range(3):
            draw(folders / name / f"{accent}{i}.png", ord(accent) + i)
    samples = open_samples(folders)
    assert len(samples.classes) == 5
    found = [note for note in samples.notes if "differ only" in note]
    assert len(found) == 2
    assert r"Classes 'cafe\u0301' and 'caf\xe9' differ only in case" in found[1]
    assert "Classes 'Tumor' and 'tumor ' differ only in case" in found[0]
