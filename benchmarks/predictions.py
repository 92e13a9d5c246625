"""What the report shows of stored predictions: ROC curves, and pictures of right and wrong ones."""

import base64
import hashlib
import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from noisyssl.benchmarks import plots
from noisyssl.errors import ConfigError, DataError, MachineError
from noisyssl.images import BadImage, decode, read
from noisyssl.pipelines.decoding import pixel_digest
from noisyssl.pipelines.sources import read_source
from noisyssl.pipelines.tables import read_own_table

SHOWN, SIDE = 8, 128
"""Sample pictures of each kind, and their longer side in pixels."""
MOST_CURVES = 30


def load(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, K) probabilities, (N,) labels, (N,) sample indices of a run's `predictions.npz`.

    Raises:
        DataError: it is missing, broken or of another number of classes.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            logits, labels, index = stored["logits"].astype(float), stored["labels"], stored["index"]
    except FileNotFoundError:
        raise DataError(f"{path.name} is not there.") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path.name} cannot be read ({type(error).__name__}).") from None
    if logits.ndim != 2 or logits.shape != (len(labels), classes) or len(index) != len(labels):
        raise DataError(f"{path.name} has logits of shape {logits.shape}; expected {(len(labels), classes)}.")
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= classes or not np.isfinite(logits).all():
        raise DataError(f"{path.name} has no rows, unknown labels or logits that are not finite.")
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True), labels, index


def curves(
    probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> tuple[list[tuple[str, float, str]], list[str]]:
    """(class, area, SVG) of each class against the rest, and the classes that have no curve.

    Raises:
        MachineError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import auc, roc_curve
    except ImportError:
        raise MachineError(
            "package 'scikit-learn' is missing; the report computes ROC curves with it. "
            "Run `pip install 'noisyssl[train]'`."
        ) from None
    found, absent = [], []
    for k, name in enumerate(classes[:MOST_CURVES]):
        own = labels == k
        if own.all() or not own.any():
            absent.append(name)
            continue
        false_rate, true_rate, _ = roc_curve(own, probabilities[:, k])
        found.append((name, float(auc(false_rate, true_rate)), plots.roc(false_rate, true_rate)))
    return found, absent


def chosen(probabilities: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict[str, list[int]]:
    """Rows to show by title: random right ones, random wrong ones, the most confident wrong ones."""
    wrong = probabilities.argmax(axis=1) != labels
    draw = np.random.default_rng(seed).permutation(len(labels))
    sure = np.argsort(-probabilities.max(axis=1), kind="stable")
    rows = {
        "Right, at random": draw[~wrong[draw]],
        "Wrong, at random": draw[wrong[draw]],
        "Wrong and most confident": sure[wrong[sure]],
    }
    return {title: row[:SHOWN].tolist() for title, row in rows.items()}


def confused(
    classes: Sequence[str], matrix: Sequence[Sequence[float]], most: int = 8
) -> list[dict[str, Any]]:
    """The `most` frequent mistakes in a (K, K) confusion matrix: true, predicted, count, share of the row."""
    found: list[dict[str, Any]] = [
        {"true": classes[i], "predicted": classes[j], "count": count, "share": count / sum(row)}
        for i, row in enumerate(matrix)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(found, key=lambda one: -float(one["count"]))[:most]


def pictures(samples: Path, data: Path) -> Callable[[int], tuple[str, str] | None]:
    """A function from a sample's index to (JPEG data URI, path), or None where its image cannot be read.

    Only images that the source `data` itself lists are opened, whatever `samples.csv` says, and only those
    that are still what the run saw are shown.

    Raises:
        ConfigError: `data` does not exist.
        DataError: `samples.csv` or the source is broken.
    """
    if not data.exists():
        raise ConfigError(f"{data} does not exist; say where it is now with --data DATA.")
    paths, digests = read_own_table(samples, ["path", "digest"]).values()
    listing = read_source(data)
    rows = {path: row for row, path in enumerate(listing.paths)}

    def picture(index: int) -> tuple[str, str] | None:
        row = rows.get(paths[index]) if 0 <= index < len(paths) else None
        if row is None:
            return None
        if listing.array is not None:
            pixels = np.asarray(listing.array[row])
            return (thumbnail(pixels), paths[index]) if pixel_digest(pixels).hex() == digests[index] else None
        try:
            data = read(listing.root / paths[index])
            if hashlib.sha256(data).hexdigest() != digests[index]:
                return None
            return thumbnail(decode(data)), paths[index]
        except BadImage:
            return None

    return picture


def thumbnail(pixels: np.ndarray) -> str:
    """(H, W, 3) uint8 as a JPEG data URI of at most `SIDE` pixels a side."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    target = io.BytesIO()
    image.save(target, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(target.getvalue()).decode()
