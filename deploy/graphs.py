"""Questions about an exported ONNX graph: which nodes are its head, which tensors are float32."""

from typing import TYPE_CHECKING

from noisyssl.errors import ExportError

if TYPE_CHECKING:
    import onnx


def head_of(graph: "onnx.GraphProto") -> set[str]:
    """Names of the nodes before the first convolution: Cast, Transpose, normalisation.

    Raises:
        ExportError: there is no convolution.
    """
    made = {name: node for node in graph.node for name in node.output}
    first = next((node for node in graph.node if node.op_type == "Conv"), None)
    if first is None:
        raise ExportError("the ONNX file has no convolution; lower precisions are made of image models.")
    found: set[str] = set()
    waiting = [first.input[0]]
    while waiting:
        if node := made.get(waiting.pop()):
            found.add(node.name)
            waiting.extend(node.input)
    return found


def float_tensors(model: "onnx.ModelProto") -> set[str]:
    """Names of all float32 tensors: initializers, inputs, and outputs of nodes."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kind = onnx.TensorProto.FLOAT
    values = (*graph.input, *graph.output, *graph.value_info)
    return {value.name for value in values if value.type.tensor_type.elem_type == kind} | {
        tensor.name for tensor in graph.initializer if tensor.data_type == kind
    }
