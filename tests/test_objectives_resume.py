"""Every objective, killed in the midst of an epoch, ends on the same bits as a run that nobody disturbed."""

import importlib.util
from pathlib import Path

import pytest

from noisyssl.objectives import OBJECTIVES

spec = importlib.util.spec_from_file_location("resuming", Path(__file__).with_name("test_resume.py"))
resuming = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resuming)

CASES = {
    **{name: [f"train.objective={name}"] for name in OBJECTIVES},
    "elr+": ["train.objective=elr", "train.elr.ema=0.9", "train.elr.mixup=1.0"],
    "truncated gce": ["train.objective=gce", "train.gce.truncate=0.2", "train.gce.start=1"],
}
"""Every objective, and what options turn into another one."""
QUICK = {
    "forward": ["train.forward.warmup=1"],
    "coteaching": ["train.coteaching.warmup=1", "train.coteaching.ramp=1"],
    "dividemix": ["train.dividemix.warmup=1"],
}
STOPS = (4, 9)
"""Checkpoints, one a step and one more after each epoch of six steps: in the first epoch and the second."""


KEEPS_STATE = ("elr", "forward", "coteaching", "dividemix")
"""Objectives with a memory of their own kind; the others differ from these in a formula only."""


@pytest.mark.parametrize(
    "name", [n if n in KEEPS_STATE else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_it_trains_resumes_to_the_bit_and_writes_finite_figures(name, tissue, tmp_path, monkeypatch):
    settings = ["train.checkpoint_minutes=0.0001", *CASES[name], *QUICK.get(name, [])]
    arguments = [
        "train", tissue, "--noise", "pair:0.3", *resuming.SETTINGS,
        *(part for one in settings for part in ("--set", one)),
    ]  # fmt: skip
    assert resuming.command(*arguments, "--out", tmp_path / "whole") == 0
    for number, stop in enumerate(STOPS):
        again = ["train", "--resume"] if number else arguments
        with monkeypatch.context() as patch:
            resuming.at_checkpoints(patch, {stop if number == 0 else stop - STOPS[0]: resuming.interrupt})
            assert resuming.command(*again, "--out", tmp_path / "run") == 130
    assert resuming.command("train", "--out", tmp_path / "run", "--resume") == 0
    resuming.assert_equal_runs(tmp_path / "run", tmp_path / "whole")
    found = resuming.metrics(tmp_path / "run")
    assert f"train.objective={found['objective']}" in settings
    assert 0 <= found["last"]["figures"]["balanced_accuracy"]["value"] <= 1
    assert found["objective_facts"] == resuming.metrics(tmp_path / "whole")["objective_facts"]
