"""From training through the bundle to predict: probabilities at its temperature, answers that are sure."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from noisyssl.cli import run
from noisyssl.deploy import bundle
from noisyssl.evaluation import softmax


def command(*arguments: object) -> int:
    return run([str(a) for a in arguments])


@pytest.fixture(scope="module")
def job(tissue, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    assert command(
        "train", tissue, "--noise", "symmetric:0.3", "--out", folder / "run", "--epochs", "3", "--size", "32",
        "--batch", "32", "--set", "backbone=resnet18-w16", "--set", "threads=1",
    ) == 0  # fmt: skip
    assert command("export", folder / "run", folder / "plain", "--tensorrt", "none") == 0
    wanted = str(lowest_accuracy(folder / "run") + 0.01)
    arguments = ["export", folder / "run", folder / "sure", "--tensorrt", "none", "--accuracy", wanted]
    assert command(*arguments) == 0
    return folder


def lowest_accuracy(folder: Path) -> float:
    """Of all answers on validation: a little more can be had by leaving some out."""
    with np.load(folder / "held_out.npz") as kept:
        return float((kept["val_best"].argmax(axis=1) == kept["val_labels"]).mean())


def images(tissue: Path) -> list[Path]:
    with tissue.open(newline="") as file:
        return [tissue.parent / row["path"] for row in csv.DictReader(file) if row["split"] == "test"]


def test_the_metrics_hold_what_was_fitted_for_best_and_final_weights(job):
    metrics = json.loads((job / "run" / "metrics.json").read_text())
    for which in ("best", "final"):
        found = metrics[which]["calibration"]
        assert 0.05 <= found["temperature"] <= 20
        assert 0 <= found["area_under_risk"] <= 1
        assert found["curve"][-1][0] == 1
        assert set(found["thresholds"]) == {"0.9", "0.95", "0.99"}
        assert "% are wrong" in found["warning"]


def test_every_bundle_has_the_temperature_and_a_threshold_where_one_was_wanted(job):
    metrics = json.loads((job / "run" / "metrics.json").read_text())
    plain, sure = (bundle.read(job / name) for name in ("plain", "sure"))
    assert plain.temperature() == sure.temperature() == metrics["best"]["calibration"]["temperature"]
    assert plain.threshold() is None
    assert sure.answers["validation_accuracy"] >= sure.answers["wanted_accuracy"]
    assert 0 < sure.answers["validation_coverage"] < 1


def test_predict_divides_by_the_temperature_and_says_what_is_sure(job, tissue, capsys):
    files = images(tissue)
    manifest = bundle.read(job / "sure")
    capsys.readouterr()
    assert command("predict", job / "sure", *files, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with np.load(job / "run" / "predictions.npz") as kept:
        expected = softmax(kept["logits"] / manifest.temperature())
    found = np.array([[row["probabilities"][name] for name in manifest.classes] for row in rows])
    assert np.abs(found - expected).max() < 1e-4
    assert [row["sure"] for row in rows] == list(found.max(axis=1) >= manifest.threshold() - 1e-6)
    assert len({row["sure"] for row in rows}) == 2
    coverage = np.mean([row["sure"] for row in rows])
    assert coverage == pytest.approx(manifest.answers["test_coverage"], abs=0.03)


def test_a_bundle_is_measured_as_it_is_served(job, tissue, tmp_path, capsys):
    """Manifest, gate, evaluate and report say one thing, and the run's own figures another."""
    manifest = bundle.read(job / "plain")
    gate = manifest.precisions["fp32"]
    assert manifest.temperature() != 1
    measured = {}
    for name in ("plain", "run"):
        capsys.readouterr()
        assert command("evaluate", job / name, tissue, "--json") == 0
        measured[name] = json.loads(capsys.readouterr().out)
    assert measured["plain"]["temperature"] == manifest.temperature()
    for figure in ("calibration_error", "macro_auroc", "balanced_accuracy"):
        for found in (manifest.figures, measured["plain"]):
            assert found[figure]["value"] == pytest.approx(gate[figure], abs=2e-4), figure
    best = json.loads((job / "run" / "metrics.json").read_text())["best"]["figures"]
    assert measured["run"]["calibration_error"]["value"] == pytest.approx(best["calibration_error"]["value"])
    assert abs(best["calibration_error"]["value"] - gate["calibration_error"]) > 1e-3
    for figure in ("balanced_accuracy", "confusion", "accuracy"):
        assert manifest.figures[figure] == best[figure]
    assert command("evaluate", job / "plain", tissue) == 0
    assert (
        f"as the bundle serves them, at temperature {manifest.temperature():.3f}" in capsys.readouterr().out
    )
    assert command("evaluate", job / "run", tissue) == 0
    assert "of the run, at temperature 1" in capsys.readouterr().out
    assert command("report", job / "plain", "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert f"{manifest.figures['calibration_error']['value']:.3f}" in page
    assert ", as the bundle serves them." in page


def test_table_and_csv_have_the_column_only_where_there_is_a_threshold(job, tissue, capsys):
    file = images(tissue)[0]
    capsys.readouterr()
    for name, has in (("plain", False), ("sure", True)):
        assert command("predict", job / name, file, "--csv") == 0
        header = next(csv.reader(io.StringIO(capsys.readouterr().out)))
        assert ("sure" in header) == has
        assert command("predict", job / name, file) == 0
        assert ("sure" in capsys.readouterr().out.splitlines()[0].split()) == has


def test_an_accuracy_that_no_confidence_gives_is_refused_and_leaves_nothing(job, tmp_path, capsys):
    run_folder = tmp_path / "run"
    shutil.copytree(job / "run", run_folder)
    with np.load(run_folder / "held_out.npz") as kept:
        arrays = dict(kept)
    arrays["val_labels"] = (arrays["val_best"].argmax(axis=1) + 1) % 9  # every answer is wrong
    np.savez(run_folder / "held_out.npz", **arrays)
    assert command("export", run_folder, tmp_path / "b", "--tensorrt", "none", "--accuracy", "0.5") == 2
    assert "no validation answers are right that often; ask for less" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_run_of_an_earlier_version_is_exported_without_and_says_so_where_it_is_wanted(
    job, tmp_path, capsys
):

    old = tmp_path / "old"
    shutil.copytree(job / "run", old)
    (old / "held_out.npz").unlink()
    metrics = json.loads((old / "metrics.json").read_text())
    for which in ("best", "final"):
        del metrics[which]["calibration"]
    (old / "metrics.json").write_text(json.dumps(metrics))
    assert command("export", old, tmp_path / "a", "--tensorrt", "none", "--accuracy", "0.5") == 2
    assert "train it again" in capsys.readouterr().err
    assert command("export", old, tmp_path / "a", "--tensorrt", "none") == 0
    assert bundle.read(tmp_path / "a").temperature() == 1


def test_the_files_own_probabilities_are_at_the_temperature_too(job):
    import onnxruntime

    manifest = bundle.read(job / "sure")
    session = onnxruntime.InferenceSession(job / "sure" / "model.onnx", providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    logits, probabilities = session.run(["logits", "probabilities"], {"image": image})
    assert np.abs(probabilities - softmax(logits / manifest.temperature())).max() < 1e-5
    assert np.abs(probabilities - softmax(logits)).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", "x"), ("temperature", 0), ("threshold", 2.0), ("threshold", True)]
)
def test_answers_that_are_none_are_refused_with_exit_6(job, tmp_path, tissue, capsys, name, value):
    shutil.copytree(job / "sure", tmp_path / "b")
    path = tmp_path / "b" / "manifest.json"
    fields = json.loads(path.read_text())
    fields["answers"][name] = value
    fields.pop("sha256")
    fields["sha256"] = bundle.own_digest(fields)
    path.write_text(json.dumps(fields))
    assert command("predict", tmp_path / "b", images(tissue)[0]) == 6
    assert f"answers has {name}" in capsys.readouterr().err


def test_lower_precisions_are_at_the_temperature_too(job, tmp_path):
    import onnxruntime

    loose = [f"export.{name}" for name in ("int8_agreement=0", "int8_auroc_drop=1", "fp16_flips=1")]
    assert command(
        "export", job / "run", tmp_path / "b", "--tensorrt", "none", "--precision", "fp32,fp16,int8",
        *(part for one in loose for part in ("--set", one)),
    ) == 0  # fmt: skip
    manifest = bundle.read(tmp_path / "b")
    assert manifest.temperature() != 1
    assert {form for form, row in manifest.precisions.items() if row["passed"]} == set(bundle.FORMS)
    image = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    for name in bundle.FORMS.values():
        session = onnxruntime.InferenceSession(tmp_path / "b" / name, providers=["CPUExecutionProvider"])
        logits, probabilities = session.run(["logits", "probabilities"], {"image": image})
        assert np.abs(probabilities - softmax(logits / manifest.temperature())).max() < 1e-3, name
