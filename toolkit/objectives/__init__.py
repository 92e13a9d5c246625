"""What fine-tuning minimises, by the name behind `--objective`. Adding one: its file, its line."""

from collections.abc import Callable
from functools import partial
from typing import Any

from noisyssl.losses import LOSSES
from noisyssl.objectives.supervised import Supervised

OBJECTIVES: dict[str, tuple[Callable[..., Supervised], type]] = {
    name: (partial(Supervised, loss=loss), loss.Config) for name, loss in LOSSES.items()
}
"""name: (maker of the objective from a classifier and its config, the config's class)."""


def build_objective(name: str, classifier: Any, config: Any) -> Supervised:
    """The objective called `name` around `classifier`."""
    make, _ = OBJECTIVES[name]
    return make(classifier, config)
