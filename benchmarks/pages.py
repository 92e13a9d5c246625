"""What the report shows of a run and of a bundle, read from the folder, as values for its template.

A part that cannot be shown is left out, and `page["missing"]` says why.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

from noisyssl.benchmarks import features, history, plots, predictions, tables
from noisyssl.deploy import bundle as bundles
from noisyssl.errors import DataError, NoisySSLError
from noisyssl.pipelines.findings import without_images

Page = dict[str, Any]
MOST_CLASSES = 30
"""Above this a confusion matrix is unreadable on a page."""
NAMES = {
    "n": "images compared",
    "which": "checkpoint",
    "batches": "difference at batch",
    "chosen_on": "chosen on",
}
"""Stored field -> what the page calls it."""


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
    log = history.read(run / "log.jsonl")
    page = _empty(run.resolve().name, "run") | {
        "config": text,
        "metrics": metrics,
        "setup": _setup(config, metrics),
    }
    page["curves"] = history.curves(log, metrics)
    if not log:
        page["missing"]["curves"] = "log.jsonl holds no step, so there are no curves."
    if not metrics:
        page["missing"]["figures"] = (
            "metrics.json is not there: this run has not finished, so it has no figures."
        )
    page["environment"] = _environment(metrics)
    if metrics.get("stage") == "pretrain":
        page["stage"] = "pretrain"
        page["looks"] = history.looks(log)
        images = data or Path(config.get("data", {}).get("path", ""))
        features.add(page, metrics.get("probe") or {}, run, images)
        _add_guess(page)
        return page
    _add_figures(page, metrics)
    page["probabilities"] = "Probabilities are at temperature 1, those of a bundle at the fitted one."
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
    measured = manifest.figures.get("temperature", 1.0)
    page["probabilities"] = f"Probabilities are at temperature {tables.cell(measured)}" + (
        ", as the bundle serves them."
        if measured == manifest.temperature()
        else f"; the bundle serves {tables.cell(manifest.temperature())}: export it again for its figures."
    )
    page["parity"] = _flat(manifest.parity)
    for path in sorted((bundle / "engines").glob("*.json")):
        if f"engines/{path.name}" not in manifest.files:
            continue
        sidecar = json.loads(bundles.content(bundle, manifest, f"engines/{path.name}"))
        page["engines"].append((path.name.removesuffix(".json"), _flat(sidecar)))
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
    parts = (
        "curves",
        "roc",
        "samples",
        "matrices",
        "engines",
        "files",
        "rows",
        "classes",
        "speed",
        "confused",
        "looks",
        "neighbours",
    )
    page: Page = {part: [] for part in parts}
    blank: Page = {
        "probe": None,
        "map": None,
        "held_out": False,
        "best": None,
        "baselines": False,
        "noise": None,
        "parity": {},
        "config": "",
        "metrics": {},
        "guess": None,
        "probabilities": "",
    }
    return (
        page
        | blank
        | {"name": name, "kind": kind, "stage": "train", "missing": {}, "reliability": None, "sure": None}
    )


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
        "time": _duration(metrics.get("seconds")),
    }
    return {name: value for name, value in chosen.items() if value not in (None, "")}


def _environment(metrics: dict[str, Any]) -> dict[str, Any]:
    seen = {key: metrics[key] for key in ("device", "loader") if metrics.get(key)}
    return seen | _flat(metrics.get("machine") or {}) | _flat(metrics.get("versions") or {})


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
    rows += [
        (tables.words(name).replace("rgb", "RGB"), "logistic regression", figures)
        for name, figures in baselines.items()
    ]
    page["rows"] = [(name, note, figures) for name, note, figures in rows if figures]
    _add_guess(page)
    page["baselines"] = bool(baselines)
    if best.get("figures"):
        page["best"] = best
        page["confused"] = predictions.confused(page["classes"], best["figures"].get("confusion") or [])
        page["reliability"] = plots.reliability(best["figures"].get("reliability") or [])
        if best.get("calibration"):
            page["sure"] = best["calibration"] | {"plot": plots.risk(best["calibration"]["curve"])}
        _add_matrix(
            page, "Confusion matrix", best["figures"].get("confusion"), "true class", "predicted class"
        )
    if page["kind"] == "run" and metrics and not baselines:
        page["missing"]["baselines"] = "This run measured no baselines."


def _add_guess(page: Page) -> None:
    """What guessing gives: balanced accuracy is a mean over the classes that the measured images have."""
    found = page["rows"][0][2].get("sensitivity") or {} if page["rows"] else {}
    absent = [name for name, one in found.items() if (one or {}).get("value") is None]
    measured = len(page["classes"]) - len(absent)
    page["guess"] = 1 / measured if measured > 0 else None
    if absent and measured > 0:
        split = "validation" if page["stage"] == "pretrain" else "test"
        page["missing"]["classes"] = without_images(absent, split)


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
    _add_matrix(page, "Label noise asked", injected.get("asked_matrix"), "true class", "given label")
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


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as "a b" -> value; lists of numbers stay."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        label = f"{prefix}{NAMES.get(str(name), tables.words(str(name)))}"
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
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
