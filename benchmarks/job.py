"""Question of a finished `noisyssl build` or `noisyssl demo`: what came out, in how many seconds."""

import json
from pathlib import Path
from typing import Any

from noisyssl.benchmarks.records import Record, record
from noisyssl.errors import ConfigError

FIGURES = ("balanced_accuracy", "accuracy", "macro_auroc")


def measure(folder: Path, question: str) -> Record:
    """The record called `question` of the folder that `noisyssl build` or `demo` made.

    Raises:
        ConfigError: the build there has not finished.
    """
    path = folder / "result.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no result.json; give the folder of a finished `noisyssl build` or `demo`."
        )
    result = json.loads(path.read_text(encoding="utf-8"))
    figures: dict[str, Any] = {}
    for key, name in (("pretrained", "self-supervised start"), ("random", "random start")):
        if key in result:
            figures[f"{name}, BEST"] = _row(result[key]["best"]["figures"])
            figures[f"{name}, LAST"] = _row(result[key]["last"]["figures"])
    tuned = result["pretrained"]
    for name, baseline in tuned["baselines"].items():
        figures[f"baseline {name.replace('_', ' ')}"] = _row(baseline)
    settings = {
        "seconds": result["seconds"] and round(result["seconds"]),
        "images": sum(tuned["images"].values()),
        "test images": tuned["images"]["test"],
        "noise": tuned["noise"]["spec"],
        "realised": round(tuned["noise"]["realised"], 4),
        "device": tuned["device"],
        "loader": tuned["loader"],
        **result["settings"],
    }
    return record(question, settings=settings, figures=figures, n=1) | {"commit": result.get("commit")}


def _row(figures: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name in FIGURES:
        value = figures[name]
        out[name.replace("_", " ")] = value["value"]
        if name == "balanced_accuracy":
            out["95 % interval"] = "-" if value["low"] is None else f"{value['low']:.3f}-{value['high']:.3f}"
    return out
