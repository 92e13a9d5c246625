"""One self-contained HTML page about a run or a bundle. All that it shows is read from the folder.

Names of classes and files are hostile input: the template escapes every value, and a content security policy
in the page forbids scripts and requests. A part that cannot be shown is left out with a line that says why.
"""

import datetime
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from noisyssl import __version__, noise
from noisyssl.benchmarks import plots, predictions, tables
from noisyssl.benchmarks.records import Record
from noisyssl.deploy import bundle as bundles
from noisyssl.errors import ConfigError, DataError, MachineError, NoisySSLError
from noisyssl.pipelines.tables import write_whole

FIGURES = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "macro_auroc": "macro-AUROC",
    "calibration_error": "calibration error",
}
"""Scalar figures in the order of the page; calibration error is the one that should be small."""
MOST_CLASSES = 30
"""Above this a confusion matrix is unreadable on a page."""
Page = dict[str, Any]


def write_report(
    source: Path, out: Path | None = None, data: Path | None = None, records: Sequence[Record] = ()
) -> Path:
    """Write the page about the run or bundle `source`; the path of the page.

    Args:
        out: the file to write; `report.html` inside a run by default, required for a bundle.
        data: where the images are now; by default where the run's `data.path` says.
        records: speed records to show, oldest first.

    Raises:
        ConfigError: `source` is neither run nor bundle, or `out` is missing, exists or lies in the bundle.
        BundleError: the bundle was altered.
        DataError: the run's own files are broken.
        MachineError: a package is missing, or the disk is full.
    """
    is_bundle = (source / bundles.MANIFEST).is_file()
    if not is_bundle and not (source / "config.toml").is_file():
        what = "holds neither config.toml nor manifest.json" if source.is_dir() else "is no folder"
        raise ConfigError(f"{source} {what}; give the folder of a run or of a bundle.")
    target = _target(source, out, is_bundle)
    page = bundle_page(source) if is_bundle else run_page(source, data)
    page["speed"] = [
        (tables.words(question), tables.table(question, records))
        for question in dict.fromkeys(one["question"] for one in records)
        if question in tables.TABLES
    ]
    write_whole(target, render(page))
    return target


def _target(source: Path, out: Path | None, is_bundle: bool) -> Path:
    if out is None:
        if is_bundle:
            raise ConfigError(
                "--out is missing; a bundle is never written into. Name an HTML file outside it."
            )
        return source / "report.html"
    inside = source.resolve() in out.resolve().parents
    if is_bundle and inside:
        raise ConfigError(
            f"--out {out} lies in the bundle; a bundle is never written into. Name another file."
        )
    own = inside and out.resolve().parent == source.resolve() and out.suffix == ".html"
    if out.is_dir() or (out.exists() and not own):
        raise ConfigError(
            f"--out {out} already exists; only a run's own report is replaced. Name a new file."
        )
    return out


