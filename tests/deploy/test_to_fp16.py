import copy

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from noisyssl.deploy import ranges, to_fp16
from noisyssl.deploy.parity import outputs_of

HALF = TensorProto.FLOAT16


@pytest.fixture(scope="module")
def model(exported):
    return onnx.load(exported / "model.onnx")


def scaled(model, factor):
    """The same function, with a first feature map `factor` times as large: ReLU and pooling keep factors."""
    wrong = copy.deepcopy(model)
    convolutions = [node for node in wrong.graph.node if node.op_type == "Conv"]
    tensors = {tensor.name: tensor for tensor in wrong.graph.initializer}
    readers = [n for n in wrong.graph.node if "max_pool2d" in n.input]
    assert {n.op_type for n in readers} == {"Conv", "Add"}
    first = convolutions[0]
    for name in first.input[1:]:
        tensors[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensors[name]) * factor, name))
    back = numpy_helper.from_array(np.array(1 / factor, np.float32), "back")
    wrong.graph.initializer.append(back)
    for node in readers:
        node.input[list(node.input).index("max_pool2d")] = "smaller"
    place = next(i for i, n in enumerate(wrong.graph.node) if "max_pool2d" in n.output) + 1
    wrong.graph.node.insert(
        place, onnx.helper.make_node("Mul", ["max_pool2d", "back"], ["smaller"], name="back")
    )
    return wrong


def converted(model, folder, images, limit=16384.0):
    onnx.save(model, folder / "wide.onnx")
    found = ranges.largest(ranges.measure(folder / "wide.onnx", images))
    half, islands = to_fp16.convert(model, found, limit)
    onnx.save(half, folder / "half.onnx")
    return half, islands, found


def test_products_are_fp16_and_inputs_and_outputs_stay(model, exported, images, tmp_path):
    half, islands, _ = converted(model, tmp_path, images)
    assert islands == []
    assert [v.SerializeToString() for v in half.graph.input] == [
        v.SerializeToString() for v in model.graph.input
    ]
    assert [v.SerializeToString() for v in half.graph.output] == [
        v.SerializeToString() for v in model.graph.output
    ]
    assert half.metadata_props == model.metadata_props
    assert half.graph.node[0].op_type == "Cast"
    kinds = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    for node in half.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert {kinds[name] for name in node.input[1:]} == {HALF}
        if node.op_type in ("Sub", "Mul"):  # normalisation
            assert {kinds[name] for name in node.input[1:]} == {TensorProto.FLOAT}
    assert len(half.SerializeToString()) < 0.55 * len(model.SerializeToString())
    wide, narrow = (
        outputs_of(path)(images[0])[0] for path in (exported / "model.onnx", tmp_path / "half.onnx")
    )
    assert 0 < np.abs(wide - narrow).max() < 0.05


def test_what_does_not_fit_stays_float32_and_the_answer_stays_right(model, images, tmp_path):
    large = scaled(model, 1e5)
    half, islands, found = converted(large, tmp_path, images)
    assert found["max_pool2d"] > 65504
    first, second = [node.name for node in model.graph.node if node.op_type == "Conv"][:2]
    assert {first, "node_relu", "node_max_pool2d", "back"} == set(islands)
    assert second not in islands
    inner = onnx.shape_inference.infer_shapes(half).graph.value_info
    kinds = {value.name: value.type.tensor_type.elem_type for value in inner}
    assert kinds["relu"] == kinds["max_pool2d"] == TensorProto.FLOAT  # also between neighbours of the island
    assert max(found[name] for name in to_fp16.halves(half) if name in found) <= 16384
    wide, narrow = (outputs_of(tmp_path / name)(images[0])[0] for name in ("wide.onnx", "half.onnx"))
    assert np.abs(wide - narrow).max() < 0.05


def test_without_an_island_the_range_gate_sees_it(model, images, tmp_path):
    large = scaled(model, 100.0)
    half, islands, found = converted(large, tmp_path, images, limit=65504.0)
    assert not islands
    assert max(found[name] for name in to_fp16.halves(half) if name in found) == found["max_pool2d"] > 100


def test_a_cast_stands_only_where_the_type_changes(model, images, tmp_path):
    half, *_ = converted(model, tmp_path, images)
    kinds = [node.op_type for node in half.graph.node]
    assert kinds.count("Cast") == 1 + 1 + 1 + 2  # bytes; into the first Conv; out of it to the mean, in, out
