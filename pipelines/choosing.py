"""Which epoch is BEST: by validation labels, or by how steady the predictions on training images are.

Neither asks for a clean label. Validation labels may be as noisy as those that train: the best epoch on them
is near the best on clean ones in many settings (arXiv:2409.06830). Label Wave needs no validation images:
before a network memorises wrong labels its predictions on the training images change least from one epoch to
the next (Yuan, Feng & Liu, ICLR 2024, arXiv:2502.07551).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from noisyssl.pipelines.kept import Kept

WINDOW = 3
"""Epochs over which the share of changed predictions is averaged."""


class Validation:
    """The epoch with the highest balanced accuracy on validation; the first of equals."""

    name = "validation"

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def takes(self, epoch: int, score: float) -> bool:
        """Whether this epoch is the best so far."""
        if self.facts and score <= self.facts["score"]:
            return False
        self.facts.update(epoch=epoch, score=score)
        return True


class Stability:
    """Label Wave: the first local minimum of the smoothed share of changed predictions; the last epoch so far
    where it has not risen yet.

    The authors take predictions as training sees the images; here they are those on evaluation views, so that
    a change is the network's and not the augmentation's.
    """

    name = "stability"

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        facts.setdefault("changes", [])  # of epochs 2, 3, ...
        facts.setdefault("risen", False)

    def takes(self, epoch: int, before: np.ndarray | None, now: np.ndarray) -> bool:
        """Whether this epoch is the choice so far.

        Args:
            before: (M,) predicted classes of the epoch before; None in the first epoch.
            now: (M,) predicted classes of this one.
        """
        if before is None:
            self.facts["epoch"] = epoch
            return True
        old = smoothed(self.facts["changes"])
        self.facts["changes"].append(float((before != now).mean()))
        if self.facts["risen"] or (old is not None and smoothed(self.facts["changes"]) > old):
            self.facts["risen"] = True
            return False
        self.facts["epoch"] = epoch
        return True


def smoothed(changes: list[float]) -> Any:
    """The mean of the last `WINDOW` shares; None of none."""
    return float(np.mean(changes[-WINDOW:])) if changes else None


class Choices:
    """Both rules over one training, or that by validation alone; what they remember lies in `facts`.

    Args:
        rule: validation or stability, the one that BEST goes by; both: validation, stability is watched.
        facts: of the training's state, JSON only.
        kept: holds the predictions of the epoch before.
    """

    def __init__(self, rule: str, facts: dict[str, Any], kept: Kept) -> None:
        self.rule, self.kept = "validation" if rule == "both" else rule, kept
        self.validation = Validation(facts.setdefault("best", {}))
        self.stability = Stability(facts.setdefault("stability", {})) if rule != "validation" else None

    def look(self, epoch: int, score: float, predicted: Callable[[], np.ndarray]) -> bool:
        """Whether one of the rules takes this epoch so far.

        Args:
            score: balanced accuracy on validation.
            predicted: gives the (M,) predicted classes of the training images, if they are asked for.
        """
        taken = self.validation.takes(epoch, score)
        if self.stability is None:
            return taken
        now = predicted()
        before = self.kept.predicted(epoch - 1) if epoch > 1 else None
        self.kept.put_predicted(epoch, now)
        return self.stability.takes(epoch, before, now) or taken

    def epochs(self) -> dict[str, int]:
        """The epoch that each rule takes so far, by its name; empty before the first look."""
        rules = (self.validation, self.stability)
        return {rule.name: rule.facts["epoch"] for rule in rules if rule and "epoch" in rule.facts}

    def best(self) -> int:
        """The epoch that BEST is."""
        return self.epochs()[self.rule]
