"""The labels of a run: what noise is put in, where, and that test labels never change."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from noisyssl.config import Config, DataConfig, TrainConfig
from noisyssl.errors import ConfigError, DataError
from noisyssl.pipelines.labels import noise_must_fit, noisy_labels
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.scan import open_samples

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """180 small images of three classes with a second opinion in a column of its own."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = ["path,label,split,reader"]
    for i in range(180):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        own = CLASSES[i % 3]
        split = ("train", "train", "train", "val", "test")[i % 5]
        second = "" if i == 3 else CLASSES[(i + (i % 7 == 0)) % 3]
        lines.append(f"{i}.png,{own},{split},{second}")
    (root / "data.csv").write_text("\n".join(lines) + "\n")
    return root / "data.csv"


@pytest.fixture(scope="module")
def samples(table):
    return open_samples(table, labelled=True)


def labels_of(spec, table, samples, tmp_path, **changes):
    """(labels, what was done, the run)."""
    stage = replace(TrainConfig(), noise=spec, **changes)
    config = Config(
        data=DataConfig(path=str(table), size=32), train=stage, backbone="resnet18-w16", threads=2
    )
    run = Run.create(tmp_path / "run", config, "train", samples)
    return *noisy_labels(config, samples, run), run, config


def matrix_file(tmp_path):
    path = tmp_path / "matrix.csv"
    path.write_text("true,blue,green,red\nblue,0.5,0.5,0\ngreen,0,1,0\nred,0,0,1\n")
    return path


