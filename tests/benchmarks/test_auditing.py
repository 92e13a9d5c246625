import numpy as np
import pytest

from noisyssl.benchmarks import auditing
from noisyssl.config import Config, DataConfig
from noisyssl.pipelines.embed import random_backbone
from noisyssl.pipelines.scan import open_samples


def test_figures_are_counted_by_hand():
    flipped = np.array([True, False, True, False, False, False, False, False, False, False] * 2)
    score = np.linspace(1, 0, 20)
    found = auditing.scores(score, flipped)
    assert found["precision in the top tenth"] == 0.5  # places 0 and 1
    pairs = [(a > b) + 0.5 * (a == b) for a in score[flipped] for b in score[~flipped]]
    assert found["AUROC"] == pytest.approx(np.mean(pairs))


def test_a_row_per_noise_with_the_true_rate(tissue):
    samples = open_samples(tissue, labelled=True, allow_leaks=True)
    config = Config(data=DataConfig(path=str(tissue), size=32), backbone="resnet18-w16", threads=2)
    one = auditing.measure(
        "tissue", samples, random_backbone(config), config, ["symmetric:0.2", "instance:0.2"], seeds=1
    )
    assert list(one["figures"]) == ["symmetric:0.2", "instance:0.2"]
    for row in one["figures"].values():
        assert row["true rate"] == pytest.approx(0.2, abs=0.08)
        assert 0.4 < row["AUROC"] <= 1
        assert 0 <= row["precision in the top tenth"] <= 1
    assert one["n"] == 1
