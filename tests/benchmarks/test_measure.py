import time

import pytest

from noisyssl.benchmarks.measure import Spread, interleaved, rate, ratio


def test_rounds_alternate_and_warm_rounds_do_not_count():
    calls: list[str] = []
    sides = {"b": lambda: calls.append("b"), "a": lambda: calls.append("a")}
    seconds = interleaved(sides, warm=1, runs=3)
    assert {name: len(values) for name, values in seconds.items()} == {"b": 3, "a": 3}
    assert "".join(calls) == "abbaabba"


def test_seconds_are_those_of_the_side():
    seconds = interleaved({"fast": lambda: None, "slow": lambda: time.sleep(0.02)}, warm=0, runs=3)
    assert min(seconds["slow"]) >= 0.02
    assert Spread.of(seconds["fast"]).median < 0.01


def test_ratio_divides_within_a_round():
    ours, theirs = [1.0, 10.0, 2.0], [3.0, 30.0, 6.0]
    assert ratio(theirs, ours) == Spread(median=3.0, p10=3.0, p90=3.0)
    with pytest.raises(ValueError):
        ratio([1.0], [1.0, 2.0])


def test_spread_and_rate_are_percentiles():
    assert Spread.of(range(11)) == Spread(median=5.0, p10=1.0, p90=9.0)
    assert rate(10, [1.0, 2.0, 5.0]).median == 5.0
