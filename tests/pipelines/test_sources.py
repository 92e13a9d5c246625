import numpy as np
import pytest

from noisyssl.errors import ConfigError, DataError
from noisyssl.pipelines.sources import class_names, read_source


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def table(root, text):
    (root / "t.csv").write_text(text)
    return root / "t.csv"


def test_class_folders_are_searched_recursively_and_subfolders_are_groups(tmp_path):
    touch(
        tmp_path, "b/p1/2.JPG", "b/p1/deep/3.tiff", "a/p2/1.png", "a/4.webp", "a/notes.txt", "a/.hidden.png"
    )
    found = read_source(tmp_path)
    assert found.paths == ["a/4.webp", "a/p2/1.png", "b/p1/2.JPG", "b/p1/deep/3.tiff"]
    assert found.labels == ["a", "a", "b", "b"]
    assert found.groups == ["", "p2", "p1", "p1"]
    assert found.splits is None
    assert "1 other files were ignored (1 .txt)." in found.notes
    assert "Sub-folders of the classes were taken as 2 groups." in found.notes


def test_links_are_followed_unless_they_lead_back(tmp_path):
    touch(tmp_path, "data/a/1.png", "data/b/2.png", "more/3.png")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "more")
    (tmp_path / "data" / "a" / "self").symlink_to("self")
    found = read_source(tmp_path / "data")
    assert found.paths == ["a/1.png", "b/2.png", "c/3.png"]
    assert "1 other files were ignored (1 without suffix)." in found.notes
    (tmp_path / "more" / "x").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "a" / "y").symlink_to(tmp_path / "more")
    with pytest.raises(DataError, match=r"leads back, by a link, to a folder above it; remove the link"):
        read_source(tmp_path / "data")


def test_one_subfolder_name_everywhere_is_no_group(tmp_path):
    touch(tmp_path, "a/images/1.png", "b/images/2.png")
    assert read_source(tmp_path).groups is None


def test_split_folders_in_any_case(tmp_path):
    touch(tmp_path, "Train/a/1.png", "VALID/a/2.png", "Test/b/3.png", "README.md")
    found = read_source(tmp_path)
    assert (found.splits, found.labels) == (["test", "train", "val"], ["b", "a", "a"])
    assert found.paths == ["Test/b/3.png", "Train/a/1.png", "VALID/a/2.png"]


@pytest.mark.parametrize("names", [("Training", "Testing", "dev"), ("TRAIN", "test", "Development")])
def test_other_words_for_splits(tmp_path, names):
    for name in names:
        touch(tmp_path, f"{name}/a/{name}.png", f"{name}/b/{name}.png")
    found = read_source(tmp_path)
    assert sorted(zip(found.paths, found.splits, found.labels, strict=True)) == sorted(
        (f"{name}/{kind}/{name}.png", split, kind)
        for name, split in zip(names, ("train", "test", "val"), strict=True)
        for kind in "ab"
    )
    assert (found.groups, found.doubt) == (None, "")
    rows = "".join(f"{i}.png,{name}\n" for i, name in enumerate(names))
    assert read_source(table(tmp_path, "path,split\n" + rows)).splits == ["train", "test", "val"]


@pytest.mark.parametrize(
    ("tops", "inner", "doubted"),
    [
        (("fold0", "fold1", "fold2"), ("Hand", "CXR"), True),
        (("fold0", "fold1"), ("grade0", "grade1", "grade2"), True),
        (("site A", "site B"), ("Hand", "CXR", "Head"), True),
        (("10253", "10254", "10255"), ("0", "1"), True),  # IDC: patients above classes
        (("normal", "tumour"), ("p1", "p2", "p3"), False),  # each patient has images of both
        (("normal", "tumour"), ("images",), False),
        (("normal",), ("left", "right"), False),
    ],
)
def test_folds_above_classes_are_doubted_and_patients_below_are_not(tmp_path, tops, inner, doubted):
    names = [f"{top}/{name}/{top}{name}.png" for top in tops for name in inner]
    doubt = read_source(touch(tmp_path / "data", *names)).doubt
    assert (
        "look like splits or folds" in doubt and "write a CSV with path, label and group" in doubt
    ) == doubted
    assert bool(doubt) == doubted
    assert not read_source(touch(tmp_path / "data", f"{tops[0]}/only here/1.png")).doubt


