"""The report of a noise grid: one HTML page, the same as Markdown, its cells as CSV, and the record."""

import datetime
import json
from pathlib import Path
from typing import Any

from noisyssl import __version__
from noisyssl.benchmarks import plots, tables
from noisyssl.benchmarks.noise import Place, failures
from noisyssl.benchmarks.noise_grid import Grid
from noisyssl.benchmarks.noise_summary import PLAIN, Row, cell_rows, summary
from noisyssl.benchmarks.records import Record, record
from noisyssl.benchmarks.report import environment
from noisyssl.disk import write_whole
from noisyssl.noise import parse
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.tables import table_text

COLOURS = ("blue", "orange", "green", "purple", "sky", "amber", "ink")


def write(grid: Grid, place: Place, samples: Samples) -> Record:
    """Write `report.html`, `report.md` and `cells.csv` beside the runs; the record of it all."""
    rows, cells = summary(grid, place, samples), cell_rows(grid, place)
    failed, served = failures(grid, place), bundles(grid, place)
    config = grid.config(grid.cells[0])
    facts = {
        "data": _name(config.data.path),
        "training images": len(samples.where("train")),
        "validation images": len(samples.where("val")),
        "test images": len(samples.where("test")),
        "classes": len(samples.classes),
        "backbone": config.backbone,
        "size": config.data.size,
        "pretraining epochs": config.pretrain.epochs,
        "training epochs": config.train.epochs,
        "validation labels": config.train.val_labels,
        "cells": f"{len(cells)} of {len(grid.cells)}",
    }
    names = list(dict.fromkeys(key for row in cells for key in row))
    write_whole(
        place.folder / "cells.csv",
        table_text({name: [_text(row.get(name)) for row in cells] for name in names}),
    )
    page = {
        "name": grid.name, "facts": facts, "rows": rows, "curves": curves(rows), "failed": failed,
        "baselines": baselines(rows), "choices": choices(rows), "served": served,
    }  # fmt: skip
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    html = environment().get_template("noise.html").render(page=page, version=__version__, today=today)
    write_whole(place.folder / "report.html", html)
    write_whole(place.folder / "report.md", markdown(page))
    settings = {key: value for key, value in facts.items() if key != "cells"} | {"grid": grid.name}
    return record("noise", settings=settings, figures=figures(rows, served), n=len(cells))


def figures(rows: list[Row], served: list[Row]) -> dict[str, Row]:
    """The rows of the record, by name."""
    out: dict[str, Row] = {}
    for row in rows:
        best, last = row["best_balanced_accuracy"], row["last_balanced_accuracy"]
        stable = row.get("stable_balanced_accuracy")
        out[f"{row['noise']}, {row['objective']}, {row['pretraining']}"] = {
            "seeds": row["seeds"], "realised": row["realised"],
            "BEST": best["mean"], "BEST sd": best["sd"], "LAST": last["mean"], "LAST sd": last["sd"],
            "by stability": stable["mean"] if stable else None,
            "LAST - random": row["gain_start"], f"LAST - {PLAIN}": row["gain_objective"],
            "seconds": row["seconds"],
        }  # fmt: skip
    for noise, one in baselines(rows).items():
        for name, figure in one.items():
            out[f"{noise}, baseline {name.replace('_', ' ')}"] = {
                "LAST": figure["mean"],
                "LAST sd": figure["sd"],
            }
    for one in served:
        out[f"served: {one['cell']}, {one['precision']}"] = {
            key: one[key] for key in ("balanced accuracy", "flips", "calibration error")
        }
    return out


def baselines(rows: list[Row]) -> dict[str, Row]:
    """Noise -> name of the baseline -> its spread: it depends on nothing but data and noise."""
    found: dict[str, Row] = {}
    for row in rows:
        own = {k.removeprefix("baseline_"): v for k, v in row.items() if k.startswith("baseline_") and v}
        if row["seeds"] >= max(r["seeds"] for r in rows if r["noise"] == row["noise"]):
            found.setdefault(row["noise"], own)
    return found


def choices(rows: list[Row]) -> list[Row]:
    """Validation against stability as the rule that chooses BEST, where both were watched."""
    return [row for row in rows if row.get("stable_balanced_accuracy")]


def bundles(grid: Grid, place: Place) -> list[Row]:
    """One row for each exported cell and precision: what the file that is served gives on the test images."""
    out: list[Row] = []
    for cell in grid.exported:
        path = place.served(cell)
        if not path.is_file():
            continue
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if "error" in manifest:
            out.append(
                {"cell": cell.name, "noise": cell.noise, "precision": "-", "why": manifest["error"]} | BLANK
            )
            continue
        for name, one in served_figures(manifest).items():
            out.append({"cell": cell.name, "noise": cell.noise, "precision": name} | one)
    return out


