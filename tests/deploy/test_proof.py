"""The precision of an engine, from networks that say what they are."""

import json
from types import SimpleNamespace

import pytest

from noisyssl.deploy import proof, to_tensorrt
from noisyssl.errors import ExportError


def tensor(name, dtype):
    return SimpleNamespace(name=name, dtype=SimpleNamespace(name=dtype))


def network(*layers):
    """Layers of (kind, inputs, output), tensors written NAME:TYPE."""
    made = []
    for kind, inputs, output in layers:
        tensors = [tensor(*text.split(":")) for text in inputs]
        made.append(
            SimpleNamespace(
                type=SimpleNamespace(name=kind), num_inputs=len(tensors), get_input=tensors.__getitem__,
                num_outputs=1, get_output=lambda i, name=output: tensor(name, "FLOAT"),
            )
        )  # fmt: skip
    return SimpleNamespace(num_layers=len(made), get_layer=made.__getitem__)


def conv(dtype, weight=None):
    return ("CONVOLUTION", [f"a:{dtype}", f"{weight or 'w'}:{dtype}"], "c")


DQ = [("DEQUANTIZE", ["q:INT8"], "a"), ("DEQUANTIZE", ["v:INT8"], "w")]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([conv("FLOAT"), ("MATRIX_MULTIPLY", ["x:FLOAT", "y:FLOAT"], "z")], "fp32"),
        (
            [conv("HALF"), ("MATRIX_MULTIPLY", ["x:HALF", "y:HALF"], "z"), ("SOFTMAX", ["z:FLOAT"], "p")],
            "fp16",
        ),
        ([conv("HALF"), conv("HALF"), conv("FLOAT")], "fp16"),  # an island
        ([conv("HALF"), ("MATRIX_MULTIPLY", ["x:FLOAT", "y:FLOAT"], "z")], "mixed"),
        ([*DQ, conv("FLOAT"), conv("FLOAT"), ("MATRIX_MULTIPLY", ["x:HALF", "y:HALF"], "z")], "int8"),
        ([DQ[0], conv("FLOAT")], "fp32"),  # weights that were never quantised
        ([DQ[0], conv("FLOAT", weight="u"), DQ[1]], "fp32"),
        ([DQ[0], ("CONVOLUTION", ["a:FLOAT"], "c")], "fp32"),  # weights inside the layer
        ([conv("BF16")], "bf16"),
    ],
)
def test_precision_is_read_off_the_parsed_network(layers, expected):
    assert proof.of_network(network(*layers))[0] == expected


def test_products_are_counted_by_type():
    assert proof.of_network(network(*DQ, conv("FLOAT"), conv("HALF", weight="u")))[1] == {
        "CONVOLUTION HALF": 1, "CONVOLUTION INT8": 1
    }  # fmt: skip


def test_a_network_without_products_proves_nothing():
    with pytest.raises(ExportError, match="no convolution and no matrix product"):
        proof.of_network(network(("SOFTMAX", ["x:FLOAT"], "y")))


def test_another_precision_than_asked_is_refused():
    proof.must_be("fp16", "fp16", None)
    proof.must_be("fp16", "fp16", {"Half": 20, "Float": 2})
    with pytest.raises(ExportError, match="asked for in fp16, but the parsed network computes in fp32"):
        proof.must_be("fp16", "fp32", None)
    with pytest.raises(ExportError, match="asked for in int8, but its inspector lists only Float, Half"):
        proof.must_be("int8", "int8", {"Float": 3, "Half": 2})


def inspected(text):
    engine = SimpleNamespace(
        create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda kind: text)
    )
    trt = SimpleNamespace(
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if text else None),
    )
    return proof.of_plan(trt, None, b"plan")


def test_the_inspector_is_asked_where_the_plan_loads():
    outputs = [["Int8 NC/4HW4"], ["Int8 NC/4HW4"], ["Float NCHW"], []]
    layers = [{"Outputs": [{"Format/Datatype": t} for t in types]} for types in outputs] + ["a name only"]
    assert inspected(json.dumps({"Layers": layers})) == {"Float": 1, "Int8": 2}
    assert inspected("") is None
    assert inspected("no JSON") == {}


class Config:
    """A builder configuration that refuses caches of another GPU."""

    def __init__(self):
        self.set = []

    def create_timing_cache(self, data):
        return SimpleNamespace(data=data, serialize=lambda: b"new") if data != b"junk" else None

    def set_timing_cache(self, cache, ignore):
        assert ignore is False
        self.set.append(cache.data)
        return cache.data != b"other GPU"


@pytest.mark.parametrize(
    ("before", "attached"), [(None, b""), (b"mine", b"mine"), (b"other GPU", b""), (b"junk", b"")]
)
def test_a_timing_cache_that_does_not_fit_is_ignored(tmp_path, before, attached):
    path, config = tmp_path / "timings", Config()
    if before:
        path.write_bytes(before)
    assert to_tensorrt._timings(config, path).data == attached
    assert config.set[-1] == attached
