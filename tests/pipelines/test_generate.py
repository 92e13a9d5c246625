import csv
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from noisyssl.errors import ConfigError, MachineError
from noisyssl.pipelines.canvas import Canvas
from noisyssl.pipelines.generate import CLASSES, TILES, _splits, generate, paint, slide
from noisyssl.pipelines.tissue import KINDS


def read(folder):
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "tissue"
    generate(folder, count=400, size=64, seed=3)
    return folder


def test_the_manifest_lists_every_image_once(made):
    rows = read(made)
    assert list(rows[0]) == ["path", "label", "split", "group", "true_label"]
    assert len(rows) == 400
    assert {row["path"] for row in rows} == {str(p.relative_to(made)) for p in made.rglob("*.png")}
    assert {path.name for path in made.iterdir()} == {"images", "manifest.csv"}
    for row in rows:
        assert row["label"] == row["true_label"] == row["path"].split("/")[1]


def test_slides_do_not_cross_splits_and_each_split_has_every_class(made):
    splits, classes, kinds = defaultdict(set), defaultdict(set), defaultdict(set)
    for row in read(made):
        splits[row["group"]].add(row["split"])
        classes[row["split"]].add(row["label"])
        kinds[row["group"]].add(row["label"])
    assert all(len(names) == 1 for names in splits.values())
    assert {name: len(found) for name, found in classes.items()} == dict.fromkeys(("train", "val", "test"), 9)
    assert min(map(len, kinds.values())) > 1  # a slide is no class


