"""The rules that choose BEST, on sequences whose answer is known."""

import numpy as np
import pytest

from noisyssl.pipelines.choosing import WINDOW, Choices, Stability, Validation


class Memory:
    """What `Kept` does with predictions, without files."""

    def __init__(self) -> None:
        self.rows: dict[int, np.ndarray] = {}

    def put_predicted(self, epoch: int, classes: np.ndarray) -> None:
        self.rows[epoch] = classes

    def predicted(self, epoch: int) -> np.ndarray:
        return self.rows[epoch]


def predictions(changes: list[int], count: int = 100) -> list[np.ndarray]:
    """Predicted classes of len(changes) + 1 epochs, of which so many differ from the epoch before."""
    rows = [np.zeros(count, int)]
    for changed in changes:
        following = rows[-1].copy()
        following[:changed] += 1
        rows.append(following)
    return rows


def naive(changes: list[int]) -> int:
    """The epoch of the first local minimum of the moving average, from the definition."""
    means = [np.mean(changes[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(changes))]
    for place in range(1, len(means)):
        if means[place] > means[place - 1]:
            return place - 1 + 2  # changes start at epoch 2
    return len(means) + 1


@pytest.mark.parametrize(
    "changes",
    [[50, 40, 30, 20, 60, 80], [50, 40, 60, 10, 5, 1], [9, 8, 7, 6], [5, 50], [5], [30, 10, 12, 11, 40]],
)
def test_stability_takes_the_first_local_minimum_and_never_a_later_one(changes):
    rule, rows, taken = Stability({}), predictions(changes), 0
    for epoch, now in enumerate(rows, start=1):
        if rule.takes(epoch, rows[epoch - 2] if epoch > 1 else None, now):
            taken = epoch
    assert taken == rule.facts["epoch"] == naive(changes)


def test_validation_takes_the_first_of_the_highest():
    rule = Validation({})
    assert [rule.takes(epoch, score) for epoch, score in enumerate((0.3, 0.5, 0.5, 0.4, 0.6), start=1)] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert rule.facts == {"epoch": 5, "score": 0.6}


@pytest.mark.parametrize(("rule", "best"), [("stability", 3), ("both", 4)])
def test_both_are_watched_where_stability_chooses_or_is_compared_and_go_on_from_their_facts(rule, best):
    rows = predictions([50, 40, 60, 80])
    facts, memory = {}, Memory()
    for epoch, score in enumerate((0.2, 0.3, 0.4, 0.9, 0.1), start=1):
        choices = Choices(rule, facts, memory)  # as after a kill between any two epochs
        choices.look(epoch, score, lambda epoch=epoch: rows[epoch - 1])
    assert choices.epochs() == {"validation": 4, "stability": 3}
    assert choices.best() == best


def test_validation_alone_never_asks_for_predictions():
    choices = Choices("validation", {}, None)
    assert choices.look(1, 0.5, lambda: pytest.fail("asked"))
    assert choices.epochs() == {"validation": 1}