def test_split_folders_without_classes_are_unlabelled(tmp_path):
    found = read_source(touch(tmp_path, "train/1.png", "test/2.png"))
    assert (found.splits, found.labels) == (["test", "train"], None)


def test_a_flat_folder_is_unlabelled(tmp_path):
    found = read_source(touch(tmp_path, "2.png", "1.jpeg", "empty/readme.txt"))
    assert (found.paths, found.labels, found.groups) == (["1.jpeg", "2.png"], None, None)


def test_hidden_folders_with_images_are_told(tmp_path):
    touch(tmp_path, "a/1.png", "b/2.png", ".c/3.png", ".c/deep/4.JPG", ".c/._5.png", "a/.d/6.png", ".git/x")
    (tmp_path / ".loop").symlink_to(".loop")
    found = read_source(tmp_path)
    assert found.paths == ["a/1.png", "b/2.png"]
    assert found.notes == ("3 other files were ignored (2 in hidden folder .c, 1 in hidden folder a/.d).",)


def test_a_folder_named_like_an_image_is_listed_for_the_scan(tmp_path):
    touch(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "3.png").mkdir()
    (tmp_path / "b" / "4.jpg").symlink_to("nowhere.jpg")
    assert read_source(tmp_path).paths == ["a/1.png", "a/3.png", "b/2.png", "b/4.jpg"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/1.png", "extra/a/2.png"], "mixes the split folders train with extra"),
        (["train/a/1.png", "2.png"], r"mixes the split folders train with 2\.png"),
        (["a/1.png", "2.png"], r"holds 1 images beside class folders, first: 2\.png"),
        (["a/1.gif", "notes.txt"], r"holds no images; supported suffixes are \.bmp, .*\.webp"),
    ],
)
def test_folders_that_cannot_be_meant(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        read_source(touch(tmp_path, *names))


def test_a_missing_path_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; name a folder"):
        read_source(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"is a \.txt file; name a folder"):
        read_source(touch(tmp_path, "x.txt") / "x.txt")


def test_csv_columns(tmp_path):
    text = (
        "path,label,split,group,true_label,source\n"
        "a.png,x,Train,p1,y,1\n"
        "./s/b.png,y,validation,,,2\n"
        f"{tmp_path}/c.png,x,test,p2,x,3\n"
    )
    found = read_source(table(tmp_path, text))
    assert found.root == tmp_path
    assert found.paths == ["a.png", "s/b.png", "c.png"]
    assert (found.labels, found.splits) == (["x", "y", "x"], ["train", "val", "test"])
    assert (found.groups, found.true_labels) == (["p1", "", "p2"], ["y", "", "x"])


def test_csv_without_labels(tmp_path):
    assert read_source(table(tmp_path, "path\na.png\n")).labels is None
    assert read_source(table(tmp_path, "path,label\na.png,\nb.png,\n")).labels is None


def test_paths_with_commas_and_line_breaks(tmp_path):
    found = read_source(table(tmp_path, 'path,label\n"a,1.png",x\n"b\n2.png",y\n"say ""hi"".png",x\n'))
    assert found.paths == ["a,1.png", "b\n2.png", 'say "hi".png']


def test_a_true_label_that_is_no_class_is_doubted(tmp_path):
    rows = "a.png,Hand,Hand\na.png,Hand,Hand\nb.png,CXR,\nc.png,CXR,CRX\n"
    doubt = read_source(table(tmp_path, "path,label,true_label\n" + rows)).doubt
    assert f"{tmp_path}/t.csv:5: true_label 'CRX' is no class of column label; those are CXR, Hand." in doubt
    assert "Did you mean 'CXR'? Correct it, or leave the cell empty" in doubt
    assert not read_source(table(tmp_path, "path,label,true_label\n" + rows.replace("CRX", "Hand"))).doubt
    assert not read_source(table(tmp_path, "path,true_label\na.png,x\n")).doubt


def test_equal_rows_are_merged(tmp_path):
    found = read_source(table(tmp_path, "path,label\na.png,x\nb.png,y\n./a.png,x\n"))
    assert (found.paths, found.labels) == (["a.png", "b.png"], ["x", "y"])
    assert found.notes == ("1 repeated rows of t.csv were merged.",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n", "t.csv has no rows"),
        ("path,label\na.png,x\n,y\n", "t.csv:3: path is empty"),
        ("path,label\na.png,x\nb.png,\n", "t.csv:3: label is empty, as in 1 of 2 rows"),
        ("path,split\na.png,train\nb.png,\n", "t.csv:3: split is empty, as in 1 of 2 rows"),
        ("path,split\na.png,train\nb.png,tset\n", "t.csv:3: split 'tset' is unknown; use train, val or test"),
        ("path,label\na.png,x\n/etc/b.png,x\n", "t.csv:3: path '/etc/b.png' lies outside"),
        ("path,label\na.png,x\ns/../../b.png,x\n", "t.csv:3: path 's/../../b.png' lies outside"),
        ("path,label\na.png,x\n..,x\n", "t.csv:3: path '..' lies outside"),
        (
            "path,label\na.png,x\nb.png,x\na.png,y\n",
            "path 'a.png' has label 'y' but 'x' on line 2",
        ),
        (
            "path,split\na.png,train\na.png,test\n",
            "t.csv:3: path 'a.png' has split 'test' but",
        ),
    ],
)
def test_csv_errors_name_the_line(tmp_path, text, message):
    with pytest.raises(DataError) as error:
        read_source(table(tmp_path, text))
    assert message in str(error.value)


