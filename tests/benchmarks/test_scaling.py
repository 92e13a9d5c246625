"""Both sides of the scaling benchmark take their turns and end."""

from dataclasses import replace

import pytest

from noisyssl.benchmarks import scaling
from noisyssl.errors import ConfigError, MachineError

TINY = scaling.Work(batch=4, steps=1)


def test_one_and_two_processes_take_turns(tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text('backbone = "resnet18-w16"\ndata.size = 32\n')
    made = scaling.measure(replace(TINY, recipe=str(recipe)), processes=2, runs=2)
    figures = made["figures"]
    assert figures["1 process images/s"] > 0
    assert figures["2 processes images/s"] > 0
    assert made["settings"]["processes"] == 2
    assert made["settings"]["backend"] in ("gloo", "nccl")
    assert made["n"] == 2
    assert set(made["spread"]) == set(figures)


def test_efficiency_is_the_time_of_one_over_the_time_of_many(monkeypatch):
    """Two processes that take as long as one have done twice the work: no loss."""
    took = {1: 2.0, 4: 2.5}
    monkeypatch.setattr(scaling, "start", lambda folder, count: FakeSide())
    monkeypatch.setattr(
        scaling,
        "take_turn",
        lambda f, count, turn, side: {"seconds": took[count], "device": "", "backend": ""},
    )
    figures = scaling.measure(TINY, processes=4, runs=3)["figures"]
    assert figures["1 process images/s"] == pytest.approx(4 / 2.0)
    assert figures["4 processes images/s"] == pytest.approx(4 * 4 / 2.5)
    assert figures["efficiency"] == pytest.approx(0.8)


def test_one_process_is_not_compared_with_one():
    with pytest.raises(ConfigError, match="--processes is 1"):
        scaling.measure(TINY, processes=1)


def test_a_side_that_ends_early_is_an_error(tmp_path):
    with pytest.raises(MachineError, match="the side of 2 processes ended with code 4"):
        scaling.take_turn(tmp_path, 2, 0, FakeSide(4))


class FakeSide:
    def __init__(self, code=None):
        self.returncode = code

    def poll(self):
        return self.returncode

    def wait(self):
        return 0
