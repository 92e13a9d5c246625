import json

import pytest

from noisyssl.benchmarks.job import measure
from noisyssl.errors import ConfigError


def figure(value: float) -> dict:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


FIGURES = {name: figure(0.8) for name in ("balanced_accuracy", "accuracy", "macro_auroc")}


def test_a_record_names_the_commit_that_ran_the_job(tmp_path):
    stage = {
        "best": {"figures": FIGURES}, "last": {"figures": FIGURES}, "baselines": {"mean_rgb": FIGURES},
        "images": {"train": 7, "val": 2, "test": 3}, "noise": {"spec": "none", "realised": 0.0},
        "device": "cpu", "loader": "dali-cpu",
    }  # fmt: skip
    result = {"pretrained": stage, "random": stage, "seconds": None, "settings": {}, "commit": "abc+changed"}
    (tmp_path / "result.json").write_text(json.dumps(result))
    one = measure(tmp_path, "demo")
    assert one["commit"] == "abc+changed"
    assert one["settings"]["images"] == 12
    assert one["figures"]["random start, LAST"]["95 % interval"] == "0.700-0.900"
    (tmp_path / "result.json").write_text(json.dumps({k: v for k, v in result.items() if k != "commit"}))
    assert measure(tmp_path, "demo")["commit"] is None, "unknown, not the commit of today"


def test_an_unfinished_build_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has no result\.json"):
        measure(tmp_path, "demo")
