"""What the report shows of frozen features: a 2-D map, and images beside their nearest neighbours.

Read from the run's `probe.npz`, which `noisyssl.pipelines.watch` writes.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from noisyssl.benchmarks import plots, predictions, tables
from noisyssl.errors import DataError, NoisySSLError

NAMES = (
    "classes", "map", "map_index", "map_label", "query_index", "query_label", "near_index", "near_label",
    "near_cosine",
)  # fmt: skip
MOST = 10_000
"""More rows than a run writes; a page of them would be no use."""
Picture = Callable[[int], tuple[str, str] | None]


def add(page: dict[str, Any], probe: dict[str, Any], run: Path, data: Path) -> None:
    """Put what is known of frozen features on the page of a pretraining run.

    Args:
        probe: `metrics.json`'s entry of that name.
        data: where the images are.
    """
    rows = [
        ("k-NN", f"{probe.get('k', '?')} nearest training images vote", probe.get("knn")),
        (
            "linear probe",
            f"logistic regression, C = {tables.cell(probe.get('strength'))}",
            probe.get("linear"),
        ),
    ]
    page["rows"] = [row for row in rows if row[2]]
    page["probe"] = probe or None
    page["held_out"] = bool((probe.get("images") or {}).get("val"))
    if page["rows"]:
        page["classes"] = list(page["rows"][0][2].get("sensitivity") or [])
    elif probe:
        page["missing"]["figures"] = (
            "No k-NN and no linear probe: the data has no labelled validation images."
        )
    try:
        found = load(run / "probe.npz")
    except DataError as error:
        page["missing"]["features"] = f"No map of the features and no neighbours: {error}"
        return
    page["map"] = drawn(found)
    if page["map"] is None:
        page["missing"]["map"] = (
            "No map of the features: there are fewer than 10 images, or all look the same."
        )
    try:
        page["neighbours"] = sheet(found, predictions.pictures(run / "samples.csv", data))
    except NoisySSLError as error:
        page["missing"]["neighbours"] = f"Nearest neighbours are left out: {error}"
        return
    if not page["neighbours"]:
        page["missing"]["neighbours"] = (
            "Nearest neighbours are left out: no image could be read. Name --data."
        )


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a run's `probe.npz`.

    Raises:
        DataError: it is missing, broken or not what a run writes.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: stored[name] for name in NAMES}
    except FileNotFoundError:
        raise DataError(f"{path.name} is not there; the probe was off (pretrain.probe_every is 0).") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path.name} cannot be read ({type(error).__name__}).") from None
    points, queries = len(found["map_index"]), len(found["query_index"])
    near = found["near_index"].shape[1:]
    shapes = {
        "map": (points, 2), "map_index": (points,), "map_label": (points,), "query_index": (queries,),
        "query_label": (queries,), "near_index": (queries, *near), "near_label": (queries, *near),
        "near_cosine": (queries, *near), "classes": (len(found["classes"]),),
    }  # fmt: skip
    labels = np.concatenate([found[name].ravel() for name in NAMES if name.endswith("_label")])
    good = (
        all(found[name].shape == shape for name, shape in shapes.items())
        and len(near) == 1
        and max(points, queries) <= MOST
        and found["classes"].dtype.kind == "U"
        and labels.dtype.kind == "i"
        and bool(((labels >= -1) & (labels < len(found["classes"]))).all())
        and all(bool(np.isfinite(found[name]).all()) for name in ("map", "near_cosine"))
    )
    if not good:
        raise DataError(f"{path.name} does not hold what a run writes.")
    return found


def drawn(found: dict[str, np.ndarray]) -> str | None:
    """SVG of the 2-D map; None where a run made none."""
    if not len(found["map"]):
        return None
    return plots.scatter(found["map"], found["map_label"], found["classes"].tolist())


def sheet(found: dict[str, np.ndarray], picture: Picture) -> list[list[dict[str, Any]]]:
    """One row of cards for each query whose image can be read: itself, then its neighbours, nearest first."""
    names = [*found["classes"].tolist(), ""]  # -1 finds the last

    def card(index: int, label: int, **more: Any) -> dict[str, Any] | None:
        image = picture(index)
        return image and {"picture": image[0], "path": image[1], "label": names[label]} | more

    rows = []
    for i, own in enumerate(found["query_label"].tolist()):
        query = card(int(found["query_index"][i]), own, cosine=None, is_same=None)
        others = zip(
            found["near_index"][i], found["near_label"][i].tolist(), found["near_cosine"][i], strict=True
        )
        near = [
            card(
                int(index),
                label,
                cosine=float(cosine),
                is_same=own == label if min(own, label) >= 0 else None,
            )
            for index, label, cosine in others
        ]
        if query is not None and any(near):
            rows.append([query, *(one for one in near if one)])
    return rows