def test_a_path_that_leaves_and_comes_back_is_inside(tmp_path):
    found = read_source(table(tmp_path, "path\ns/../b.png\nx..y.png\n...\nd/\nd//e.png\nf.\ng/h./i.png\n"))
    assert found.paths == ["b.png", "x..y.png", "...", "d", "d/e.png", "f.", "g/h./i.png"]


def test_labels_sort_by_value_or_by_name():
    assert class_names(["10", "9", "-1"], None) == ("-1", "9", "10")
    assert class_names(["10", "9", "b"], ["a", ""]) == ("10", "9", "a", "b")


def medmnist(path, shape=(28, 28), **replaced):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 11, (count, 1), dtype=np.int64)
    arrays |= replaced
    np.savez_compressed(path, **{name: value for name, value in arrays.items() if value is not None})
    return path, arrays


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3)])
def test_medmnist(tmp_path, shape):
    path, arrays = medmnist(tmp_path / "set.npz", shape)
    found = read_source(path)
    assert found.array.shape == (10, 28, 28, 3)
    expected = arrays["val_images"][1]
    expected = expected if len(shape) == 3 else np.stack([expected] * 3, axis=-1)
    np.testing.assert_array_equal(found.array[6], expected)
    assert found.paths[5:7] == ["val/000000", "val/000001"]
    assert found.splits == ["train"] * 5 + ["val"] * 2 + ["test"] * 3
    assert found.labels[6] == str(arrays["val_labels"][1, 0])


