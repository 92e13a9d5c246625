"""Watching a pretraining learn: what its frozen features are worth, between epochs and at the end.

Labels are looked at here and never by the training, and the test split is not touched: features of training
images vote on the labels of validation images (k-NN) or are fitted to predict them (linear probe). Nothing of
the training changes: its networks are evaluated as they stand, and torch's generators are not drawn from.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from noisyssl import probe
from noisyssl.config import Config
from noisyssl.distributed import rank
from noisyssl.evaluation import Figures, figures
from noisyssl.pipelines.embed import write_arrays
from noisyssl.pipelines.evaluate import evaluating, evaluation_images, logits_of, whole
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.state import State

BANK, QUERIES = 2000, 1000
"""Most training and validation images that are looked at."""
EMBEDDED = 1000
"""Of those training images, the ones whose embedding is measured: it may be 8,192 wide, and its rank slow."""
POINTS, SHOWN, NEAREST = 1000, 8, 5
"""Points of the 2-D map; queries on the contact sheet, and neighbours shown of each."""


@dataclass(frozen=True)
class Truth:
    """Labels that measure features, kept apart from the samples that train."""

    classes: tuple[str, ...]
    labels: np.ndarray
    """(N,) int64 over all samples: the true label where it is known, else the given one, else -1."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the networks make of the images after some epoch."""

    bank: np.ndarray
    """(M, D) float32 features of training images."""
    queries: np.ndarray
    """(Q, D) float32 features of validation images."""
    spreads: dict[str, probe.Spread]
    """Of the bank's `features`, and of their `embedding` where the method has a projector."""
    scores: dict[str, np.ndarray]
    """(Q', K) predictions of `knn` and `linear` for labelled queries; empty if labels do not allow it."""
    strength: float | None = None
    """C of the linear probe."""


@contextmanager
def watching(
    config: Config, samples: Samples, truth: Truth | None, run: Run, dropped: Mapping[int, str]
) -> Iterator["Watch"]:
    """A watch over this pretraining; with `probe_every` 0, and in all processes but the first, it sleeps.

    The images lie in a nameless file in the run's folder while it lasts. Samples that training `dropped` are
    left out; another file that broke since the scan is left out with a warning.
    """
    watch = Watch(config, samples, truth or Truth((), np.full(len(samples), -1)), run)
    if not config.pretrain.probe_every or rank() > 0:
        yield watch
        return
    geometry = (config.data.size, config.data.fit, config.threads, run.folder)
    broken = dict(dropped)
    with evaluation_images(samples, np.append(watch.bank, watch.queries), *geometry, broken) as images:
        for index in broken.keys() - dropped.keys():
            run.log({"kind": "warning", "message": f"left out of the probe: {broken[index]}"})
        watch.open(images, broken)
        yield watch