def render(page: Page) -> str:
    """The HTML of a page.

    Raises:
        MachineError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise MachineError(
            "package 'jinja2' is missing; the report is made with it. Run `pip install 'noisyssl[report]'`."
        ) from None
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"figure": tables.cell, "words": tables.words, "svg": Markup}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return environment.get_template("report.html").render(
        page=page, names=FIGURES, version=__version__, today=today
    )


def run_page(run: Path, data: Path | None = None) -> Page:
    """What the page of a run shows; `missing` says why a part is not there.

    Raises:
        DataError: config.toml or metrics.json is broken.
    """
    try:
        text = (run / "config.toml").read_text(encoding="utf-8")
        config = tomllib.loads(text)
        metrics = json.loads((run / "metrics.json").read_text()) if (run / "metrics.json").is_file() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{run} holds a broken file ({error}); copy the run again.") from None
    log = _log(run / "log.jsonl")
    page = _empty(run.resolve().name, "run") | {
        "config": text,
        "metrics": metrics,
        "setup": _setup(config, metrics),
    }
    page["curves"] = _curves(log, metrics)
    if not log:
        page["missing"]["curves"] = "log.jsonl holds no step, so there are no curves."
    if not metrics:
        page["missing"]["figures"] = (
            "metrics.json is not there: this run has not finished, so it has no figures."
        )
    page["environment"] = _environment(metrics)
    if metrics.get("stage") == "pretrain":
        page["stage"] = "pretrain"
        return page
    _add_figures(page, metrics)
    _add_noise(page, metrics)
    if page["classes"]:
        _add_predictions(page, run, data or Path(config.get("data", {}).get("path", "")))
    return page


def bundle_page(bundle: Path) -> Page:
    """What the page of a bundle shows.

    Raises:
        BundleError: a file is missing or altered.
    """
    manifest = bundles.read(bundle)
    page = _empty(bundle.resolve().name, "bundle")
    geometry, network = manifest.geometry, manifest.architecture
    page["setup"] = {
        "classes": len(manifest.classes),
        "input": f"{geometry.size} x {geometry.size} pixels, {geometry.fit}",
        "backbone": f"{network.backbone}, {network.stem} stem",
        **_flat(manifest.checkpoint),
        **_flat(manifest.training),
    }
    _add_figures(
        page, {"classes": list(manifest.classes), "best": {"figures": manifest.figures} | manifest.checkpoint}
    )
    page["parity"] = _flat(manifest.parity)
    for path in sorted((bundle / "engines").glob("*.json")):
        if f"engines/{path.name}" not in manifest.files:
            continue
        sidecar = json.loads(bundles.content(bundle, manifest, f"engines/{path.name}"))
        page["engines"].append({"file": path.name.removesuffix(".json"), **_flat(sidecar)})
    if not page["engines"]:
        page["missing"]["engines"] = "This bundle holds no TensorRT engine; model.onnx is what it serves."
    page["files"] = [
        (name, (bundle / name).stat().st_size, digest) for name, digest in manifest.files.items()
    ]
    page["environment"] = {"exported": manifest.created, **manifest.tools}
    page["missing"]["predictions"] = (
        "ROC curves and sample predictions need logits; see the report of the run."
    )
    return page


def _empty(name: str, kind: str) -> Page:
    parts = ("curves", "roc", "samples", "matrices", "engines", "files", "rows", "classes", "speed")
    page: Page = {part: [] for part in parts}
    blank: Page = {"best": None, "baselines": False, "noise": None, "parity": {}, "config": "", "metrics": {}}
    return page | blank | {"name": name, "kind": kind, "stage": "train", "missing": {}, "reliability": None}


def _setup(config: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """The settings that a reader asks for first."""
    stage = metrics.get("stage", "train")
    own, data = config.get(stage, {}), config.get("data", {})
    start = own.get("weights") or metrics.get("init") or own.get("init")
    chosen = {
        "method" if stage == "pretrain" else "objective": own.get(
            "method" if stage == "pretrain" else "objective"
        ),
        "data": Path(data.get("path", "")).name,
        "image size": f"{data['size']} pixels" if "size" in data else None,
        "backbone": config.get("backbone"),
        "starts from": Path(start).name if start else "random weights",
        "epochs": own.get("epochs"),
        "batch": own.get("batch"),
        "optimizer": f"{own['optimizer']}, lr {own.get('lr')}" if "optimizer" in own else None,
        "seed": config.get("seed"),
        "images": metrics.get("images"),
        "loss at the end": metrics.get("loss") if stage == "pretrain" else None,
        "time": _duration(metrics.get("seconds")),
    }
    return {name: value for name, value in chosen.items() if value not in (None, "")}


def _environment(metrics: dict[str, Any]) -> dict[str, Any]:
    seen = {key: metrics[key] for key in ("device", "loader") if metrics.get(key)}
    return seen | _flat(metrics.get("machine") or {}) | _flat(metrics.get("versions") or {})


def _curves(log: list[dict[str, Any]], metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, SVG) of what the log holds."""
    steps = [one for one in log if one.get("kind") == "step" and isinstance(one.get("progress"), int | float)]
    epochs = [one for one in log if one.get("kind") == "epoch" and isinstance(one.get("epoch"), int)]
    total = max((one.get("epochs") or one.get("epoch") or 1 for one in [*steps, *epochs]), default=1)
    found = []

    def of_steps(title: str, key: str, unit: str, log_scale: bool = False) -> None:
        taken = [one for one in steps if isinstance(one.get(key), int | float)]
        if taken:
            line = plots.Line(
                name=key,
                colour="blue",
                x=[one["progress"] * total for one in taken],
                y=[one[key] for one in taken],
            )
            found.append((title, plots.curves([line], x="epoch", y=unit, log=log_scale)))

    if any(one.get("val") for one in epochs):
        found.append(_accuracy_curve(epochs, metrics))
    of_steps("Training loss", "loss", "loss")
    of_steps("Learning rate", "lr", "learning rate")
    if metrics.get("stage") == "pretrain":
        of_steps("Throughput", "images_per_s", "images/s")
    return found


def _accuracy_curve(epochs: list[dict[str, Any]], metrics: dict[str, Any]) -> tuple[str, str]:
    lines = [
        plots.Line(
            name=name,
            colour=colour,
            x=[one["epoch"] for one in epochs],
            y=[(one.get(split) or {}).get("balanced_accuracy") for one in epochs],
        )
        for split, name, colour in (("val", "validation", "orange"), ("test", "test", "blue"))
        if any((one.get(split) or {}).get("balanced_accuracy") is not None for one in epochs)
    ]
    best = (metrics.get("best") or {}).get("epoch")
    at = next((one["val"] for one in epochs if one["epoch"] == best and one.get("val")), None)
    mark = (best, at["balanced_accuracy"], f"BEST, epoch {best}") if at else None
    return "Balanced accuracy per epoch", plots.curves(lines, x="epoch", y="balanced accuracy", mark=mark)