def test_npz_with_other_words_for_splits_and_keys_that_are_not_read(tmp_path):
    path, arrays = medmnist(tmp_path / "set.npz")
    same = read_source(path)
    named = {
        f"{new}_{what}": arrays[f"{old}_{what}"]
        for old, new in (("test", "testing"), ("val", "Valid"), ("train", "train"))
        for what in ("images", "labels")
    }
    np.savez(path, **named, meta=np.zeros(3), extra_images=arrays["val_images"])
    found = read_source(path)
    assert (found.paths, found.labels, found.splits) == (same.paths, same.labels, same.splits)
    np.testing.assert_array_equal(found.array, same.array)
    assert same.notes == ()
    assert found.notes[0].startswith("Keys not read: meta, extra_images (known are train_images")
    np.savez(path, **named, dev_images=arrays["val_images"])
    with pytest.raises(DataError, match="holds Valid_images and dev_images, which are one split; keep one"):
        read_source(path)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (
            {"train_images": np.zeros((5, 28, 28), np.float32)},
            r"is float32 \(5, 28, 28\); it must be uint8",
        ),
        ({"train_images": np.zeros((5, 28, 28, 28), np.uint8)}, "train_images is uint8"),
        (
            {"train_labels": np.zeros((5, 14), np.int64)},
            r"is int64 \(5, 14\); it must be integers \(5, 1\)",
        ),
        ({"train_labels": np.zeros((4, 1), np.int64)}, "train_labels"),
        ({"train_labels": np.zeros((5, 1))}, "train_labels is float64"),
        ({"train_labels": np.array([["a"]] * 5, dtype=object)}, "not a readable .npz"),
        ({"val_labels": None}, "has labels for 8 of 10 images"),
        ({"val_images": np.zeros((2, 64, 64), np.uint8)}, "images of different shapes"),
        ({"train_images": None, "val_images": None, "test_images": None}, "it must hold train_images"),
    ],
)
def test_npz_that_is_no_medmnist(tmp_path, replaced, message):
    path, _ = medmnist(tmp_path / "set.npz", **replaced)
    with pytest.raises(DataError, match=message):
        read_source(path)


def test_npz_that_is_no_npz(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\3\4 and then nothing")
    with pytest.raises(DataError, match=r"not a readable \.npz file"):
        read_source(tmp_path / "x.npz")


def test_masks_beside_images_are_left_out_and_counted(tmp_path):
    """COVID-QU-Ex as downloaded: Train/COVID-19/images and Train/COVID-19/lung masks."""
    for split in ("Train", "Val", "Test"):
        for kind in ("COVID-19", "Normal"):
            for folder in ("images", "lung masks"):
                place = tmp_path / split / kind / folder
                place.mkdir(parents=True)
                (place / f"{kind}_{split}.png").touch()
    listing = read_source(tmp_path)
    assert len(listing.paths) == 6
    assert all("/images/" in path for path in listing.paths)
    assert set(listing.labels) == {"COVID-19", "Normal"}
    assert set(listing.splits) == {"train", "val", "test"}
    assert listing.groups is None
    assert any("6 other files were ignored (6 masks)" in note for note in listing.notes)


def test_a_class_called_mask_is_a_class(tmp_path):
    for kind in ("mask", "no mask"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.png").touch()
    assert set(read_source(tmp_path).labels) == {"mask", "no mask"}


def test_a_label_column_with_a_typo_is_named(tmp_path):
    from PIL import Image

    from noisyssl.config import Config
    from noisyssl.errors import DataError
    from noisyssl.pipelines.scan import open_samples
    from noisyssl.pipelines.train import must_be_possible
    from noisyssl.recipe import load

    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    table = tmp_path / "t.csv"
    table.write_text("path,lable\n" + "".join(f"{n}.png,{'ab'[n % 2]}\n" for n in range(4)))
    config: Config = load(flags={"data.path": str(table)})
    with pytest.raises(DataError, match=r"has no labels.*Columns not read: lable.*Did you mean 'label'"):
        must_be_possible(config, open_samples(table))
    np.savez(tmp_path / "t.npz", train_images=np.zeros((4, 8, 8), np.uint8), train_label=np.arange(4))
    with pytest.raises(DataError, match=r"has no labels.*Keys not read: train_label \(known are"):
        must_be_possible(config, open_samples(tmp_path / "t.npz"))