class Watch:
    """The same images at every look."""

    def __init__(self, config: Config, samples: Samples, truth: Truth, run: Run) -> None:
        self.every, self.epochs = config.pretrain.probe_every, config.pretrain.epochs
        self.truth, self.run = truth, run
        self.groups = np.array(samples.groups)
        rng = np.random.default_rng(config.seed)
        self.bank = rng.permutation(samples.where("train"))[:BANK]
        self.queries = rng.permutation(samples.where("val"))[:QUERIES]
        self.is_held_out = len(self.queries) > 0
        if not self.is_held_out and len(self.bank) > 2 * SHOWN:  # some still show their neighbours
            self.queries, self.bank = self.bank[:SHOWN], self.bank[SHOWN:]
        self.images: np.ndarray | None = None
        self.whole = np.arange(0)
        """Rows of `images` that could be decoded."""
        self.last: Look | None = None
        self.looked = -1
        """The epoch of `last`, which is None where nothing could be measured."""

    def open(self, images: np.ndarray, broken: Mapping[int, str]) -> None:
        """Take the (M + Q, S, S, 3) uint8 views of bank and queries; samples in `broken` are left out."""
        rows = np.append(self.bank, self.queries)
        self.images, self.whole = images, np.flatnonzero(whole(rows, broken))
        rows = rows[self.whole]
        split = int((self.whole < len(self.bank)).sum())
        self.bank, self.queries = rows[:split], rows[split:]

    def look(self, epoch: int, state: State) -> None:
        """Measure and log where it is time: at the start (0), every `probe_every` epochs, at the end."""
        if self.images is None or (epoch % self.every and epoch != self.epochs):
            return
        began = time.monotonic()
        self.last, self.looked = self._measured(state), epoch
        seen = self.last
        if seen is None:
            return
        entry: dict[str, Any] = {"kind": "probe", "epoch": epoch, "step": state.step}
        for name in seen.scores:
            result = self._figures(seen, name, resamples=0)
            entry[name] = {key: getattr(result, key).value for key in ("balanced_accuracy", "accuracy")}
        entry |= asdict(seen.spreads["features"])
        if "embedding" in seen.spreads:
            entry["embedding"] = asdict(seen.spreads["embedding"])
        self.run.log(entry | {"seconds": time.monotonic() - began})
        for name, spread in seen.spreads.items():
            if epoch and spread.is_collapsed():
                self._warn(
                    state,
                    f"after epoch {epoch} the {name} of all images is nearly the same (standard deviation "
                    f"{spread.std:.2g} of at most {spread.full_std:.2g}, effective rank "
                    f"{spread.effective_rank:.1f}): the run has collapsed or is about to; "
                    "lower pretrain.lr, raise pretrain.batch or try another method.",
                )

    def final(self, state: State) -> dict[str, Any] | None:
        """The figures at the end, of validation images; None if nothing was looked at.

        Writes `probe.npz` for the report: a 2-D map, and the nearest training images of a few others.
        """
        if self.images is None:
            return None
        seen = self.last
        if self.looked != self.epochs:  # resumed after the last epoch
            seen = self._measured(state)
        if seen is None:
            return None
        write_arrays(self.run.folder / "probe.npz", self._pictures(seen))
        found: dict[str, Any] = {name: self._figures(seen, name).to_json() for name in seen.scores}
        if seen.scores:
            found |= {"k": self._k(), "strength": seen.strength}
        found |= {name: asdict(spread) for name, spread in seen.spreads.items()}
        return found | {
            "images": {"train": len(seen.bank), "val": len(seen.queries) if self.is_held_out else 0},
            "collapsed": any(spread.is_collapsed() for spread in seen.spreads.values()),
        }

    def _measured(self, state: State) -> Look | None:
        """Everything that is measured; None, with a warning, where a feature is not finite."""
        assert self.images is not None
        method: Any = state.trained()
        device = next(method.parameters()).device
        features = logits_of(method.backbone, self.images, device)[self.whole]
        if not np.isfinite(features).all():
            self._warn(state, "features are not finite, so they were not probed; lower pretrain.lr.")
            return None
        bank, queries = features[: len(self.bank)], features[len(self.bank) :]
        spreads = {"features": probe.spread(bank)}
        if (embedding := projected(method, bank[:EMBEDDED], device)) is not None:
            spreads["embedding"] = probe.spread(embedding)
        seen = Look(bank=bank, queries=queries, spreads=spreads, scores={})
        labels, classes = self.truth.labels[self.bank], len(self.truth.classes)
        known = self._known()
        if len(np.unique(labels[labels >= 0])) < 2 or not len(known):
            return seen
        votes = probe.knn(bank, labels, queries[known], classes, self._k())
        fitted, strength = probe.linear(bank, labels, self.groups[self.bank], queries[known], classes)
        return replace(seen, scores={"knn": votes, "linear": fitted}, strength=strength)

    def _k(self) -> int:
        return min(probe.NEIGHBOURS, int((self.truth.labels[self.bank] >= 0).sum()))

    def _known(self) -> np.ndarray:
        """Rows of the held-out queries that have a label."""
        return np.flatnonzero(self.truth.labels[self.queries] >= 0) if self.is_held_out else np.arange(0)

    def _figures(self, seen: Look, name: str, **more: int) -> Figures:
        rows = self.queries[self._known()]
        return figures(
            seen.scores[name], self.truth.labels[rows], self.groups[rows], self.truth.classes, **more
        )

    def _pictures(self, seen: Look) -> dict[str, np.ndarray]:
        """Arrays of `probe.npz`; every index is a row of `samples.csv`, label -1 is unknown."""
        labels = self.truth.labels
        rows = np.append(self.queries, self.bank)[:POINTS]
        points = probe.flat_map(np.concatenate([seen.queries, seen.bank])[:POINTS])
        rows = rows[: len(points)]
        shown = one_of_each(labels[self.queries], SHOWN)
        k = min(NEAREST, len(self.bank)) if len(shown) else 0
        near, cosine = (
            probe.neighbours(seen.queries[shown], seen.bank, k) if k else (np.zeros((0, 0), int),) * 2
        )
        return {
            "classes": np.array(self.truth.classes or ("",)),
            "map": points,
            "map_index": rows,
            "map_label": labels[rows],
            "query_index": self.queries[shown],
            "query_label": labels[self.queries[shown]],
            "near_index": self.bank[near],
            "near_label": labels[self.bank[near]],
            "near_cosine": cosine.astype(np.float32),
        }

    def _warn(self, state: State, message: str) -> None:
        self.run.log({"kind": "warning", "step": state.step, "message": message})


def projected(method: nn.Module, features: np.ndarray, device: torch.device) -> np.ndarray | None:
    """(M, E) float32 outputs of `method.projector` in evaluation mode; None if it takes no such features.

    A joint-embedding method collapses here first: BatchNorm keeps the features before it apart.
    """
    projector = getattr(method, "projector", None)
    if not isinstance(projector, nn.Module):
        return None
    first = next((layer for layer in projector.modules() if isinstance(layer, nn.Linear)), None)
    if first is None or first.in_features != features.shape[1]:
        return None
    with evaluating(projector), torch.no_grad():
        return projector(torch.from_numpy(features).to(device)).float().cpu().numpy()


def one_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Up to `count` rows: the first of each label, then the second of each, and so on."""
    turn = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        turn[labels == label] = np.arange((labels == label).sum())
    return np.argsort(turn, kind="stable")[:count]