def _add_figures(page: Page, metrics: dict[str, Any]) -> None:
    """Rows of the figures table, and what hangs on BEST: confusion, reliability, classes."""
    page["classes"] = list(metrics.get("classes") or [])
    best, last, final = (metrics.get(key) or {} for key in ("best", "last", "final"))
    rows = [
        ("BEST", f"epoch {best.get('epoch', '?')}", best.get("figures")),
        ("LAST", f"mean of epochs {_span(last.get('epochs'))}", last.get("figures")),
        ("final weights", f"epoch {final.get('epoch', '?')}", final.get("figures")),
    ]
    baselines = metrics.get("baselines") or {}
    rows += [(tables.words(name), "logistic regression", figures) for name, figures in baselines.items()]
    page["rows"] = [(name, note, figures) for name, note, figures in rows if figures]
    page["baselines"] = bool(baselines)
    if best.get("figures"):
        page["best"] = best
        page["reliability"] = plots.reliability(best["figures"].get("reliability") or [])
        _add_matrix(
            page, "Confusion matrix", best["figures"].get("confusion"), "true class", "predicted class"
        )
    if page["kind"] == "run" and metrics and not baselines:
        page["missing"]["baselines"] = "This run measured no baselines."


def _add_matrix(page: Page, title: str, matrix: Any, rows: str, columns: str) -> None:
    classes = page["classes"]
    if not matrix or len(matrix) != len(classes):
        page["missing"][title] = f"{title}: the file holds none for these {len(classes)} classes."
    elif len(classes) > MOST_CLASSES:
        page["missing"][title] = f"{title}: {len(classes)} classes are more than a page can show."
    else:
        cells = [[cell or 0.0 for cell in row] for row in matrix]
        page["matrices"].append({"title": title, "cells": cells, "rows": rows, "columns": columns})


def _add_noise(page: Page, metrics: dict[str, Any]) -> None:
    injected = metrics.get("noise")
    if not injected or injected.get("spec") in (None, "none"):
        return
    flips = injected.get("flips")
    page["noise"] = injected | {"flips": len(flips) if isinstance(flips, list) else flips}
    asked = injected.get("asked")
    if not isinstance(asked, list):
        try:
            asked = noise.matrix(noise.parse(injected["spec"]), len(page["classes"])).tolist()
        except NoisySSLError:
            asked = None
    _add_matrix(page, "Label noise asked", asked, "true class", "given label")
    _add_matrix(page, "Label noise realised", injected.get("matrix"), "true class", "given label")


def _add_predictions(page: Page, run: Path, data: Path) -> None:
    """ROC curves and sample pictures of the test split, from the stored logits of BEST."""
    try:
        probabilities, labels, index = predictions.load(run / "predictions.npz", len(page["classes"]))
    except DataError as error:
        page["missing"]["predictions"] = f"No ROC curves and no sample predictions: {error}"
        return
    page["roc"], absent = predictions.curves(probabilities, labels, page["classes"])
    if absent:
        page["missing"]["roc"] = (
            f"No ROC curve for {', '.join(absent)}: it needs right and wrong test images."
        )
    try:
        picture = predictions.pictures(run / "samples.csv", data)
    except NoisySSLError as error:
        page["missing"]["samples"] = f"Sample predictions are left out: {error}"
        return
    for title, rows in predictions.chosen(probabilities, labels).items():
        shown = [(row, picture(int(index[row]))) for row in rows]
        cards = [
            {
                "picture": found[0],
                "path": found[1],
                "label": page["classes"][labels[row]],
                "predicted": page["classes"][probabilities[row].argmax()],
                "confidence": float(probabilities[row].max()),
            }
            for row, found in shown
            if found
        ]
        if cards:
            page["samples"].append((title, cards))
    if not page["samples"]:
        page["missing"]["samples"] = "Sample predictions are left out: no image could be read. Name --data."


def _log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; lines that a kill cut short are skipped."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as "a b" -> value; lists of numbers stay."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        label = f"{prefix}{tables.words(str(name))}"
        if isinstance(value, dict):
            found |= _flat(value, f"{label} ")
        elif value not in (None, "", []):
            found[label] = value
    return found


def _span(epochs: Any) -> str:
    return f"{min(epochs)} to {max(epochs)}" if epochs else "?"


def _duration(seconds: Any) -> str | None:
    if not isinstance(seconds, int | float):
        return None
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
