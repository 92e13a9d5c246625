"""Runs that go on although their files broke, went away or moved meanwhile."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from noisyssl import checkpoint
from noisyssl.cli import run
from noisyssl.pipelines.draws import order
from noisyssl.pipelines.run import Run

SETTINGS = [
    "--set", "backbone=resnet18-w16", "--set", "threads=1", "--size", "32", "--batch", "32", "--epochs", "3",
]  # fmt: skip
FIRST_STOP = 2
"""Checkpoints after which a run is interrupted."""


def command(*arguments: object) -> int:
    return run([str(a) for a in arguments])


@pytest.fixture
def folders(tissue, tmp_path) -> Path:
    """Class folders without splits: a file that goes away changes the listing and every split drawn anew."""
    with tissue.open(newline="") as file:
        for row in csv.DictReader(file):
            target = tmp_path / "data" / row["label"] / Path(row["path"]).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tissue.parent / row["path"], target)
    return tmp_path / "data"


@pytest.fixture
def table(tissue, tmp_path) -> Path:
    shutil.copytree(tissue.parent, tmp_path / "data")
    return tmp_path / "data" / tissue.name


def at_checkpoints(monkeypatch, events: dict[int, object]) -> None:
    """Call `events[n](run, samples)` after the n-th checkpoint of every run that starts from now on."""
    saved, real = [], Run.save

    def save(self, state):
        real(self, state)
        saved.append(state.step)
        if event := events.get(len(saved)):
            event(self)

    monkeypatch.setattr(Run, "save", save)


def rows(run_folder: Path) -> list[dict]:
    with (run_folder / "samples.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def indices(run_folder: Path, split: str) -> np.ndarray:
    return np.array([i for i, row in enumerate(rows(run_folder)) if row["split"] == split])


def late_in_epoch(run: Run, epoch: int) -> str:
    """The training file that comes last in an epoch, so that nothing has read ahead to it."""
    return rows(run.folder)[int(order(0, epoch, indices(run.folder, "train"))[-1])]["path"]


def interrupt(run: Run) -> None:
    raise KeyboardInterrupt


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoints" / f"{name}.safetensors")[0]


def assert_equal_runs(ours: Path, theirs: Path) -> None:
    for name in ("best", "last"):
        a, b = tensors(ours, name), tensors(theirs, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in b)
    mine, other = metrics(ours), metrics(theirs)
    for key in ("best", "last", "final", "baselines", "noise", "dropped", "images"):
        assert mine[key] == other[key], key


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize(("source", "spoil"), [("folders", "gone"), ("table", "truncated")])
def test_after_a_file_was_dropped_resume_ends_where_the_uninterrupted_run_does(
    request, tmp_path, monkeypatch, source, spoil
):
    data = request.getfixturevalue(source)
    root, backup = tmp_path / "data", tmp_path / "backup"
    shutil.copytree(root, backup)

    def breaks(run: Run) -> None:
        victim = root / late_in_epoch(run, 1)
        victim.unlink() if spoil == "gone" else victim.write_bytes(victim.read_bytes()[:60])

    arguments = ["train", data, "--noise", "symmetric:0.4", "--quarantine", *SETTINGS]
    with monkeypatch.context() as patch:
        at_checkpoints(patch, {1: breaks})
        assert command(*arguments, "--out", tmp_path / "whole") == 0
    shutil.rmtree(root)
    shutil.copytree(backup, root)
    with monkeypatch.context() as patch:
        at_checkpoints(patch, {1: breaks, FIRST_STOP: interrupt})
        assert command(*arguments, "--out", tmp_path / "run") == 130
    assert command("train", "--out", tmp_path / "run", "--resume") == 0
    assert len(metrics(tmp_path / "whole")["dropped"]) == 1
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_files_of_every_split_that_break_while_a_run_is_stopped(table, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_checkpoints(patch, {FIRST_STOP: interrupt})
        assert command("train", table, "--out", out, *SETTINGS) == 130
    lost = [rows(out)[int(indices(out, split)[0])]["path"] for split in ("train", "val", "test")]
    for path in lost:
        (table.parent / path).unlink()
    tests = len(indices(out, "test"))
    capsys.readouterr()
    assert command("train", "--out", out, "--resume") == 5
    error = capsys.readouterr().err.splitlines()[-1]
    assert "3 of the 270 files" in error
    assert any(path in error for path in lost)
    assert "--quarantine" in error
    assert command("train", "--out", out, "--resume", "--quarantine") == 0
    assert set(metrics(out)["dropped"]) == set(lost)
    assert metrics(out)["best"]["figures"]["n"] == tests - 1
    assert "quarantine = true" in (out / "config.toml").read_text()
    assert command("export", out, tmp_path / "bundle", "--tensorrt", "none") == 0
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["parity"]["n"] == tests - 1
    trained, served = metrics(out)["best"]["figures"], manifest["figures"]
    for name in ("n", "groups", "accuracy", "balanced_accuracy"):  # the others hang on the temperature
        assert served[name] == trained[name], name


def test_a_file_that_breaks_after_the_last_epoch_is_dropped_with_quarantine_only(
    table, tmp_path, monkeypatch, capsys
):
    """The last epoch is over; the colour baselines read every training image once more."""

    def breaks(run: Run) -> None:
        (table.parent / rows(run.folder)[int(indices(run.folder, "train")[5])]["path"]).unlink()

    for flag, code in ((["--quarantine"], 0), ([], 5)):
        shutil.copytree(table.parent, tmp_path / "backup", dirs_exist_ok=True)
        out = tmp_path / f"run{code}"
        with monkeypatch.context() as patch:
            at_checkpoints(patch, {1: breaks})
            assert command("train", table, "--out", out, *SETTINGS[:-1], "1", *flag) == code
        shutil.copytree(tmp_path / "backup", table.parent, dirs_exist_ok=True)
    assert len(metrics(tmp_path / "run0")["dropped"]) == 1
    assert "images/" in capsys.readouterr().err.splitlines()[-1]


def test_what_follows_a_resumed_pretraining_keeps_its_splits(folders, tmp_path, monkeypatch):
    """The splits are made; drawn among one group less, most of the test would have been pretrained on."""
    out, before = tmp_path / "run", tmp_path / "run-pretrain"
    arguments = ["train", folders, "--pretrain", "rotation", "--out", out, *SETTINGS[:-1], "1"]
    arguments += ["--set", "pretrain.epochs=2", "--set", "pretrain.batch=32"]
    with monkeypatch.context() as patch:
        at_checkpoints(patch, {1: interrupt})
        assert command(*arguments) == 130
    lost = rows(before)[int(indices(before, "train")[0])]["path"]
    (folders / lost).unlink()
    assert command(*arguments, "--resume", "--quarantine") == 0
    splits = {row["path"]: row["split"] for row in rows(before) if row["path"] != lost}
    assert {row["path"]: row["split"] for row in rows(out)} == splits


def test_moved_data_resumes_and_exports_and_other_data_does_not(table, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_checkpoints(patch, {1: interrupt})
        assert command("train", table, "--out", out, *SETTINGS[:-1], "2") == 130
    moved = tmp_path / "moved" / table.name
    shutil.move(table.parent, moved.parent)
    assert command("train", "--out", out, "--resume") == 2
    assert command("train", moved, "--out", out, "--resume") == 0
    away = tmp_path / "moved again" / table.name
    shutil.move(moved.parent, away.parent)
    assert command("export", out, tmp_path / "bundle", "--tensorrt", "none") == 2
    assert not (tmp_path / "bundle").exists()
    assert command("export", out, tmp_path / "bundle", "--tensorrt", "none", "--data", away) == 0
    assert str(away) not in (out / "config.toml").read_text(), "an export changes no run"
    lines = away.read_text().splitlines(keepends=True)
    away.write_text("".join(lines[:-1]))
    capsys.readouterr()
    assert command("export", out, tmp_path / "other", "--tensorrt", "none", "--data", away) == 5
    assert "is not listed any more" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
