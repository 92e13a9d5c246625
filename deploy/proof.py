"""Proof that an engine computes in the precision that was asked for, from the network and from the plan.

TensorRT is strongly typed: a layer computes in the types of its tensors. So the parsed network already tells,
on every machine. Where a driver can load the plan, the engine inspector is asked as well.
"""

import json
from collections import Counter
from typing import Any

from noisyssl.errors import ExportError

PRODUCTS = ("CONVOLUTION", "MATRIX_MULTIPLY")
WORDS = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8"}
INSPECTED = {"fp32": ("float", "fp32"), "fp16": ("half", "fp16"), "int8": ("int8",), "bf16": ("bf16",)}
"""How the inspector's words for a tensor's type begin, lower case, over the versions of TensorRT."""


def of_network(network: Any) -> tuple[str, dict[str, int]]:
    """(precision, products by kind and type) of a parsed network.

    The precision is the type of more than half of the convolutions and matrix products: fp32, fp16, bf16 or
    int8; else mixed. A product is INT8 when all it multiplies comes out of a Q/DQ pair.

    Raises:
        ExportError: there is no convolution or matrix product at all.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    makers = {
        layer.get_output(i).name: layer.type.name
        for layer in layers
        for i in range(layer.num_outputs)
        if layer.get_output(i) is not None
    }
    types: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for layer in layers:
        if layer.type.name not in PRODUCTS:
            continue
        inputs = [layer.get_input(i) for i in range(min(2, layer.num_inputs))]
        names = [tensor.name for tensor in inputs if tensor is not None]
        is_int8 = all(makers.get(name) == "DEQUANTIZE" for name in names) and len(names) == 2
        kind = "INT8" if is_int8 else inputs[0].dtype.name
        types[f"{layer.type.name} {kind}"] += 1
        kinds[kind] += 1
    if not kinds:
        raise ExportError(
            "the ONNX file has no convolution and no matrix product; write it with `noisyssl export`."
        )
    kind, count = kinds.most_common(1)[0]
    precision = WORDS.get(kind, "mixed") if 2 * count > kinds.total() else "mixed"
    return precision, dict(sorted(types.items()))


def of_plan(trt: Any, log: Any, plan: bytes) -> dict[str, int] | None:
    """Layers of an engine by the type of their first output, as its inspector says; None if it cannot load.

    Needs a driver, and a plan that was built with detailed profiling verbosity.
    """
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        return None
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        layers = json.loads(text)["Layers"]
        found = Counter(
            str(layer["Outputs"][0].get("Format/Datatype", "")).split()[0]
            for layer in layers
            if isinstance(layer, dict) and layer.get("Outputs")
        )
    except (ValueError, KeyError, IndexError, TypeError):
        return {}
    return dict(sorted(found.items()))


def must_be(asked: str, precision: str, inspected: dict[str, int] | None) -> None:
    """Raises ExportError unless network and, where it was inspected, plan compute in `asked`."""
    if precision != asked:
        raise ExportError(
            f"the engine is asked for in {asked}, but the parsed network computes in {precision}; its ONNX "
            "file has the wrong types. Export the bundle again."
        )
    if inspected and not any(name.lower().startswith(INSPECTED[asked]) for name in inspected):
        raise ExportError(
            f"the engine is asked for in {asked}, but its inspector lists only {', '.join(inspected)}; "
            "TensorRT did not keep the types of the ONNX file. Build with another version of it."
        )
