import copy

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from torch import nn

from noisyssl.classifier import build_classifier
from noisyssl.deploy import to_onnx
from noisyssl.deploy.bundle import read
from noisyssl.errors import ExportError


@pytest.fixture(scope="module")
def model(exported):
    return onnx.load(exported / "model.onnx")


def test_the_graph_is_what_the_contract_says(model):
    (given,) = model.graph.input
    batch, *dims = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert (given.name, given.type.tensor_type.elem_type, dims) == (
        "image",
        onnx.TensorProto.UINT8,
        [32, 32, 3],
    )
    assert isinstance(batch, str)
    assert [value.name for value in model.graph.output] == ["logits", "probabilities"]
    assert [opset.version for opset in model.opset_import] == [20]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds[:2] == ["Cast", "Transpose"]
    assert set(kinds) <= {"Cast", "Transpose", "Sub", "Mul", "Conv", "Relu", "MaxPool", "Add", "ReduceMean",
                          "GlobalAveragePool", "Reshape", "Flatten", "Gemm", "Softmax"}  # fmt: skip
    assert kinds.count("Conv") == 20


def test_weights_are_inside_and_nothing_of_the_machine_is(model, exported):
    assert all(t.data_location == onnx.TensorProto.DEFAULT for t in model.graph.initializer)
    assert sorted(p.name for p in exported.iterdir() if p.name.startswith("model.onnx")) == ["model.onnx"]
    data = (exported / "model.onnx").read_bytes()
    for trace in (b"site-packages", b".py", b"/home", b"/tmp", b"stack_trace"):
        assert trace not in data


def test_metadata_says_how_to_feed_it(exported):
    import onnxruntime

    words = onnxruntime.InferenceSession(exported / "model.onnx").get_modelmeta().custom_metadata_map
    assert words["noisyssl.classes"] == '["benign", "malignant", "=other"]'
    assert words["noisyssl.geometry"] == '{"size": 32, "fit": "crop"}'
    assert words["Image.BitmapPixelFormat"] == "Rgb8"
    assert {"noisyssl.checkpoint", "noisyssl.training", "noisyssl.version"} <= words.keys()
    assert read(exported).classes == ("benign", "malignant", "=other")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext_tiny", "efficientnet_b0", "vit_ti_16"])
def test_every_family_of_backbones_exports_to_the_same_numbers(name, tmp_path):
    import onnxruntime

    torch.manual_seed(0)
    network = build_classifier(name, "plain", 3).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    to_onnx.export(network, tmp_path / "model.onnx", size=64, metadata={})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for count in (1, 3):
        images = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
        (logits,) = session.run(["logits"], {"image": images})
        with torch.no_grad():
            expected = network(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_what_asks_for_the_inputs_shape_asks_its_cast():
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Shape", ["image"], ["shape"], start=0, end=1),
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["shape", "minus"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["float", "wanted"], ["rows"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("image", TensorProto.UINT8, ["b", 2, 3])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["b", 6])],
        [helper.make_tensor("minus", TensorProto.INT64, [1], [-1])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    images = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    (before,) = onnx.reference.ReferenceEvaluator(model).run(None, {"image": images})
    to_onnx._shapes_after_the_cast(model.graph)
    assert [node.op_type for node in model.graph.node] == ["Cast", "Shape", "Concat", "Reshape"]
    assert [node.op_type for node in model.graph.node if "image" in node.input] == ["Cast"]
    onnx.checker.check_model(model, full_check=True)
    (after,) = onnx.reference.ReferenceEvaluator(model).run(None, {"image": images})
    np.testing.assert_array_equal(before, after)


def test_folding_changes_nothing_but_the_number_of_layers(classifier, images):
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    trained = copy.deepcopy(classifier).train()
    graph = to_onnx.folded(trained)
    batch = torch.tensor(images[0]).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(graph(batch), classifier(batch), atol=1e-4, rtol=0)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in graph.modules())
    assert trained.training
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_folding_is_the_formula(bias, affine):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5, affine=affine, eps=0.1))
    layers(torch.randn(9, 3, 8, 8) * 3 + 1)
    if affine:
        nn.init.normal_(layers[1].weight)
        nn.init.normal_(layers[1].bias)
    layers.eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(to_onnx.folded(layers)(x), layers(x), atol=1e-6, rtol=1e-5)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(self.conv(x)))


class Shared(Twice):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class After(Twice):
    def forward(self, x):
        return self.norm(x)


@pytest.mark.parametrize("kind", [Twice, Shared, After])
def test_a_norm_that_cannot_be_folded_is_refused(kind):
    with pytest.raises(ExportError, match="layer norm is a BatchNorm that follows"):
        to_onnx.folded(kind())


def test_channels_last_and_training_mode_export_the_same_file(classifier, exported, tmp_path, capfd, recwarn):
    trained = copy.deepcopy(classifier).to(memory_format=torch.channels_last).train()
    to_onnx.export(trained, tmp_path / "again.onnx", size=64, metadata={"a": "b"})
    first, second = (onnx.load(path) for path in (exported / "model.onnx", tmp_path / "again.onnx"))
    assert [node.op_type for node in first.graph.node] == [node.op_type for node in second.graph.node]
    for one, two in zip(first.graph.initializer, second.graph.initializer, strict=True):
        assert np.array_equal(onnx.numpy_helper.to_array(one), onnx.numpy_helper.to_array(two))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def wrong_opset(model):
    model.opset_import[0].version = 19


def fixed_batch(model):
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def renamed(model):
    model.graph.output[0].name = "scores"


def transposed_first(model):
    model.graph.node[0].op_type = "Transpose"


@pytest.mark.parametrize("spoil", [wrong_opset, fixed_batch, renamed, transposed_first])
def test_an_exporter_that_breaks_the_contract_is_caught(model, spoil):
    to_onnx._check(model, 32, 3)
    spoiled = copy.deepcopy(model)
    spoil(spoiled)
    with pytest.raises(ExportError, match="the exporter wrote a wrong graph"):
        to_onnx._check(spoiled, 32, 3)
