"""The benchmark behind "resumes to the same bits", with two kills; `make test-slow` runs the ten."""

import pytest

from noisyssl.benchmarks.kill import measure


def assert_all_resumed(figures: dict, kills: int, inside: int) -> None:
    assert figures == {
        "killed": kills, "inside a write": inside, "resumed": kills,
        "equal bit for bit": kills, "unreadable checkpoints": 0,
    }  # fmt: skip


@pytest.mark.slow
def test_two_killed_runs_resume_to_the_same_bits(tmp_path):
    assert_all_resumed(measure(tmp_path, kills=2, inside=1)["figures"], 2, 1)


@pytest.mark.slow
def test_ten_killed_runs_resume_to_the_same_bits(tmp_path):
    assert_all_resumed(measure(tmp_path, kills=10, inside=4, seed=1)["figures"], 10, 4)