SERVED = {
    "balanced accuracy": "balanced_accuracy",
    "flips": "top1_changes",
    "calibration error": "calibration_error",
}
"""Column -> its name in a bundle's manifest."""
BLANK: Row = dict.fromkeys(SERVED)


def served_figures(manifest: dict[str, Any]) -> dict[str, Row]:
    """Name of the file that is served -> its figures on the test images; `why` if its gate kept it out."""
    return {
        form: {column: found.get(name) for column, name in SERVED.items()}
        | {"why": "" if found["passed"] else found["why"]}
        for form, found in manifest["precisions"].items()
    }


def curves(rows: list[Row]) -> list[tuple[str, str]]:
    """(title, SVG) of LAST over the rate, a plot for each kind of noise that has several rates."""
    kinds: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        noise = parse(row["noise"])
        if noise.rate is not None and noise.kind != "none":
            kind = f"{noise.kind}:{noise.source}" if noise.source else noise.kind
            kinds.setdefault(kind, {}).setdefault(noise.rate, []).append(row)
    clean = [row for row in rows if row["noise"] == "none"]
    found = []
    for kind, rates in kinds.items():
        if clean:
            rates = {0.0: clean} | rates
        if len(rates) < 2:
            continue
        names = dict.fromkeys((row["objective"], row["pretraining"]) for own in rates.values() for row in own)
        lines = []
        for place, (objective, start) in enumerate(names):
            points = [
                (rate, row["last_balanced_accuracy"])
                for rate, own in sorted(rates.items())
                for row in own
                if (row["objective"], row["pretraining"]) == (objective, start)
            ]
            lines.append(
                plots.Line(
                    name=f"{objective}, {start}",
                    colour=COLOURS[place % len(COLOURS)],
                    x=[rate for rate, _ in points],
                    y=[one["mean"] for _, one in points],
                    band=[
                        (one["mean"] - (one["sd"] or 0), one["mean"] + (one["sd"] or 0)) for _, one in points
                    ],
                )
            )
        found.append((f"LAST under {kind} noise", plots.curves(lines, x="noise rate asked", whole=False)))
    return found


def markdown(page: Row) -> str:
    """The page as Markdown: summary, rules of choice, baselines, exported files, failures."""
    parts = [f"# Label noise: {page['name']}", ", ".join(f"{k} {v}" for k, v in page["facts"].items())]
    head = (
        "noise",
        "objective",
        "pretraining",
        "seeds",
        "realised",
        "BEST",
        "LAST",
        "LAST - random",
        f"LAST - {PLAIN}",
        "s",
    )
    parts.append(
        tables.laid_out(head, [
            (
                row["noise"], row["objective"], row["pretraining"], row["seeds"], f"{row['realised']:.3f}",
                spread(row["best_balanced_accuracy"]), spread(row["last_balanced_accuracy"]),
                gain(row["gain_start"]), gain(row["gain_objective"]), f"{row['seconds']:.0f}",
            )
            for row in page["rows"]
        ])
    )  # fmt: skip
    parts.append(
        "Test balanced accuracy, mean ± standard deviation over seeds; gains are paired, with 95 % bootstrap "
        "intervals over seeds and groups of test images."
    )
    if page["choices"]:
        parts.append(
            tables.laid_out(("noise", "objective", "pretraining", "by validation", "by stability"), [
                (
                    row["noise"], row["objective"], row["pretraining"],
                    spread(row["best_balanced_accuracy"]), spread(row["stable_balanced_accuracy"]),
                )
                for row in page["choices"]
            ])
        )  # fmt: skip
    parts.append(
        tables.laid_out(("noise", "baseline", "balanced accuracy"), [
            (noise, name.replace("_", " "), spread(one))
            for noise, own in page["baselines"].items() for name, one in own.items()
        ])
    )  # fmt: skip
    if page["served"]:
        parts.append(
            tables.laid_out(("cell", "precision", *SERVED, "left out"), [
                (
                    one["cell"], one["precision"],
                    *(tables.cell(one[key]) for key in BLANK), one["why"] or "",
                )
                for one in page["served"]
            ])
        )  # fmt: skip
    parts += [f"failed: {name}: {error.strip().splitlines()[-1]}" for name, error in page["failed"].items()]
    return "\n\n".join(parts) + "\n"


def spread(one: Row | None) -> str:
    """Mean ± standard deviation."""
    if one is None:
        return "-"
    return f"{one['mean']:.3f}" + ("" if one["sd"] is None else f" ± {one['sd']:.3f}")


def gain(one: Row | None) -> str:
    """A signed value and its interval."""
    if one is None:
        return "-"
    if one["low"] is None:
        return f"{one['value']:+.3f}"
    return f"{one['value']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def _name(path: str) -> str:
    where = Path(path)
    return where.parent.name if where.suffix else where.name


def _text(value: Any) -> Any:
    return "" if value is None else value
