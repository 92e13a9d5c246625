import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from noisyssl.deploy import parity
from noisyssl.errors import DataError, ExportError


@pytest.fixture(scope="module")
def model(exported):
    return onnx.load(exported / "model.onnx")


def constant(model, change, shape=None, end=""):
    """Replace the first initializer of this shape or name ending."""
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if (shape and array.shape == shape) or (end and tensor.name.endswith(end)):
            tensor.CopyFrom(numpy_helper.from_array(change(array.copy()), tensor.name))
            return
    raise AssertionError("no such constant")


def spoiled(model, tmp_path, change, **where):
    wrong = copy.deepcopy(model)
    constant(wrong, change, **where)
    onnx.save(wrong, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_right_file_passes_with_its_figures(classifier, exported, images):
    found = parity.check(classifier, exported / "model.onnx", iter(images))
    assert found.n == sum(map(len, images))
    assert 0 < found.max_logit_difference <= 1e-4
    assert found.top1_changes_beyond_margin == 0
    assert set(found.batches) == {"1", "2", "3", "17"}
    assert max(found.batches.values()) <= 1e-4
    assert not classifier.training


def test_fewer_images_than_the_largest_batch_still_prove_it(classifier, exported, images):
    assert parity.check(classifier, exported / "model.onnx", [images[0][:2]]).n == 2


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda w: w[:, ::-1], {"shape": (16, 3, 7, 7)}),  # BGR for RGB
        (np.zeros_like, {"end": "channel_offset"}),  # normalisation without its mean
        (np.ones_like, {"end": "channel_scale"}),  # bytes not scaled
        (lambda w: w[::-1], {"end": "head.weight"}),  # classes in another order
        (lambda w: w * 1.001, {"end": "head.weight"}),
        (lambda w: w.astype(np.float16).astype(np.float32), {"shape": (128, 128, 3, 3)}),  # half precision
    ],
)
def test_a_wrong_graph_is_caught(classifier, model, images, tmp_path, change, where):
    path = spoiled(model, tmp_path, change, **where)
    with pytest.raises(ExportError, match=r"at most 0\.0001 is allowed\. No bundle was written"):
        parity.check(classifier, path, images)


def test_values_that_are_not_finite_are_caught_on_either_side(classifier, model, images, tmp_path):
    path = spoiled(model, tmp_path, lambda w: w * np.nan, end="head.bias")
    with pytest.raises(ExportError, match=r"model\.onnx gives logits that are not finite for 16 of 16"):
        parity.check(classifier, path, images)
    broken = copy.deepcopy(classifier)
    nn.init.constant_(broken.head.bias, float("inf"))
    with pytest.raises(ExportError, match="the classifier gives logits that are not finite"):
        parity.check(broken, path, images)


def test_no_image_is_no_proof(classifier, exported):
    with pytest.raises(DataError, match="got 0 images"):
        parity.check(classifier, exported / "model.onnx", [])


class Margin(nn.Module):
    """Two logits that differ by `gap`, whatever the image."""

    def __init__(self, gap):
        super().__init__()
        self.register_buffer("scores", torch.tensor([gap, 0.0]))

    def forward(self, images):
        return self.scores.expand(len(images), 2)


def graph(path, scores, batch="batch", lie=False):
    """An ONNX file that always answers `scores`; `lie`: its probabilities are not their softmax."""
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, 8, 8, 3])
    outputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, 2]) for n in ("logits", "probabilities")
    ]
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0),
        helper.make_node("Mul", ["m", "zero"], ["z"]),
        helper.make_node("Unsqueeze", ["z", "one"], ["u"]),
        helper.make_node("Add", ["u", "scores"], ["logits"]),
        helper.make_node("Sigmoid" if lie else "Softmax", ["logits"], ["probabilities"]),
    ]
    constants = {
        "axes": np.array([1, 2, 3]),
        "one": np.array([1]),
        "zero": np.float32(0),
        "scores": np.float32([scores]),
    }
    made = helper.make_graph(
        nodes,
        "g",
        [image],
        outputs,
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def batch_of(count):
    return [np.zeros((count, 8, 8, 3), np.uint8)]


def test_a_tie_may_flip_but_a_preferred_class_may_not(tmp_path):
    found = parity.check(Margin(5e-5), graph(tmp_path / "a.onnx", [0.0, 1e-5]), batch_of(5))
    assert (found.top1_changes, found.top1_changes_beyond_margin) == (5, 0)
    flipped = graph(tmp_path / "b.onnx", [8e-5, 9e-5])
    with pytest.raises(ExportError, match=r"5 of 5 top-1 classes changed \(5 beyond their margin\)"):
        parity.check(Margin(1.5e-4), flipped, batch_of(5))


def test_tolerance_is_the_limit(tmp_path):
    path = graph(tmp_path / "a.onnx", [1.01, 0.0])
    assert parity.check(
        Margin(1.0), path, batch_of(2), tolerance=0.011
    ).max_logit_difference == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(ExportError):
        parity.check(Margin(1.0), path, batch_of(2), tolerance=0.009)


def test_probabilities_must_be_the_softmax(tmp_path):
    with pytest.raises(ExportError, match="in a probability"):
        parity.check(Margin(1.0), graph(tmp_path / "a.onnx", [1.0, 0.0], lie=True), batch_of(2))


def test_a_fixed_batch_and_a_file_that_is_none_are_refused(tmp_path):
    with pytest.raises(ExportError, match="refuses a batch of 1"):
        parity.check(Margin(1.0), graph(tmp_path / "a.onnx", [1.0, 0.0], batch=2), batch_of(2))
    (tmp_path / "b.onnx").write_bytes(b"junk")
    with pytest.raises(ExportError, match="refuses to load"):
        parity.check(Margin(1.0), tmp_path / "b.onnx", batch_of(2))