@pytest.mark.parametrize("count", [3 * TILES, 3 * TILES + 1, 5 * TILES - 1, 1000, 2000])
def test_splits_are_near_70_15_15_and_complete_at_every_count(count):
    slides, full = -(-count // TILES), count // TILES
    splits = _splits(0, slides, full)
    sizes = Counter(splits)
    assert set(sizes) == {"train", "val", "test"}
    assert sizes["val"] == sizes["test"]
    if count >= 1000:
        assert sizes["val"] / slides == pytest.approx(0.15, abs=0.01)
    if slides > full:
        assert splits[-1] == "train"  # an unfinished slide may lack classes


def test_files_hold_exactly_what_paint_gives(made):
    rows = read(made)
    for index in (0, 17, 399):
        image, label, number = paint(3, index, 64)
        assert (rows[index]["label"], rows[index]["group"]) == (CLASSES[label], f"slide{number:04d}")
        assert np.array_equal(np.asarray(Image.open(made / rows[index]["path"])), image)


def test_an_image_depends_on_seed_and_index_alone(made, tmp_path):
    generate(tmp_path / "less", count=3 * TILES, size=64, seed=3)
    generate(tmp_path / "other", count=3 * TILES, size=64, seed=4)
    less, other, more = read(tmp_path / "less"), read(tmp_path / "other"), read(made)
    for row, larger in zip(less, more, strict=False):
        assert (tmp_path / "less" / row["path"]).read_bytes() == (made / larger["path"]).read_bytes()
    first, second = ({p.read_bytes() for p in (tmp_path / n).rglob("*.png")} for n in ("less", "other"))
    assert len(first) == len(second) == 3 * TILES
    assert not first & second
    assert [row["label"] for row in less] != [row["label"] for row in other]


@pytest.mark.parametrize("size", [32, 100, 224])
def test_every_kind_is_painted_at_every_size(size):
    labels = set()
    for index in range(TILES // 2):
        image, label, _ = paint(0, index, size)
        labels.add(label)
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        assert image.std() > 2
    assert labels == set(range(len(CLASSES)))


@pytest.mark.parametrize("kind", ["debris", "lymphocytes", "mucus", "muscle", "stroma"])
def test_a_larger_tile_shows_the_same_scene_finer(kind):
    small, large = (Canvas(np.random.default_rng(5), size) for size in (64, 192))
    for canvas in (small, large):
        KINDS[kind](canvas)
    coarse = large.haematoxylin.reshape(64, 3, 64, 3).mean((1, 3))
    assert np.corrcoef(coarse.ravel(), small.haematoxylin.ravel())[0, 1] > 0.9


def test_smooth_noise_has_variance_1_at_every_scale():
    for scale in (1.5, 6.0, 20.0):
        values = [Canvas(np.random.default_rng(i), 64).smooth(scale) for i in range(200)]
        assert np.mean(np.square(values)) == pytest.approx(1, rel=0.15)


def test_colour_tells_the_slide_and_not_the_class(made):
    from noisyssl.baselines import colour_histogram, fit_predict, mean_rgb

    rows = read(made)
    images = [np.asarray(Image.open(made / row["path"])) for row in rows]
    labels = np.array([CLASSES.index(row["label"]) for row in rows])
    train, test = (np.array([row["split"] == name for row in rows]) for name in ("train", "test"))
    for feature, bound in ((mean_rgb, 0.45), (colour_histogram, 0.6)):
        x = np.stack([feature(image) for image in images])
        right = fit_predict(x[train], labels[train], x[test], 9).argmax(1) == labels[test]
        assert np.mean([right[labels[test] == k].mean() for k in range(9)]) < bound


def test_hue_tells_the_slide_and_not_the_class(made):
    rows = read(made)
    density = -np.log([(np.asarray(Image.open(made / row["path"])).mean((0, 1)) + 1) / 256 for row in rows])
    hue = density / np.linalg.norm(density, axis=1, keepdims=True)

    def left_over(column):
        by = np.array([row[column] for row in rows])
        return sum(hue[by == one].var(axis=0).sum() * (by == one).mean() for one in np.unique(by))

    assert left_over("group") < 0.75 * left_over("label")


def test_difficulty_takes_the_class_out_of_the_colour():
    from noisyssl.baselines import fit_predict, mean_rgb

    reached = []
    for difficulty in (0.0, 0.5, 1.0):
        painted = [paint(5, index, 32, difficulty) for index in range(12 * TILES)]
        x = np.stack([mean_rgb(image) for image, _, _ in painted])
        labels, slides = np.array([p[1] for p in painted]), np.array([p[2] for p in painted])
        train, test = slides % 3 > 0, slides % 3 == 0
        right = fit_predict(x[train], labels[train], x[test], 9).argmax(1) == labels[test]
        reached.append(right.mean())
    assert reached[0] > 0.9 > reached[1] > reached[2] + 0.1
    easy = slide(0, 0, 0.0)
    assert np.array_equal(easy.stains, slide(0, 1, 0.0).stains)
    assert np.array_equal(easy.amounts, slide(0, 1, 0.0).amounts)
    assert np.array_equal(paint(3, 7, 32)[0], paint(3, 7, 32, 1.0)[0])


def test_slides_differ_in_stain_and_light():
    a, b = slide(0, 0), slide(0, 1)
    assert not np.allclose(a.stains, b.stains, atol=0.01)
    assert not np.allclose(a.white, b.white, atol=0.5)
    assert np.allclose(np.linalg.norm(a.stains, axis=1), 1)


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path, tmp_path / "mine", tmp_path / "link"):
        with pytest.raises(ConfigError, match="name another one"):
            generate(folder, count=100)
    assert (tmp_path / "mine").read_text() == "keep"


@pytest.mark.parametrize(
    "settings",
    [{"size": 31}, {"size": 225}, {"count": 3 * TILES - 1}, {"seed": -1}, {"difficulty": 1.1}],
    ids=str,
)
def test_settings_out_of_range_are_refused(tmp_path, settings):
    with pytest.raises(ConfigError, match=f"--{next(iter(settings))} is "):
        generate(tmp_path / "new", **settings)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_call_leaves_nothing(tmp_path):
    def stop(done, count):
        assert count == 100
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "new", count=100, progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(MachineError, match="No space left on device"):
        generate(tmp_path / "new", count=100)
    assert not list(tmp_path.iterdir())
