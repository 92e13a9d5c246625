"""An FP16 copy of an exported ONNX file: products in half precision, float32 where range needs it.

ONNX Runtime's own converter (`transformers.float16`) rounds to FP16 between two neighbouring float32 nodes
as well, where the value that does not fit would overflow; here a cast stands only where the type changes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from noisyssl.deploy.graphs import float_tensors, head_of
from noisyssl.errors import ExportError

if TYPE_CHECKING:
    import onnx

SUMS = ("ReduceMean", "GlobalAveragePool", "LayerNormalization", "Softmax", "ReduceSum")
"""Their inner sums overflow before their results do."""
TYPED = ("Cast", "Constant", "ConstantOfShape", "Resize", "QuantizeLinear", "DequantizeLinear")
"""Their types are part of the operator, not of its inputs alone."""


def convert(
    model: "onnx.ModelProto", ranges: Mapping[str, float], limit: float
) -> tuple["onnx.ModelProto", list[str]]:
    """(FP16 copy with the same inputs and outputs, names of the nodes that stay float32 for their range).

    Args:
        ranges: largest |value| of every activation, by tensor.
        limit: a node that touches a larger activation or weight stays float32.
    """
    from onnx import numpy_helper

    floats = float_tensors(model)
    largest = dict(ranges)
    for tensor in model.graph.initializer:
        if tensor.name in floats:
            largest[tensor.name] = float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))
    head, outputs = head_of(model.graph), {value.name for value in model.graph.output}
    scalars = {tensor.name for tensor in model.graph.initializer if not tensor.dims or max(tensor.dims) == 1}
    factors = {name for node in model.graph.node if node.op_type == "MatMul" for name in node.input}
    narrow, islands = set(), []
    for node in model.graph.node:
        names = floats.intersection((*node.input, *node.output))
        if not names or node.name in head or node.op_type in (*SUMS, *TYPED):
            continue
        if outputs.intersection(node.input):  # what divides the logits by the temperature
            continue
        # the scale of attention: opening the file ends the process where ONNX Runtime 1.31 fuses one in FP16
        if node.op_type == "Mul" and scalars.intersection(node.input) and node.output[0] in factors:
            continue
        if any(largest.get(name, 0.0) > limit for name in names):
            islands.append(node.name)
        else:
            narrow.add(node.name)
    return narrowed(model, narrow), islands


def halves(model: "onnx.ModelProto") -> set[str]:
    """Names of the activations that are FP16 somewhere, by the names they have in the float32 file."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {
        value.name.removesuffix(".fp16")
        for value in graph.value_info
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    }


def narrowed(model: "onnx.ModelProto", nodes: set[str]) -> "onnx.ModelProto":
    """A copy in which these nodes compute in FP16; all other types, and the graph's outputs, stay.

    Raises:
        ExportError: a node has a graph inside, which is not looked into.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    full, half = TensorProto.FLOAT, TensorProto.FLOAT16
    floats = float_tensors(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}
    kinds = dict.fromkeys(floats, full)
    copies: dict[tuple[str, int], str] = {}
    changed: list[onnx.NodeProto] = []
    made: list[onnx.TensorProto] = []

    def seen_as(name: str, kind: int) -> str:
        """The tensor `name` in type `kind`, cast once where it has another."""
        if name not in floats or kinds[name] == kind:
            return name
        if (name, kind) not in copies:
            copies[name, kind] = copy = f"{name}.{'fp16' if kind == half else 'fp32'}"
            if name in weights:
                array = numpy_helper.to_array(weights[name]).astype(np.float16)
                made.append(numpy_helper.from_array(array, copy))
            else:
                changed.append(helper.make_node("Cast", [name], [copy], name=f"cast {copy}", to=kind))
        return copies[name, kind]

    for original in model.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in original.attribute):
            raise ExportError(
                f"node {original.name} of the ONNX file has a graph inside; FP16 needs a flat one."
            )
        node = onnx.NodeProto()
        node.CopyFrom(original)
        kind = half if original.name in nodes else full
        node.input[:] = [seen_as(name, kind) for name in original.input]
        changed.append(node)
        for i, name in enumerate(original.output):
            if kind == full or name not in floats:
                continue
            if name in outputs:
                node.output[i] = copies[name, half] = f"{name}.fp16"
                changed.append(
                    helper.make_node("Cast", [node.output[i]], [name], name=f"cast {name}", to=full)
                )
            else:
                kinds[name] = half
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    del copied.graph.node[:], copied.graph.value_info[:], copied.graph.initializer[:]
    copied.graph.node.extend(changed)
    used = {name for node in changed for name in node.input}
    copied.graph.initializer.extend(t for t in (*model.graph.initializer, *made) if t.name in used)
    onnx.checker.check_model(copied, full_check=True)
    return copied
