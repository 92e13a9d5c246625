"""What fine-tuning minimises, by the name behind `--objective`. Adding one: its file, its line."""

from collections.abc import Callable
from functools import partial
from typing import Any

from noisyssl.losses import LOSSES
from noisyssl.losses.elr import EarlyLearning
from noisyssl.objective import Given, Objective
from noisyssl.objectives.coteaching import CoTeaching
from noisyssl.objectives.dividemix import DivideMix
from noisyssl.objectives.elr import early_learning
from noisyssl.objectives.mixup import MixUp
from noisyssl.objectives.supervised import Supervised

OBJECTIVES: dict[str, tuple[Callable[..., Objective], type]] = {
    **{name: (partial(Supervised, loss=loss), loss.Config) for name, loss in LOSSES.items()},
    "elr": (early_learning, EarlyLearning.Config),
    "mixup": (MixUp, MixUp.Config),
    "coteaching": (CoTeaching, CoTeaching.Config),
    "dividemix": (DivideMix, DivideMix.Config),
}
"""name: (maker of the objective from a classifier, its config and what is given, the config's class)."""


def build_objective(name: str, classifier: Any, config: Any, given: Given) -> Objective:
    """The objective called `name` around `classifier`."""
    make, _ = OBJECTIVES[name]
    return make(classifier, config, given)
