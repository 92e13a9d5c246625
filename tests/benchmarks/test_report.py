import hashlib
import json
import re
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("jinja2", reason="needs noisyssl[report]")
pytest.importorskip("matplotlib", reason="needs noisyssl[report]")

from noisyssl import evaluation, noise
from noisyssl.benchmarks import plots, predictions
from noisyssl.benchmarks.report import write_report
from noisyssl.deploy import bundle as bundles
from noisyssl.errors import BundleError, ConfigError, DataError

CLASSES = ("benign", "malignant", "stroma")
EVIL = ("<script>alert(1)</script>", '"onload="x', "{{ 7*7 }} $\\frac{1}{2}$")


def scores(labels: np.ndarray, classes: int, strength: float, seed: int) -> np.ndarray:
    """(N, K) float32 logits that are right more often the larger `strength` is."""
    logits = np.random.default_rng(seed).normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += strength
    return logits.astype(np.float32)


def figures_of(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict:
    groups = [f"patient {i // 3}" for i in range(len(labels))]
    return evaluation.figures(logits, labels, groups, classes, resamples=60).to_json()


def make_run(folder: Path, classes: tuple[str, ...] = CLASSES, count: int = 90, epochs: int = 12) -> Path:
    """A finished training run with everything a report can show; its images lie beside it."""
    rng = np.random.default_rng(0)
    data, run = folder / "images", folder / "run"
    run.mkdir(parents=True)
    rows, labels = ["path,label,split,group,digest"], rng.integers(0, len(classes), count)
    for i, label in enumerate(labels):
        path = data / "test" / f"class-{label}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        base = rng.integers(60, 200, 3)
        pixels = np.clip(base + rng.normal(0, 12, (40, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append(f"{path.relative_to(data)},class-{label},test,patient {i // 3},{digest}")
    (run / "samples.csv").write_text("\n".join(rows) + "\n")
    (run / "config.toml").write_text(
        f'seed = 0\nbackbone = "resnet18-w32"\n[data]\npath = "{data}"\nsize = 64\n'
        f'[train]\nobjective = "gce"\nepochs = {epochs}\nbatch = 128\nnoise = "symmetric:0.4"\n'
        'optimizer = "adamw"\nlr = 0.001\n'
    )
    log, per = [], 40
    for step in range(1, epochs * per + 1):
        at = step / (epochs * per)
        entry = {
            "kind": "step",
            "step": step,
            "epoch": (step - 1) // per + 1,
            "epochs": epochs,
            "progress": at,
        }
        loss = 0.5 + np.exp(-4 * at) + rng.normal(0, 0.06)
        lr = 1e-3 * (at / 0.05 if at < 0.05 else (1 + np.cos(np.pi * (at - 0.05) / 0.95)) / 2)
        log.append(
            entry
            | {"loss": loss, "lr": lr, "grad_norm": 1.0, "images_per_s": 75 + rng.normal(), "seconds": step}
        )
        if step % per == 0:
            value = 0.9 - 0.5 * np.exp(-at * 6) - 0.1 * at**2
            val, test = (
                {"balanced_accuracy": v, "accuracy": v, "macro_f1": v, "loss": 0.5}
                for v in (value * 0.6, value)
            )
            log.append(
                {
                    "kind": "epoch",
                    "epoch": step // per,
                    "step": step,
                    "val": val,
                    "test": test,
                    "seconds": 9.0,
                }
            )
    (run / "log.jsonl").write_text("\n".join(json.dumps(line) for line in log) + '\n{"kind": "st')
    logits = scores(labels, len(classes), 2.0, seed=1)
    best, last, colour = (
        figures_of(scores(labels, len(classes), strength, seed), labels, classes)
        for strength, seed in ((2.0, 1), (1.6, 2), (0.5, 3))
    )
    asked = noise.matrix(noise.parse("symmetric:0.4"), classes)
    flipped = noise.inject(labels, asked, seed=0)
    done = noise.realised(labels, flipped, len(classes))
    metrics = {
        "stage": "train",
        "classes": list(classes),
        "best": {"epoch": 5, "chosen_on": "noisy validation balanced accuracy", "figures": best},
        "last": {"epochs": list(range(epochs - 4, epochs + 1)), "figures": last},
        "final": {"epoch": epochs, "figures": last},
        "baselines": {"mean_rgb": colour, "colour_histogram": colour},
        "noise": {
            "spec": "symmetric:0.4",
            "asked": 0.4,
            "asked_matrix": asked.tolist(),
            "realised": done.rate,
            "matrix": done.to_json()["matrix"],
            "flips": len(done.flips),
            "val_labels": "noisy",
        },
        "init": None,
        "seconds": 754.2,
        "images": 2955,
        "loader": "dali",
        "device": "cpu",
        "versions": {"torch": "2.15.0", "numpy": "2.4.6"},
    }
    (run / "metrics.json").write_text(json.dumps(metrics))
    np.savez(run / "predictions.npz", logits=logits, labels=labels, index=np.arange(count))
    return run


def change(run: Path, **values: object) -> None:
    """Overwrite entries of metrics.json; None removes one."""
    metrics = json.loads((run / "metrics.json").read_text()) | values
    (run / "metrics.json").write_text(json.dumps({k: v for k, v in metrics.items() if v is not None}))


def make_bundle(folder: Path, figures: dict) -> Path:
    (folder / "engines").mkdir(parents=True)
    plan = {
        "flavour": "TensorRT for RTX",
        "version": "1.7.1",
        "capabilities": ["8.6", "12.0"],
        "precision": "fp32",
    }
    contents = {
        "model.onnx": b"graph",
        "engines/model.plan": b"plan",
        "engines/model.plan.json": json.dumps(plan).encode(),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    manifest = bundles.Manifest(
        classes=CLASSES,
        input=bundles.Input(size=64),
        geometry=bundles.Geometry(size=64, fit="crop"),
        architecture=bundles.Architecture(backbone="resnet18-w32", stem="small"),
        checkpoint={"which": "best", "epoch": 5},
        training={"objective": "gce", "noise": {"spec": "symmetric:0.4", "realised": 0.401}},
        figures=figures,
        parity={
            "n": 90,
            "tolerance": 1e-4,
            "max_logit_difference": 2.4e-6,
            "top1_changes": 0,
            "batches": {"1": 1e-6},
        },
        tools={"torch": "2.15.0"},
        files={name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        created="2026-11-23T12:00:00Z",
    )
    bundles.write(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made")).parent


@pytest.fixture
def run(tmp_path, made, monkeypatch):
    """A run of one's own, whose plots are not drawn: that takes seconds."""
    for name in ("curves", "reliability", "roc"):
        monkeypatch.setattr(plots, name, lambda *values, **options: "<svg></svg>")
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace(str(made), str(tmp_path)))
    return tmp_path / "run"


@pytest.fixture(scope="module")
def drawn(made):
    """The page of the run with everything on it."""
    page = write_report(made / "run")
    text = page.read_text()
    page.unlink()
    return text


def page_of(run: Path, **options) -> str:
    return write_report(run, **options).read_text()


def test_the_page_is_one_file_without_requests(drawn):
    page = drawn
    assert len(page) < 5_000_000
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"base64,[^\"]*", "", page))
    assert "<script" not in page
    assert "default-src 'none'" in page
    for source in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert source.startswith(("data:image/jpeg;base64,", "#"))


def test_the_page_shows_the_stored_figures(made, drawn):
    figures = json.loads((made / "run" / "metrics.json").read_text())["best"]["figures"]
    page = drawn
    best = figures["balanced_accuracy"]
    assert f'<div class="number">{best["value"]:.3f}</div>' in page
    assert f"{best['low']:.3f} to {best['high']:.3f}" in page
    assert "Epoch 5, chosen on noisy validation balanced accuracy" in page
    assert "BEST, epoch 5" in page
    for name in ("BEST", "LAST", "mean RGB", "colour histogram"):
        assert f'<th scope="row">{name}<small>' in page
    assert page.count("<svg") == 4 + 1 + len(CLASSES)
    assert page.count("<img") == 3 * predictions.SHOWN
    assert "Label noise asked" in page
    assert "symmetric:0.4" in page


def test_hostile_names_stay_text(tmp_path):
    run = make_run(tmp_path, classes=EVIL)
    image = next((tmp_path / "images").rglob("*.png"))
    evil = image.with_name('"><img src=x onerror=alert(1)>.png')
    image.rename(evil)
    table = (run / "samples.csv").read_text()
    cell = '"' + str(evil.relative_to(tmp_path / "images")).replace('"', '""') + '"'
    (run / "samples.csv").write_text(table.replace(str(image.relative_to(tmp_path / "images")), cell))
    logits, index = np.zeros((1, 3), np.float32), np.array([int(image.stem)])
    np.savez(run / "predictions.npz", logits=logits, labels=np.array([0]), index=index)
    page = page_of(run)
    assert "<script" not in page
    assert "onerror=alert(1)&gt;" in page
    assert "<img src=x" not in page
    assert "{{ 7*7 }}" in page
    assert not re.search(r"<[^>]*\sonload=", page)


def test_without_noise_the_page_says_so(run):
    change(run, noise=None)
    page = page_of(run)
    assert "No label noise was injected" in page
    assert "Label noise asked" not in page


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("predictions.npz", None, "predictions.npz is not there"),
        ("predictions.npz", b"PK\3\4 broken", "predictions.npz cannot be read"),
        ("samples.csv", None, "Sample predictions are left out"),
        ("log.jsonl", None, "log.jsonl holds no step"),
        ("metrics.json", None, "this run has not finished"),
    ],
)
def test_a_missing_part_is_left_out_with_a_line(run, file, content, line):
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_bytes(content)
    assert line in page_of(run)


def test_predictions_never_unpickle(run):
    array = np.array([{"a": 1}], dtype=object)
    np.savez(run / "predictions.npz", logits=array, labels=array, index=array)
    assert "predictions.npz cannot be read" in page_of(run)


def test_missing_baselines_and_undefined_figures_are_said(run):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["best"]["figures"]["sensitivity"]["benign"] = {"value": None, "low": None, "high": None}
    metrics["best"]["figures"]["macro_auroc"] = {"value": 0.5, "low": None, "high": None}
    change(run, best=metrics["best"], baselines=None)
    page = page_of(run)
    assert "This run measured no baselines" in page
    assert "undefined" in page


def test_moved_images_are_found_with_data(run, tmp_path):
    (tmp_path / "images").rename(tmp_path / "moved")
    assert "Sample predictions are left out" in page_of(run)
    assert page_of(run, data=tmp_path / "moved").count("<img") == 3 * predictions.SHOWN


def test_an_image_that_changed_since_is_not_shown_as_what_was_predicted(run, tmp_path):
    for path in sorted((tmp_path / "images").rglob("*.png"))[1:]:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    assert page_of(run).count("<img") <= 2  # the one that did not change, in one or two of the lists


def test_only_images_that_the_source_lists_are_opened(run, tmp_path):
    secret = tmp_path / "secret.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(secret)
    table = (run / "samples.csv").read_text().splitlines()
    digest = hashlib.sha256(secret.read_bytes()).hexdigest()
    table[1:] = [
        f"{name},class-0,test,a,{digest}" for name in ("../secret.png", str(secret)) for _ in range(45)
    ]
    (run / "samples.csv").write_text("\n".join(table))
    assert "<img" not in page_of(run)


def test_a_pretraining_run_shows_loss_lr_and_throughput(run):
    pretrain = {
        "stage": "pretrain",
        "method": "simclr",
        "loss": 5.125,
        "seconds": 9.0,
        "images": 100,
        "device": "cpu",
    }
    (run / "metrics.json").write_text(json.dumps(pretrain))
    page = page_of(run)
    assert '<div class="number">5.125</div>' in page
    for title in ("Training loss", "Learning rate", "Images per second", "Gradient norm"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert "Confusion" not in page


def test_a_bundle_shows_parity_and_engines_and_is_not_touched(run, tmp_path):
    figures = json.loads((run / "metrics.json").read_text())["best"]["figures"]
    bundle = make_bundle(tmp_path / "bundle", figures)
    before = sorted(path.name for path in bundle.rglob("*"))
    page = page_of(bundle, out=tmp_path / "page.html")
    assert f'<div class="number">{figures["balanced_accuracy"]["value"]:.3f}</div>' in page
    for text in ("TensorRT for RTX", "8.6, 12.0", "max logit difference", "2.4e-06", "symmetric:0.4"):
        assert text in page
    assert sorted(path.name for path in bundle.rglob("*")) == before
    with pytest.raises(ConfigError, match="--out is missing; a bundle is never written into"):
        write_report(bundle)
    with pytest.raises(ConfigError, match="lies in the bundle"):
        write_report(bundle, bundle / "engines" / "page.html")
    (bundle / "model.onnx").write_bytes(b"grapi")
    with pytest.raises(BundleError, match="altered"):
        write_report(bundle, tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


def test_only_an_earlier_report_in_or_beside_the_run_is_replaced(run, tmp_path):
    first = write_report(run)
    assert first == run / "report.html"
    write_report(run)
    beside, other = tmp_path / "page.html", tmp_path / "notes.html"
    write_report(run, beside)
    write_report(run, beside)
    other.write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    elsewhere = write_report(run, tmp_path / "elsewhere" / "page.html")
    for taken in (elsewhere, other, run / "config.toml", run / "metrics.json"):
        before = taken.read_bytes()
        with pytest.raises(ConfigError, match="already exists"):
            write_report(run, taken)
        assert taken.read_bytes() == before


def test_guessing_is_among_the_classes_that_the_test_set_has(run):
    assert "Guessing gives 0.333." in page_of(run)
    labels = np.arange(60) % 2
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["best"]["figures"] = figures_of(scores(labels, 3, 2.0, seed=1), labels, CLASSES)
    change(run, best=metrics["best"])
    page = page_of(run)
    assert "Guessing gives 0.500." in page
    assert '<u style="left:50.00%">' in page
    assert "class stroma has no test images; nothing measures it." in page


def test_neither_run_nor_bundle_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=r"neither config\.toml nor manifest\.json"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        write_report(tmp_path / "absent")


def test_broken_metrics_are_the_datas_error(run):
    (run / "metrics.json").write_text('{"stage": ')
    with pytest.raises(DataError, match="broken file"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_speed_records_become_tables(run):
    machine = {"cpu": "Test CPU", "cores": 2, "gpus": []}
    record = {"question": "loading", "settings": {}, "figures": {"speedup": 3.5}, "n": 7, "spread": None}
    record |= {"machine": machine, "versions": {}, "commit": None, "date": "2026-11-01"}
    page = page_of(run, records=[record])
    assert "<td>3.500</td>" in page
    assert "Test CPU, 2 cores" in page


def test_chosen_rows_are_what_their_titles_say():
    labels = np.arange(200) % 3
    probabilities = evaluation.softmax(scores(labels, 3, 1.0, seed=5))
    wrong = probabilities.argmax(1) != labels
    right, random, sure = predictions.chosen(probabilities, labels).values()
    assert not wrong[right].any()
    assert wrong[random].all()
    assert wrong[sure].all()
    confidence = probabilities.max(1)
    assert sorted(confidence[sure], reverse=True) == sorted(confidence[wrong], reverse=True)[: len(sure)]


def test_confusions_come_with_their_share_of_the_true_class():
    found = predictions.confused(("a", "b"), [[8, 2], [3, 1]])
    assert found == [
        {"true": "b", "predicted": "a", "count": 3, "share": 0.75},
        {"true": "a", "predicted": "b", "count": 2, "share": 0.2},
    ]


def test_a_curve_is_not_drawn_across_epochs_without_a_value():
    def segments(values):
        line = plots.Line(name="test", colour="green", x=[1, 2, 3, 4, 5], y=values)
        path = re.search(r'<path d="([^"]*)"[^>]*var\(--green\)', plots.curves([line], x="epoch"))
        return path[1].count("M")

    assert segments([0.1, 0.2, 0.3, 0.4, 0.5]) == 1
    assert segments([0.1, 0.2, None, 0.4, 0.5]) == 2


def test_roc_areas_average_to_the_macro_auroc():
    labels = np.arange(200) % 3
    logits = scores(labels, 3, 1.0, seed=5)
    found, absent = predictions.curves(evaluation.softmax(logits), labels, CLASSES)
    macro = figures_of(logits, labels, CLASSES)["macro_auroc"]["value"]
    assert np.mean([area for _, area, _ in found]) == pytest.approx(macro)
    assert absent == []
    assert predictions.curves(evaluation.softmax(logits), labels * 0, CLASSES)[1] == list(CLASSES)


def test_plots_take_their_colours_from_the_page_and_survive_odd_lines():
    lines = [plots.Line(name="<b>$x_1$", colour="blue", x=[1, 2, 3], y=[0.1, None, float("nan")])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = plots.curves([*lines, *lines], x="epoch", log=True)
        empty = plots.reliability([])
    assert "var(--blue)" in svg
    assert "&lt;b&gt;$x_1$" in svg
    assert not re.search(r"#0[0-9]{5}\b", svg + empty)
    assert "DejaVu" not in svg


def test_the_parity_dataclass_is_shown_as_it_is_written():
    from noisyssl.deploy.parity import Parity

    fields = {
        "n",
        "tolerance",
        "max_logit_difference",
        "top1_changes",
        "top1_changes_beyond_margin",
        "batches",
    }
    parity = Parity(
        n=1,
        tolerance=1e-4,
        max_logit_difference=0.0,
        top1_changes=0,
        top1_changes_beyond_margin=0,
        batches={},
    )
    assert set(asdict(parity)) == fields