@pytest.mark.parametrize(
    "kind", ["symmetric:0.5", "inclusive:0.5", "pair:0.4", "class", "instance:0.4", "column:reader"]
)
def test_test_labels_stay_and_every_flip_is_written(kind, table, samples, tmp_path):
    spec = f"class:{matrix_file(tmp_path)}" if kind == "class" else kind
    labels, facts, run, _ = labels_of(spec, table, samples, tmp_path)
    test = samples.where("test")
    assert labels[test].tobytes() == samples.labels[test].tobytes()
    with (run.folder / "noise.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert 0 < len(rows) == facts["flips"] == (labels != samples.labels).sum()
    for row in rows:
        index = int(row["index"])
        assert samples.paths[index] == row["path"]
        assert (
            samples.classes[labels[index]]
            == row["given"]
            != row["label"]
            == samples.classes[samples.labels[index]]
        )
    train = samples.where("train")
    assert facts["realised"] == pytest.approx((labels != samples.labels)[train].mean())
    assert facts["spec"] == spec
    assert (facts["asked_matrix"] is None) == (kind == "column:reader")
    val = samples.where("val")
    assert (labels[val] != samples.labels[val]).any()


def test_clean_validation_keeps_its_labels(table, samples, tmp_path):
    labels, _, _, _ = labels_of("instance:0.5", table, samples, tmp_path, val_labels="clean")
    val = samples.where("val")
    assert np.array_equal(labels[val], samples.labels[val])


def test_a_column_gives_the_labels_of_training_and_an_empty_cell_keeps_its_own(table, samples, tmp_path):
    labels, facts, _, _ = labels_of("column:Reader", table, samples, tmp_path)
    for index in samples.where("train", "val").tolist():
        number = int(samples.paths[index].removesuffix(".png"))
        expected = CLASSES[(number + (number % 7 == 0 and number != 3)) % 3]
        assert samples.classes[labels[index]] == expected
    assert facts["asked"] is None
    assert facts["matrix"][0][0] < 1


def test_a_column_belongs_to_its_image_however_the_path_is_written(table, samples, tmp_path):
    other = table.with_name("dotted.csv")
    other.write_text(table.read_text().replace("\n", "\n./").removesuffix("./"))
    dotted = open_samples(other, labelled=True)
    labels, facts, _, _ = labels_of("column:reader", other, dotted, tmp_path)
    expected, _, _, _ = labels_of("column:reader", table, samples, tmp_path / "plain")
    assert facts["flips"] > 0
    by_path = dict(zip(samples.paths, expected, strict=True))
    assert all(by_path[path] == label for path, label in zip(dotted.paths, labels, strict=True))


def test_a_resumed_run_needs_no_matrix_file_again(table, samples, tmp_path):
    path = matrix_file(tmp_path)
    labels, facts, run, config = labels_of(f"class:{path}", table, samples, tmp_path)
    path.unlink()
    run.is_fresh = lambda: False
    again, facts_again = noisy_labels(config, samples, run)
    assert np.array_equal(again, labels)
    assert facts_again["asked_matrix"] == facts["asked_matrix"]


def test_a_run_of_the_version_before_draws_the_same_flips_again(table, samples, tmp_path):
    """It has a `noise.csv`, but no `noise.json`."""
    labels, facts, run, config = labels_of("symmetric:0.4", table, samples, tmp_path)
    (run.folder / "noise.json").unlink()
    run.is_fresh = lambda: False
    again, facts_again = noisy_labels(config, samples, run)
    assert np.array_equal(again, labels)
    assert facts_again == facts


def test_a_resumed_run_reads_its_own_flips(table, samples, tmp_path):
    """Another machine may round a projection otherwise; a column may have changed."""
    labels, facts, run, config = labels_of("instance:0.4", table, samples, tmp_path)
    run.is_fresh = lambda: False
    other = replace(config, train=replace(config.train, noise_seed=9))
    again, facts_again = noisy_labels(other, samples, run)
    assert np.array_equal(again, labels)
    assert facts_again["flips"] == facts["flips"]


def test_instance_noise_differs_with_what_decides(table, samples, tmp_path):
    from noisyssl.cli import run as cli

    pre = tmp_path / "pre"
    assert not cli(
        ["pretrain", str(table), "--out", str(pre), "--set", "backbone=resnet18-w16", "--size", "32",
         "--epochs", "1", "--batch", "32", "--set", "pretrain.probe_every=0", "--set", "threads=1"]
    )  # fmt: skip
    pixels, _, _, _ = labels_of("instance:0.4", table, samples, tmp_path)
    features, facts, _, _ = labels_of(f"instance:0.4:{pre}", table, samples, tmp_path / "other")
    assert facts["realised"] == pytest.approx(0.4, abs=0.15)
    assert (pixels != features).any()
    assert np.array_equal(
        pixels != samples.labels, features != samples.labels
    )  # rates hang on the seed alone


@pytest.mark.parametrize(
    ("spec", "error", "remedy"),
    [
        (
            "column:readr",
            ConfigError,
            r"has no such column; it has path, label, split, reader\. Did you mean",
        ),
        (
            "column:split",
            DataError,
            r"'train' in column split is no class of column label; those are blue, green",
        ),
        ("class:nowhere.csv", ConfigError, r"nowhere\.csv, which is no readable CSV"),
        ("instance:0.3:nowhere", ConfigError, r"nowhere"),
    ],
)
def test_noise_that_does_not_fit_is_refused_before_anything_trains(spec, error, remedy, table, samples):
    config = Config(data=DataConfig(path=str(table)), train=replace(TrainConfig(), noise=spec))
    with pytest.raises(error, match=remedy):
        noise_must_fit(config, samples)


def test_a_column_of_what_is_no_csv_and_two_opinions_of_one_image(table, samples, tmp_path):
    config = Config(data=DataConfig(path=str(tmp_path)), train=replace(TrainConfig(), noise="column:reader"))
    with pytest.raises(ConfigError, match=r"a column of a CSV, but .* is none; give the data as CSV"):
        noise_must_fit(config, samples)
    twice = tmp_path / "twice.csv"
    twice.write_text("path,label,reader\n0.png,blue,red\n0.png,blue,green\n")
    config = replace(config, data=DataConfig(path=str(twice)))
    with pytest.raises(DataError, match=r"0\.png is 'red' and 'green' in column reader; keep one"):
        noise_must_fit(config, samples)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("symmetric:0.7", "at or beyond 0.667 with 3 classes"),
        ("pair:0.5", "no method can recover it"),
        ("pair:0.4", ""),
    ],
)
def test_noise_beyond_the_bound_is_warned_of(spec, said, table, samples, tmp_path):
    _, _, run, _ = labels_of(spec, table, samples, tmp_path)
    log = (run.folder / "log.jsonl").read_text() if (run.folder / "log.jsonl").exists() else ""
    assert (said in log) if said else not log
