"""The main job through the command line, in miniature: what a user types, sees and gets."""

import csv
import errno
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from noisyssl import checkpoint
from noisyssl.classifier import build_classifier
from noisyssl.cli import run
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.scan import open_samples
from noisyssl.pipelines.setup import seen_by
from noisyssl.pipelines.train import initialise

SMALL = ["--set", "backbone=resnet18-w16", "--set", "threads=1", "--size", "32", "--batch", "32"]


def ok(*arguments: object) -> None:
    assert run([str(a) for a in arguments]) == 0


def fails(capsys, *arguments: object) -> tuple[int, str]:
    """(exit code, the one line on stderr)."""
    capsys.readouterr()
    code = run([str(a) for a in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return code, lines[0]


@pytest.fixture(scope="module")
def job(tissue, tmp_path_factory) -> Path:
    """A pretrained backbone, a classifier on 40 % noisy labels and its bundle."""
    folder = tmp_path_factory.mktemp("job")
    ok("pretrain", tissue, "--out", folder / "pre", "--epochs", 1, *SMALL)
    ok("train", tissue, "--init", folder / "pre", "--noise", "symmetric:0.4", "--out", folder / "run",
       "--epochs", 6, "--set", "threads=1", "--batch", "32")  # fmt: skip
    ok("export", folder / "run", folder / "bundle", "--tensorrt", "SM86,SM120")
    return folder


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def samples(folder: Path) -> list[dict]:
    with (folder / "samples.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_backbone_is_where_training_started(job):
    """--init hands over backbone, stem and size; the run's own config says so."""
    config = (job / "run" / "config.toml").read_text()
    assert 'backbone = "resnet18-w16"' in config
    assert "size = 32" in config
    facts = metrics(job / "run")
    assert facts["init"] == str(job / "pre")
    tensors, _ = checkpoint.load(job / "pre" / "checkpoints" / "last.safetensors")
    network = build_classifier("resnet18-w16", "plain", 9)
    assert initialise(network, job / "pre", Run.open(job / "run").config()) == "simclr"
    assert all(torch.equal(network.backbone.state_dict()[name], tensors[name]) for name in tensors)


def test_pretrained_weights_change_the_result(job, tissue, tmp_path):
    """The backbone that `initialise` loads is the one that trains: without it the run ends elsewhere."""
    settings = ["--noise", "symmetric:0.4", "--epochs", 6, "--set", "threads=1", "--batch", "32"]
    size = ["--size", 32, "--set", "backbone=resnet18-w16"]
    ok("train", tissue, "--out", tmp_path / "random", *settings, *size)
    ours, theirs = (
        checkpoint.load(f / "checkpoints" / "last.safetensors")[0] for f in (job / "run", tmp_path / "random")
    )
    assert not any(torch.equal(ours[name], theirs[name]) for name in ours if name.endswith("conv1.weight"))


def test_noise_is_in_training_and_validation_labels_only(job):
    rows = samples(job / "run")
    with (job / "run" / "noise.csv").open() as file:
        flips = list(csv.DictReader(file))
    noise = metrics(job / "run")["noise"]
    assert noise["flips"] == len(flips) > 0
    assert {rows[int(flip["index"])]["split"] for flip in flips} == {"train", "val"}
    for flip in flips:
        assert rows[int(flip["index"])]["path"] == flip["path"]
        assert flip["given"] != flip["label"] == rows[int(flip["index"])]["label"]
    train = [i for i, row in enumerate(rows) if row["split"] == "train"]
    flipped = {int(flip["index"]) for flip in flips}
    assert noise["realised"] == pytest.approx(len(flipped & set(train)) / len(train))
    assert abs(noise["realised"] - 0.4) < 3 * math.sqrt(0.24 / len(train))


def test_best_and_last_are_what_they_say(job):
    facts = metrics(job / "run")
    log = [json.loads(line) for line in (job / "run" / "log.jsonl").read_text().splitlines()]
    epochs = [entry for entry in log if entry["kind"] == "epoch"]
    scores = [entry["val"]["balanced_accuracy"] for entry in epochs]
    assert len(epochs) == 6
    assert facts["best"]["epoch"] == 1 + int(np.argmax(scores))
    assert facts["best"]["chosen_on"] == "noisy validation balanced accuracy"
    assert facts["last"]["epochs"] == [2, 3, 4, 5, 6]
    by_epoch = {entry["epoch"]: entry["test"]["balanced_accuracy"] for entry in epochs if entry["test"]}
    last = facts["last"]["figures"]["balanced_accuracy"]
    assert last["value"] == pytest.approx(np.mean([by_epoch[e] for e in range(2, 7)]))
    assert last["low"] <= last["value"] <= last["high"]
    best = facts["best"]["figures"]["balanced_accuracy"]["value"]
    assert best == pytest.approx(by_epoch[facts["best"]["epoch"]])
    assert set(facts["baselines"]) == {"mean_rgb", "colour_histogram"}
    assert facts["best"]["figures"]["n"] == sum(row["split"] == "test" for row in samples(job / "run"))


def test_test_labels_are_the_clean_ones(job):
    rows = samples(job / "run")
    classes = metrics(job / "run")["classes"]
    with np.load(job / "run" / "predictions.npz", allow_pickle=False) as kept:
        for index, label in zip(kept["index"], kept["labels"], strict=True):
            assert rows[index]["split"] == "test"
            assert rows[index]["label"] == classes[label]


def test_the_manifest_carries_the_figures_of_the_exported_weights(job, capsys):
    manifest = json.loads((job / "bundle" / "manifest.json").read_text())
    facts = metrics(job / "run")
    assert manifest["figures"]["confusion"] == facts["best"]["figures"]["confusion"]
    assert manifest["figures"]["balanced_accuracy"] == facts["best"]["figures"]["balanced_accuracy"]
    assert manifest["checkpoint"]["epoch"] == facts["best"]["epoch"]
    assert manifest["training"]["noise"]["spec"] == "symmetric:0.4"
    assert manifest["training"]["pretraining"] == "simclr"
    assert manifest["parity"]["max_logit_difference"] <= 1e-4
    assert list((job / "bundle" / "engines").glob("*.plan"))
    capsys.readouterr()
    data = Path(tomli(job / "run")["data"]["path"])
    for model, own in (
        ("run", facts["best"]["figures"] | {"temperature": 1.0}),
        ("bundle", manifest["figures"]),
    ):
        ok("evaluate", job / model, data, "--json")
        assert_same(json.loads(capsys.readouterr().out), own)


def assert_same(ours: object, theirs: object) -> None:
    """Equal but for the rounding of another memory layout or runtime."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list) and isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    else:
        assert ours == (pytest.approx(theirs, abs=1e-5) if isinstance(theirs, float) else theirs)


def tomli(folder: Path) -> dict:
    import tomllib

    return tomllib.loads((folder / "config.toml").read_text())


def test_last_weights_can_be_exported_with_their_own_figures(job, tmp_path):
    ok("export", job / "run", tmp_path / "bundle", "--checkpoint", "last", "--tensorrt", "none")
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["figures"]["confusion"] == metrics(job / "run")["final"]["figures"]["confusion"]
    assert manifest["checkpoint"] == {"which": "last", "epoch": 6}
    assert not (tmp_path / "bundle" / "engines").exists()


def test_predictions_are_the_runs_own(job, tissue, capsys):
    rows = samples(job / "run")
    with np.load(job / "run" / "predictions.npz", allow_pickle=False) as kept:
        index, logits = kept["index"][:5], kept["logits"][:5]
    paths = [tissue.parent / rows[i]["path"] for i in index]
    capsys.readouterr()
    ok("predict", job / "bundle", *paths, "--json")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    classes = metrics(job / "run")["classes"]
    assert [answer["label"] for answer in answers] == [classes[row.argmax()] for row in logits]


def test_pretraining_on_what_is_tested_is_said(job, tissue):
    same = open_samples(tissue)
    assert seen_by(job / "pre", same) == []
    swapped = np.where(same.splits == "test", "train", np.where(same.splits == "train", "test", same.splits))
    (warning,) = seen_by(job / "pre", replace(same, splits=swapped))
    count = int((same.splits == "train").sum())
    assert f"{count} of {count} test images were in the training split" in warning["message"]


def test_a_report_is_written(job, tmp_path):
    ok("report", job / "run")
    ok("report", job / "bundle", "--out", tmp_path / "bundle.html")
    for page in (job / "run" / "report.html", tmp_path / "bundle.html"):
        assert "<html" in page.read_text()[:500]


def test_train_pretrains_first_when_asked(tissue, tmp_path):
    ok("train", tissue, "--pretrain", "rotation", "--out", tmp_path / "run", "--epochs", 1,
       "--set", "pretrain.epochs=1", "--set", "pretrain.batch=64", "--objective", "gce", *SMALL)  # fmt: skip
    assert metrics(tmp_path / "run-pretrain")["method"] == "rotation"
    assert metrics(tmp_path / "run")["init"] == str(tmp_path / "run-pretrain")
    assert metrics(tmp_path / "run")["objective"] == "gce"
    assert metrics(tmp_path / "run")["noise"]["spec"] == "none"


def test_clean_validation_labels_are_a_choice(tissue, tmp_path):
    ok("train", tissue, "--noise", "symmetric:0.4", "--val-labels", "clean", "--out", tmp_path / "run",
       "--epochs", 1, *SMALL)  # fmt: skip
    rows = samples(tmp_path / "run")
    with (tmp_path / "run" / "noise.csv").open() as file:
        assert {rows[int(flip["index"])]["split"] for flip in csv.DictReader(file)} == {"train"}
    assert metrics(tmp_path / "run")["best"]["chosen_on"].startswith("clean")


def test_weights_of_a_run_start_another(job, tissue, tmp_path, capsys):
    source = job / "run" / "checkpoints" / "best.safetensors"
    ok("train", tissue, "--weights", source, "--out", tmp_path / "run", "--epochs", 1, *SMALL)
    assert "120 of 120 tensors loaded" in capsys.readouterr().err


def start(tissue: Path, out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "noisyssl.cli", "train", str(tissue), "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen, timeout_s: float = 120) -> None:
    began = time.monotonic()
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() - began < timeout_s
        time.sleep(0.01)


def test_sigterm_saves_exits_143_and_resumes_to_the_same_bits(tissue, tmp_path):
    settings = [*SMALL, "--epochs", "5", "--noise", "symmetric:0.4"]
    ok("train", tissue, "--out", tmp_path / "whole", *settings)
    process = start(tissue, tmp_path / "run", *settings)
    wait_for(tmp_path / "run" / "checkpoints", process)
    while not any((tmp_path / "run" / "checkpoints").glob("step-*.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    error = process.stderr.read()
    assert process.wait() == 143, error
    assert "--resume" in error.splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.json").exists()
    ok("train", "--out", tmp_path / "run", "--resume")
    for name in ("best", "last"):
        ours, _ = checkpoint.load(tmp_path / "run" / "checkpoints" / f"{name}.safetensors")
        theirs, _ = checkpoint.load(tmp_path / "whole" / "checkpoints" / f"{name}.safetensors")
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    mine, other = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    for key in ("best", "last", "final", "baselines", "noise"):
        assert mine[key] == other[key]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in log if entry["kind"] == "step"]
    assert steps == sorted(set(steps))
    starts = [entry["resumed"] for entry in log if entry["kind"] == "start"]
    assert starts[0] == ""
    assert starts[-1].endswith(".safetensors"), "it began afresh instead of resuming"


def test_resume_refuses_other_settings_and_other_data(job, tissue, tmp_path, capsys):
    run_folder = tmp_path / "run"
    shutil.copytree(job / "run", run_folder)
    (run_folder / "metrics.json").unlink()
    code, line = fails(capsys, "train", "--out", run_folder, "--resume", "--set", "train.lr=0.5")
    assert code == 2
    assert "train.lr: 0.001 -> 0.5" in line
    data = tmp_path / "data"
    shutil.copytree(tissue.parent, data)
    lines = (data / "manifest.csv").read_text().splitlines(keepends=True)
    (data / "manifest.csv").write_text("".join([*lines[:5], *lines[6:]]))
    config = (run_folder / "config.toml").read_text()
    (run_folder / "config.toml").write_text(config.replace(str(tissue), str(data / "manifest.csv")))
    code, line = fails(capsys, "train", "--out", run_folder, "--resume")
    assert code == 5
    assert "is not listed any more" in line


def test_a_finished_run_is_not_run_again(job, capsys):
    before = (job / "run" / "metrics.json").read_bytes()
    ok("train", "--out", job / "run", "--resume")
    assert "finished already" in capsys.readouterr().err
    assert (job / "run" / "metrics.json").read_bytes() == before


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tissue, tmp_path):
    settings = [*SMALL, "--epochs", "3"]
    ok("train", tissue, "--out", tmp_path / "whole", *settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:-100])
    ok("train", "--out", tmp_path / "run", "--resume")
    ours, theirs = (checkpoint.load(tmp_path / f / "checkpoints" / newest.name)[0] for f in ("run", "whole"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert list((tmp_path / "run" / "checkpoints").glob("*.damaged"))
    assert '"warning"' in (tmp_path / "run" / "log.jsonl").read_text()


def test_a_full_disk_during_a_checkpoint_exits_7_and_resumes_to_the_same_bits(
    tissue, tmp_path, monkeypatch, capsys
):
    from noisyssl import disk

    settings = [*SMALL, "--epochs", "4"]
    ok("train", tissue, "--out", tmp_path / "whole", *settings)
    written = []

    def fsync(handle):
        name = os.readlink(f"/proc/self/fd/{handle}")
        if "step-" in name:
            written.append(name)
            if len(written) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        os.fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "os", type("full_os", (), dict(vars(os), fsync=staticmethod(fsync))))
        code, line = fails(capsys, "train", tissue, "--out", tmp_path / "run", *settings)
    assert code == 7
    assert "the disk is full" in line
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*step-*"))
    assert len(left) == 2
    for name in left:
        checkpoint.load(tmp_path / "run" / "checkpoints" / name)
    ok("train", "--out", tmp_path / "run", "--resume")
    ours, theirs = (
        checkpoint.load(tmp_path / f / "checkpoints" / "last.safetensors")[0] for f in ("run", "whole")
    )
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "nowhere", "--out", "x"], 2, "nowhere"),
        (["train", "DATA", "--out", "EXISTS"], 2, "already exists"),
        (["train", "DATA", "--out", "x", "--noise", "symmetric:1.2"], 2, "symmetric:1.2"),
        (["train", "DATA", "--out", "x", "--noise", "symetric:0.2"], 2, "Did you mean 'symmetric'"),
        (["train", "DATA", "--out", "x", "--objective", "gec"], 2, "Did you mean 'gce'"),
        (["train", "DATA", "--out", "x", "--set", "train.epoch=2"], 2, "Did you mean 'epochs'"),
        (["train", "DATA", "--out", "x", "--init", "nowhere"], 2, "nowhere does not exist"),
        (["train", "DATA", "--out", "x", "--device", "cuda"], 7, "--device is cuda"),
        (["train", "--out", "x", "--resume"], 2, "x does not exist"),
        (["train", "--out", "x"], 2, "no data given"),
        (["train", "DATA", "--out", "x", "--epochs", "many"], 2, "--help"),
        (["train", "DATA", "--out", "x", "--epoch", "3"], 2, "--help"),
        (["pretrain", "DATA", "--out", "x", "--method", "simlcr"], 2, "Did you mean 'simclr'"),
        (["pretrain", "DATA", "--out", "x", "--batch", "1"], 2, "BatchNorm needs 2"),
        (["train", "DATA", "--out", "x", "--weights", "nowhere.pt"], 2, "nowhere.pt does not exist"),
        (["train", "DATA", "--out", "x", "--set", "train.weight_decay=-1"], 2, "train.weight_decay is -1"),
        (["train", "DATA", "--out", "x", "--set", "train.objective=5"], 2, "objective '5' is unknown"),
        (["pretrain", "DATA", "--out", "x", "--batch", "5000"], 2, "pretrain.batch is 5000"),
        (["build", "DATA", "x", "--set", "pretrain.batch=5000"], 2, "pretrain.batch is 5000"),
        (["train", "DATA", "--init", "PRE", "--out", "x", "--set", "backbone=resnet18"], 2, "has backbone"),
        (["export", "RUN", "EXISTS"], 2, "already exists"),
        (["export", "RUN", "BUNDLE/x", "--tensorrt", "none"], 2, "lies in a bundle"),
        (["export", "nowhere", "x"], 2, "nowhere does not exist"),
        (["export", "PRE", "x"], 2, "run of `noisyssl pretrain`"),
        (["export", "RUN", "x", "--tensorrt", "SM42"], 2, "SM42"),
        (["export", "RUN", "x", "--set", "train.lr=1"], 2, "not of this stage"),
        (["evaluate", "nowhere", "DATA"], 2, "nowhere does not exist"),
        (["evaluate", "RUN", "nowhere"], 2, "nowhere"),
        (["evaluate", "RUN", "DATA", "--split", "tset"], 2, "Did you mean 'test'"),
        (["evaluate", "RUN", "DATA", "--precision", "fp16"], 2, "--precision fp16 is of a bundle"),
        (["evaluate", "BUNDLE", "DATA", "--precision", "int8"], 6, "has no model.int8-cpu.onnx"),
        (["predict", "nowhere", "DATA"], 2, "nowhere"),
        (["report", "EXISTS"], 2, "EXISTS"),
    ],
)
def test_bad_input_is_one_line_with_its_code(
    job, tissue, tmp_path, monkeypatch, capsys, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "EXISTS").mkdir()
    names = {"DATA": str(tissue), "RUN": str(job / "run"), "PRE": str(job / "pre")}
    names |= {"BUNDLE": str(job / "bundle"), "BUNDLE/x": str(job / "bundle" / "x")}
    found, line = fails(
        capsys,
        *(names.get(a, a) for a in arguments),
        *([] if arguments[0] != "pretrain" else ["--size", "32"]),
    )
    assert (found, message in line) == (code, True), line
    assert {path.name for path in tmp_path.iterdir()} == {"EXISTS"}, "something was left half written"


def test_an_unfinished_run_cannot_be_exported(job, tmp_path, capsys):
    shutil.copytree(job / "run", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    code, line = fails(capsys, "export", tmp_path / "run", tmp_path / "bundle")
    assert code == 2
    assert "--resume" in line


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.toml", "x = ["), ("run.json", "{"), ("metrics.json", ""), ("config.toml", None)],
)
def test_a_run_whose_files_are_damaged_says_which(job, tmp_path, capsys, name, content):
    shutil.copytree(job / "run", tmp_path / "run")
    path = tmp_path / "run" / name
    path.unlink() if content is None else path.write_text(content)
    export, resume = ["export", tmp_path / "run", tmp_path / "b"], ["train", "--out", tmp_path / "run"]
    for command in (export, [*resume, "--resume"]):
        code, line = fails(capsys, *command)
        assert code == 2
        assert f"{name} " in line
        assert "copy the run again" in line


@pytest.mark.parametrize(("content", "code"), [(b"junk", 3), (None, 2)])
def test_a_finished_run_without_its_weights_is_no_dead_end(job, tmp_path, capsys, content, code):
    shutil.copytree(job / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "best.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    found, line = fails(capsys, "export", tmp_path / "run", tmp_path / "bundle")
    assert found == code
    assert "copy the run again" in line


def test_two_processes_do_not_write_into_one_run(job, tmp_path, capsys):
    shutil.copytree(job / "run", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    settings = (tmp_path / "run" / "config.toml").read_text()
    with Run.open(tmp_path / "run").alone():
        code, line = fails(capsys, "train", "--out", tmp_path / "run", "--resume", "--quarantine")
    assert code == 2
    assert "in use by another process" in line
    assert (tmp_path / "run" / "config.toml").read_text() == settings
    with Run.open(tmp_path / "run").alone():
        pass


def test_measuring_on_what_was_trained_on_is_said(job, tissue, capsys):
    ok("evaluate", job / "run", tissue)
    assert "are no test" not in capsys.readouterr().err
    columns = [list(row) for row in csv.reader(tissue.read_text().splitlines())]
    place, own = columns[0].index("split"), tissue.with_name("own.csv")
    try:  # the same images, but nobody says which are the test
        with own.open("w", newline="") as file:
            csv.writer(file).writerows([row[:place] + row[place + 1 :] for row in columns])
        ok("evaluate", job / "run", own)
    finally:
        own.unlink()
    counts = metrics(job / "run")["images"]
    trained = counts["train"] + counts["val"]
    assert f"{trained} of these {len(columns) - 1} images trained or validated" in capsys.readouterr().err


def test_what_is_not_known_to_be_wrong_is_not_called_right(job):
    from noisyssl.cli.figures import summary

    facts = metrics(job / "run")
    assert "of the training labels are wrong" in summary(facts)[0]
    facts["noise"] |= {"spec": "none", "realised": 0.0, "flips": 0}
    assert summary(facts)[0] == "noise none: no label was flipped on purpose"


def test_swapped_class_names_in_a_manifest_are_refused(job, tmp_path, tissue, capsys):
    shutil.copytree(job / "bundle", tmp_path / "bundle")
    path = tmp_path / "bundle" / "manifest.json"
    path.write_text(path.read_text().replace('"mucus"', '"mocus"'))
    code, line = fails(capsys, "predict", tmp_path / "bundle", tissue.parent / "images")
    assert code == 6
    assert "altered" in line


def test_a_build_is_not_resumed_with_other_settings(tissue, tmp_path, capsys):
    small = [
        *SMALL[:4],
        "--size",
        "32",
        "--set",
        "pretrain.epochs=1",
        "--set",
        "pretrain.batch=64",
        "--set",
        "train.epochs=1",
    ]
    ok("build", tissue, tmp_path / "b", *small)
    code, line = fails(
        capsys, "build", tissue, tmp_path / "b", *small, "--resume", "--noise", "symmetric:0.4"
    )
    assert code == 2
    assert "train.noise: none -> symmetric:0.4" in line
    ok("build", tissue, tmp_path / "b", *small, "--resume")


def test_a_build_is_resumed_with_the_settings_of_its_start(tissue, tmp_path, capsys, monkeypatch):
    def killed(*arguments, **more):
        raise KeyboardInterrupt

    data, out = tmp_path / "data", tmp_path / "my build"
    shutil.copytree(tissue.parent, data)
    command = ["build", data / "manifest.csv", out, *SMALL, "--noise", "symmetric:0.4", "--compare",
               "--set", "pretrain.epochs=1", "--set", "train.epochs=1", "--set", "export.tensorrt="
               ]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("noisyssl.pipelines.train.train", killed)
        assert run([str(word) for word in command]) == 130
    code, line = fails(capsys, "build", out, "--resume", "--size", 64)
    assert code == 2
    assert "data.size: 32 -> 64. Leave them out" in line
    data.rename(tmp_path / "moved")
    code, line = fails(capsys, "build", out, "--resume")
    assert code == 2
    assert (
        f"manifest.csv, the data, does not exist any more; say where it is now: noisyssl build DATA '{out}'"
        in line
    )
    ok("build", tmp_path / "moved" / "manifest.csv", out, "--resume")
    for name in ("train", "train-random"):
        assert metrics(out / name)["noise"]["spec"] == "symmetric:0.4"
    assert not list((out / "bundle").rglob("*.plan"))
    ok("build", out, "--resume")
    code, line = fails(capsys, "build", tmp_path / "nothing", "--resume")
    assert code == 2
    assert "start it with DATA" in line
    for words in (["build"], ["build", out]):
        assert "build needs DATA and OUT" in fails(capsys, *words)[1]


def test_where_data_went_is_asked_for_in_the_words_of_the_command(job, tissue, tmp_path, capsys):
    for name in ("pre", "run"):
        shutil.copytree(job / name, tmp_path / "a b" / name)
        config = tmp_path / "a b" / name / "config.toml"
        config.write_text(config.read_text().replace(str(tissue), "/gone/t.csv"))
    pre, trained = tmp_path / "a b" / "pre", tmp_path / "a b" / "run"
    code, line = fails(capsys, "export", trained, tmp_path / "bundle")
    assert code == 2
    assert line.endswith(
        "/gone/t.csv, the data, does not exist any more; say where it is now with --data DATA."
    )
    for command, folder in (("pretrain", pre), ("train", trained)):
        code, line = fails(capsys, command, "--out", folder, "--resume")
        assert code == 2
        assert line.endswith(f"say where it is now: noisyssl {command} DATA --out '{folder}' --resume.")
        ok(command, tissue, "--out", folder, "--resume")
        config = folder / "config.toml"
        config.write_text(config.read_text().replace(str(tissue), "/gone/t.csv"))
        ok("report", folder)
        assert "say where it is now with --data DATA" in (folder / "report.html").read_text()


def test_the_next_command_can_be_pasted(job, tissue, tmp_path, capsys):
    shutil.copytree(job / "run", tmp_path / "a b" / "run")
    shutil.copytree(job / "pre", tmp_path / "a b" / "pre")
    capsys.readouterr()
    ok("export", tmp_path / "a b" / "run", tmp_path / "a b" / "bundle", "--tensorrt", "none")
    ok("train", "--out", tmp_path / "a b" / "run", "--resume")
    ok("pretrain", "--out", tmp_path / "a b" / "pre", "--resume")
    found = [shlex.split(one) for one in capsys.readouterr().out.splitlines() if one.startswith("Next: ")]
    folder = tmp_path / "a b"
    assert [line[2:] for line in found] == [
        ["predict", str(folder / "bundle"), "IMAGES"],
        ["export", str(folder / "run"), "BUNDLE"],
        ["train", "DATA", "--init", str(folder / "pre"), "--out", "RUN"],
    ]


def test_a_grey_npz_trains_and_a_last_batch_of_one_image_does_not_stop_it(tmp_path):
    rng = np.random.default_rng(0)
    images = {
        f"{s}_images": rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for s, n in (("train", 65), ("val", 12), ("test", 12))
    }
    labels = {name.replace("images", "labels"): rng.integers(0, 2, (len(x), 1)) for name, x in images.items()}
    np.savez(tmp_path / "set.npz", **images, **labels)
    ok("train", tmp_path / "set.npz", "--out", tmp_path / "run", "--epochs", 1, *SMALL)
    assert metrics(tmp_path / "run")["images"] == {"train": 65, "val": 12, "test": 12}


def test_a_kill_inside_the_first_checkpoint_still_starts_from_the_pretrained_weights(job, tissue, tmp_path):
    settings = ["--init", job / "pre", "--epochs", 1, "--batch", "32", "--set", "threads=1"]
    ok("train", tissue, "--out", tmp_path / "whole", *settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for path in [*(tmp_path / "run" / "checkpoints").iterdir(), tmp_path / "run" / "metrics.json"]:
        path.unlink()
    (tmp_path / "run" / "checkpoints" / "step-000000001.safetensors.77.tmp").write_bytes(b"half")
    ok("train", "--out", tmp_path / "run", "--resume")
    ours, theirs = (
        checkpoint.load(tmp_path / f / "checkpoints" / "last.safetensors")[0] for f in ("run", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_file_that_breaks_during_a_run_is_dropped_to_the_end(tissue, tmp_path, monkeypatch):
    from noisyssl.pipelines import train as stage

    data = tmp_path / "data"
    shutil.copytree(tissue.parent, data)
    real = stage.noisy_labels

    def breaking(config, samples, run):
        victim = samples.file(int(samples.where("train")[3]))
        victim.write_bytes(victim.read_bytes()[:40])
        return real(config, samples, run)

    monkeypatch.setattr(stage, "noisy_labels", breaking)
    ok("train", data / "manifest.csv", "--out", tmp_path / "run", "--epochs", 2, "--quarantine", *SMALL)
    assert len(metrics(tmp_path / "run")["dropped"]) == 1


def test_noise_beyond_the_bound_warns(tissue, tmp_path, capsys):
    ok("train", tissue, "--noise", "symmetric:0.9", "--out", tmp_path / "run", "--epochs", 1, *SMALL)
    assert "no method can recover it" in capsys.readouterr().err


def test_one_flipped_byte_is_refused(job, tmp_path, tissue, capsys):
    shutil.copytree(job / "bundle", tmp_path / "bundle")
    path = tmp_path / "bundle" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    code, line = fails(capsys, "predict", tmp_path / "bundle", tissue.parent / "images")
    assert code == 6
    assert "model.onnx" in line


def test_an_altered_model_does_not_pass_the_gate(job, tmp_path, monkeypatch, capsys):
    """Export twice: once as it is, once with a graph whose normalisation is off by one grey level."""
    from noisyssl.deploy import to_onnx

    real = to_onnx.export

    def altered(classifier, path, **more):
        import copy

        other = copy.deepcopy(classifier)
        other.backbone.normalise.channel_offset += 1
        real(other, path, **more)

    monkeypatch.setattr(to_onnx, "export", altered)
    code, line = fails(capsys, "export", job / "run", tmp_path / "bundle", "--tensorrt", "none")
    assert code == 4
    assert "1e-04" in line or "0.0001" in line
    assert list(tmp_path.iterdir()) == []


PRETRAIN, TRAIN = ["pretrain", "DATA", "--out", "x"], ["train", "DATA", "--out", "x"]
BUILD, BOTH = ["build", "DATA", "x"], [*TRAIN, "--pretrain", "simclr"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        *(
            ([*command, "--set", "backbone=resnet19"], 2, "Did you mean")
            for command in (PRETRAIN, TRAIN, BUILD)
        ),
        *(([*command, "--set", "stem=smal"], 2, "Did you mean") for command in (PRETRAIN, TRAIN, BUILD)),
        *(([*command, "--device", "gpu"], 2, "device is 'gpu'") for command in (PRETRAIN, TRAIN, BUILD)),
        *(([*command, "--device", "cuda"], 7, "--device is cuda") for command in (PRETRAIN, TRAIN, BUILD)),
        *(([*command, "--weights", "no.pt"], 2, "no.pt does not exist") for command in (PRETRAIN, TRAIN)),
        *(([*command, "--noise", "symmetric:1.2"], 2, "symmetric:1.2") for command in (TRAIN, BOTH, BUILD)),
        *(
            ([*command, "--set", "pretrain.batch=1"], 2, "BatchNorm needs 2")
            for command in (PRETRAIN, BOTH, BUILD)
        ),
        *(([*command, "--set", "train.batch=1"], 2, "BatchNorm needs 2") for command in (TRAIN, BOTH, BUILD)),
        ([*TRAIN, "--init", "nowhere"], 2, "nowhere does not exist"),
        ([*BUILD, "--set", "train.weights=no.pt"], 2, "no.pt does not exist"),
        ([*BUILD, "--set", "export.tensorrt=SM42"], 2, "SM42"),
    ],
)
def test_what_settings_alone_make_impossible_is_refused_before_the_scan(
    tissue, tmp_path, monkeypatch, capsys, arguments, code, message
):
    from noisyssl.pipelines import scan

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("images were opened")

    monkeypatch.setattr(scan, "read_source", opened)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    found, line = fails(capsys, *(str(tissue) if a == "DATA" else a for a in arguments))
    assert (found, message in line) == (code, True), line
    assert list(tmp_path.iterdir()) == []
