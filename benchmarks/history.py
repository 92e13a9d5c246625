"""A run's log as curves: what the loss, the learning rate and the accuracy did over the epochs."""

import json
from pathlib import Path
from typing import Any

from noisyssl.benchmarks import plots
from noisyssl.benchmarks.tables import words

Entries = list[dict[str, Any]]
NOT_TERMS = (
    "kind", "step", "steps", "epoch", "epochs", "progress", "lr", "loss", "grad_norm", "skipped",
    "images_per_s", "seconds",
)  # fmt: skip
"""What a step's entry holds besides the terms of its objective."""


def read(path: Path) -> Entries:
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


def curves(log: Entries, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, SVG) of what the log holds."""
    steps = [one for one in log if one.get("kind") == "step" and isinstance(one.get("progress"), int | float)]
    epochs = [one for one in log if one.get("kind") == "epoch" and isinstance(one.get("epoch"), int)]
    total = max((one.get("epochs") or one.get("epoch") or 1 for one in [*steps, *epochs]), default=1)
    found = []

    def of_steps(title: str, key: str, smooth: bool = True) -> None:
        taken = [one for one in steps if isinstance(one.get(key), int | float)]
        if taken:
            line = plots.Line(
                name=key,
                colour="blue",
                x=[one["progress"] * total for one in taken],
                y=[one[key] for one in taken],
            )
            found.append((title, plots.curves([line], x="epoch", smooth=smooth)))

    if any(one.get("val") for one in epochs):
        found.append(_accuracy_curve(epochs, metrics))
    of_steps("Training loss", "loss")
    of_steps("Learning rate", "lr", smooth=False)
    of_steps("Images per second", "images_per_s")
    if metrics.get("stage") == "pretrain":
        of_steps("Gradient norm", "grad_norm")
        for term in dict.fromkeys(name for one in steps for name in one if name not in NOT_TERMS):
            of_steps(f"Term of the loss: {words(term)}", term)
    return found


def looks(log: Entries) -> list[tuple[str, str]]:
    """(title, SVG) of what a pretraining's frozen features were worth, look by look."""
    seen = {
        one["epoch"]: one for one in log if one.get("kind") == "probe" and isinstance(one.get("epoch"), int)
    }
    epochs = sorted(seen)
    entries = [seen[epoch] for epoch in epochs]  # the last of each epoch: a killed run may have two

    def plot(title: str, lines: dict[str, list[float | None]]) -> list[tuple[str, str]]:
        colours = dict(zip(lines, ("blue", "orange"), strict=False))
        drawn = [
            plots.Line(name=name, colour=colours[name], x=epochs, y=y)
            for name, y in lines.items()
            if any(value is not None for value in y)
        ]
        return [(title, plots.curves(drawn, x="epoch"))] if drawn else []

    def of(*path: str) -> list[float | None]:
        return [_number(one, path) for one in entries]

    ratios = [
        [
            None if std is None or not full else std / full
            for std, full in zip(of(*where, "std"), of(*where, "full_std"), strict=True)
        ]
        for where in ((), ("embedding",))
    ]
    return [
        *plot(
            "Balanced accuracy on validation images",
            {"k-NN": of("knn", "balanced_accuracy"), "linear probe": of("linear", "balanced_accuracy")},
        ),
        *plot(
            "Effective rank",
            {"features": of("effective_rank"), "embedding": of("embedding", "effective_rank")},
        ),
        *plot(
            "Standard deviation, as a share of the largest possible",
            {"features": ratios[0], "embedding": ratios[1]},
        ),
    ]


def _number(entry: Any, path: tuple[str, ...]) -> float | None:
    for name in path:
        entry = entry.get(name) if isinstance(entry, dict) else None
    return float(entry) if isinstance(entry, int | float) else None


def _accuracy_curve(epochs: Entries, metrics: dict[str, Any]) -> tuple[str, str]:
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
    mark = (float(best), at["balanced_accuracy"], f"BEST, epoch {best}") if at and best else None
    return "Balanced accuracy per epoch", plots.curves(lines, x="epoch", mark=mark)
