"""`Looks`: the same logits as a fresh look, in chunks, from views that are kept, and of files that broke."""

import numpy as np
import pytest
import torch

from noisyssl.classifier import build_classifier
from noisyssl.pipelines import evaluate
from noisyssl.pipelines.evaluate import Looks, evaluation_images, logits_of
from noisyssl.pipelines.scan import open_samples

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples(tissue):
    return open_samples(tissue, threads=1)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_classifier("resnet18-w16", "plain", 9).eval()


def fresh(network, samples, indices) -> np.ndarray:
    with evaluation_images(samples, indices, 32, "crop", 1) as images:
        return logits_of(network, images, CPU)


@pytest.mark.parametrize("held", [10**9, 5 * 32 * 32 * 3])
def test_they_equal_a_fresh_look_whatever_is_held(network, samples, monkeypatch, held):
    monkeypatch.setattr(evaluate, "HELD", held)
    first, second = np.arange(12), np.arange(3, 20)
    with Looks(samples, 32, "crop", 1) as looks:
        for indices in (first, first, second, first):
            assert np.allclose(
                looks.logits(network, indices, CPU), fresh(network, samples, indices), atol=1e-5
            )


def test_views_are_decoded_once_where_they_fit(network, samples, monkeypatch):
    opened, real = [], evaluate.evaluation_images
    monkeypatch.setattr(evaluate, "evaluation_images", lambda *a: opened.append(a) or real(*a))
    with Looks(samples, 32, "crop", 1) as looks:
        for _ in range(3):
            looks.logits(network, np.arange(6), CPU)
    assert len(opened) == 1


def test_a_file_that_broke_since_is_black_as_after_a_resume(network, samples, tissue):
    dropped: dict[int, str] = {}
    with Looks(samples, 32, "crop", 1, None, dropped) as looks:
        whole = looks.logits(network, np.arange(6), CPU)
        dropped[4] = "broke"
        now = looks.logits(network, np.arange(6), CPU)
    black = logits_of(network, np.zeros((1, 32, 32, 3), np.uint8), CPU)
    assert np.allclose(now[4], black[0], atol=1e-5)
    assert not np.allclose(whole[4], black[0], atol=1e-3)
    assert np.allclose(np.delete(now, 4, 0), np.delete(whole, 4, 0), atol=1e-6)
