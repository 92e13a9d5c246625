"""`noisyssl probe` and `noisyssl embed`: what a user types, sees and gets."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from noisyssl import baselines, checkpoint, probe
from noisyssl.cli import run
from noisyssl.errors import DataError, MachineError
from noisyssl.evaluation import figures
from noisyssl.pipelines.embed import frozen_backbone
from noisyssl.pipelines.evaluate import evaluation_images, logits_of
from noisyssl.pipelines.probing import measure
from noisyssl.pipelines.scan import open_samples

SMALL = ["--set", "backbone=resnet18-w16", "--set", "threads=1", "--size", "32", "--batch", "32"]


@pytest.fixture(scope="module")
def runs(tissue, tmp_path_factory) -> Path:
    """A pretraining and a training run."""
    folder = tmp_path_factory.mktemp("runs")
    off = ["--set", "pretrain.probe_every=0"]
    assert run(["pretrain", str(tissue), "--out", str(folder / "pre"), "--epochs", "1", *off, *SMALL]) == 0
    assert run(["train", str(tissue), "--out", str(folder / "run"), "--epochs", "1", *SMALL]) == 0
    return folder


def rewrite(source: Path, folder: Path, change) -> Path:
    """The images of `source` with a table whose rows `change` made of its own."""
    shutil.copytree(source.parent, folder)
    with source.open() as file:
        rows = [change(dict(row)) for row in csv.DictReader(file)]
    rows = [row for row in rows if row]
    with (folder / source.name).open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder / source.name


def fails(capsys, *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    code = run([str(a) for a in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return code, lines[0]


def asked(capsys, *arguments: object) -> dict:
    capsys.readouterr()
    assert run([str(a) for a in arguments] + ["--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_probe_is_taught_by_train_and_measured_on_test(runs, tissue, capsys):
    found = asked(capsys, "probe", runs / "pre", tissue, "--k", 7)
    samples = open_samples(tissue)
    parts = [samples.where(split) for split in ("train", "test")]
    groups = np.array(samples.groups)
    with (
        evaluation_images(samples, parts[0], 32, "crop", 1) as train,
        evaluation_images(samples, parts[1], 32, "crop", 1) as test,
    ):
        backbone = frozen_backbone(runs / "pre").backbone
        features = [logits_of(backbone, images, torch.device("cpu")) for images in (train, test)]
        colours = [np.stack([baselines.mean_rgb(image) for image in images]) for images in (train, test)]
    labels = [samples.labels[rows] for rows in parts]
    expected = {
        "knn": probe.knn(features[0], labels[0], features[1], 9, 7),
        "linear": probe.linear(features[0], labels[0], groups[parts[0]], features[1], 9)[0],
        "mean_rgb": baselines.fit_predict(colours[0], labels[0], colours[1], 9),
    }
    for name, scores in expected.items():
        ours = (found | found["baselines"])[name]
        theirs = figures(scores, labels[1], groups[parts[1]], samples.classes).to_json()
        for figure in ("balanced_accuracy", "macro_auroc"):
            assert ours[figure]["value"] == pytest.approx(theirs[figure]["value"], abs=0.02), name
        assert ours["groups"] == theirs["groups"] > 1
    assert found["images"] == {"train": len(parts[0]), "test": len(parts[1])}
    assert found["dimensions"] == 128
    assert found["effective_rank"] == pytest.approx(probe.spread(features[0]).effective_rank, rel=1e-3)


def test_the_table_names_weights_labels_and_baselines(runs, tissue, capsys):
    assert run(["probe", str(runs / "pre"), str(tissue)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "simclr, 1 epochs", "training images with true labels", "k-NN (k = 20)",
        "linear probe (C = ", "baseline mean rgb", "baseline colour histogram", "effective rank", "of 128",
    ):  # fmt: skip
        assert words in shown


def test_random_weights_are_the_runs_own_start(runs, tissue, capsys):
    """Before its first step the run was this backbone; a trained one is another."""
    trained, random = (frozen_backbone(runs / "pre", random=flag) for flag in (False, True))
    assert trained.digest != random.digest
    assert random.digest == frozen_backbone(runs / "run", random=True).digest
    torch.manual_seed(0)
    from noisyssl.backbones import build_backbone

    assert random.digest == checkpoint.digest(build_backbone("resnet18-w16").state_dict())
    found = asked(capsys, "probe", runs / "pre", tissue, "--random")
    assert found["weights"] == "random weights (seed 0)"
    assert found["effective_rank"] != asked(capsys, "probe", runs / "pre", tissue)["effective_rank"]


def test_a_training_run_gives_its_best_backbone(runs, tmp_path):
    shutil.copytree(runs / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "best.safetensors"
    tensors = {
        name: value * 2 for name, value in checkpoint.load(path)[0].items()
    }  # of one epoch, BEST is LAST
    checkpoint.save(path, tensors, {"epoch": 7})
    frozen = frozen_backbone(tmp_path / "run")
    assert frozen.what == "ce, BEST, epoch 7"
    for name, value in frozen.backbone.state_dict().items():
        assert torch.equal(value, tensors[f"backbone.{name}"])
    assert not any(part.training for part in frozen.backbone.modules())


def test_labels_that_teach_are_chosen_and_test_labels_stay_true(runs, tissue, tmp_path, capsys):
    """All given labels are wrong, the true ones are right: only what teaches changes."""
    classes = sorted({row["label"] for row in csv.DictReader(tissue.open())})

    def shifted(row: dict) -> dict:
        return row | {"label": classes[(classes.index(row["label"]) + 1) % len(classes)]}

    wrong = rewrite(tissue, tmp_path / "wrong", shifted)
    right = asked(capsys, "probe", runs / "pre", tissue)
    by_true = asked(capsys, "probe", runs / "pre", wrong)
    by_given = asked(capsys, "probe", runs / "pre", wrong, "--labels", "given")
    assert by_true["labels"] == {"taught": "true", "measured": "true"}
    assert by_given["labels"] == {"taught": "given", "measured": "true"}
    assert by_true["linear"]["accuracy"] == right["linear"]["accuracy"]
    assert by_given["linear"]["confusion"] == [
        [row[(column - 1) % 9] for column in range(9)] for row in right["linear"]["confusion"]
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["probe", "nowhere", "DATA"], 2, "nowhere does not exist"),
        (["probe", "EMPTY", "DATA"], 2, "EMPTY is not a run folder"),
        (["probe", "PRE", "nowhere"], 2, "nowhere does not exist"),
        (["probe", "PRE", "FLAT"], 5, "has no labels"),
        (["probe", "PRE", "DATA", "--k", "0"], 2, "--k is 0; it must lie in 1-"),
        (["probe", "PRE", "DATA", "--labels", "noisy"], 2, "--labels is 'noisy'; choose true or given."),
        (["probe", "PRE", "DATA", "--device", "cuda"], 7, "--device is cuda"),
        (["embed", "nowhere", "DATA", "--out", "x.npz"], 2, "nowhere does not exist"),
        (["embed", "PRE", "nowhere", "--out", "x.npz"], 2, "nowhere does not exist"),
        (["embed", "PRE", "DATA", "--out", "EMPTY"], 2, "EMPTY already exists"),
        (["embed", "PRE", "DATA"], 2, "--help"),
    ],
)
def test_bad_input_is_one_line_with_its_code(
    runs, tissue, tmp_path, monkeypatch, capsys, arguments, code, message
):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    names = {"DATA": tissue, "PRE": runs / "pre", "FLAT": tissue.parent / "images" / "mucus"}
    found, line = fails(capsys, *(names.get(a, a) for a in arguments))
    assert (found, message in line) == (code, True), line
    assert {path.name for path in tmp_path.iterdir()} == {"EMPTY"}


def test_an_unfinished_run_is_not_probed(runs, tissue, tmp_path, capsys):
    shutil.copytree(runs / "pre", tmp_path / "pre")
    (tmp_path / "pre" / "metrics.json").unlink()
    for arguments in (["probe"], ["embed", "--out", tmp_path / "x.npz"]):
        code, line = fails(capsys, arguments[0], tmp_path / "pre", tissue, *arguments[1:])
        assert (code, "finish it with --resume first" in line) == (2, True)


def test_classes_and_splits_that_do_not_fit_are_named(runs, tissue, tmp_path, capsys):
    def untaught(row: dict) -> dict | None:
        return None if row["split"] == "train" and row["label"] == "mucus" else row

    def truly_untaught(row: dict) -> dict:
        return row | {"true_label": "polyp" if row["split"] == "test" else row["true_label"]}

    def no_training(row: dict) -> dict:
        return row | {"split": "test" if row["split"] == "train" else row["split"]}

    for name, change, words in (
        ("a", untaught, "class 'mucus'"),
        ("b", truly_untaught, "true_label 'polyp' is no class"),
        ("c", no_training, "no training images"),
    ):
        code, line = fails(capsys, "probe", runs / "pre", rewrite(tissue, tmp_path / name, change))
        assert (code, words in line) == (5, True), line


@pytest.mark.parametrize(
    ("splits", "labels", "message"),
    [
        ({"train": "test"}, {}, "has no train images; a probe learns from train"),
        ({"test": "val"}, {}, "has no test images; a probe learns from train"),
        ({}, dict.fromkeys(range(9), 0), "train teaches one class only \\('adipose'\\)"),
    ],
)
def test_samples_that_cannot_be_probed_are_refused(runs, tissue, splits, labels, message):
    found = open_samples(tissue)
    samples = replace(
        found,
        splits=np.array([splits.get(split, split) for split in found.splits]),
        labels=np.array([labels.get(label, label) for label in found.labels]),
        true_labels=None,
    )
    with pytest.raises(DataError, match=message):
        measure(frozen_backbone(runs / "pre"), samples, torch.device("cpu"), 1)


def test_embed_writes_the_features_of_every_image_and_where_they_come_from(runs, tissue, tmp_path, capsys):
    told = asked(capsys, "embed", runs / "pre", tissue, "--out", tmp_path / "deep" / "f.npz")
    samples = open_samples(tissue)
    with np.load(tmp_path / "deep" / "f.npz", allow_pickle=False) as stored:
        found = {name: stored[name] for name in stored}
    assert found["features"].dtype == np.float32
    assert found["features"].shape == (told["images"], told["dimensions"]) == (len(samples), 128)
    with evaluation_images(samples, np.arange(5), 32, "crop", 1) as images:
        expected = logits_of(frozen_backbone(runs / "pre").backbone, images, torch.device("cpu"))
    np.testing.assert_allclose(found["features"][:5], expected, rtol=1e-3, atol=1e-5)
    assert found["index"].tolist() == list(range(len(samples)))
    assert found["path"].tolist() == samples.paths
    assert found["label"].tolist() == found["true_label"].tolist()
    assert found["label"].tolist() == [samples.classes[label] for label in samples.labels]
    assert found["split"].tolist() == samples.splits.tolist()
    assert found["group"].tolist() == samples.groups
    weights, _ = checkpoint.load(runs / "pre" / "checkpoints" / "last.safetensors")
    assert str(found["weights_sha256"]) == told["weights_sha256"] == checkpoint.digest(weights)
    assert str(found["data_sha256"]) == told["data_sha256"] == samples.digest()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["f.npz"]


def test_embed_needs_no_labels_and_no_second_class(runs, tissue, tmp_path, monkeypatch):
    from noisyssl.pipelines import embed

    monkeypatch.setattr(embed, "CHUNK", 7)  # several chunks, the last one smaller
    flat = tissue.parent / "images" / "mucus"
    assert run(["embed", str(runs / "run"), str(flat), "--out", str(tmp_path / "f.npz")]) == 0
    shutil.copytree(flat, tmp_path / "one" / "mucus")
    assert run(["embed", str(runs / "run"), str(tmp_path / "one"), "--out", str(tmp_path / "g.npz")]) == 0
    with np.load(tmp_path / "f.npz") as f, np.load(tmp_path / "g.npz") as g:
        assert len(f["features"]) == len(f["path"]) == len(list(flat.iterdir())) > 14
        assert set(f["label"]) == {""}
        assert set(g["label"]) == {"mucus"}
        np.testing.assert_array_equal(f["features"], g["features"])


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    from noisyssl.pipelines import embed

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embed.os, "fsync", full)
    with pytest.raises(MachineError, match="the disk is full"):
        embed.write_arrays(tmp_path / "f.npz", {"features": np.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_test_images_that_the_run_trained_on_are_told(runs, tissue, tmp_path, capsys):
    swap = {"train": "test", "test": "train"}
    other = rewrite(
        tissue, tmp_path / "swapped", lambda row: row | {"split": swap.get(row["split"], row["split"])}
    )
    assert run(["probe", str(runs / "pre"), str(tissue)]) == 0
    assert "unseen" not in capsys.readouterr().err
    assert run(["probe", str(runs / "pre"), str(other)]) == 0
    assert "were in the training split of" in capsys.readouterr().err
    assert run(["probe", str(runs / "pre"), str(other), "--random"]) == 0
    assert "unseen" not in capsys.readouterr().err
