"""INT8 copies of an exported ONNX file: explicit Q/DQ, per-channel weights, ONNX Runtime's quantiser.

Two forms, because each is slow or refused where the other belongs: unsigned activations for CPU kernels,
symmetric signed ones for TensorRT, which takes Q/DQ without zero points and biases in float only. Both start
at the first convolution; the logits come from a matrix product in floating point, which costs no time and
keeps their order.
"""

from pathlib import Path
from typing import Any

from noisyssl.deploy import bundle
from noisyssl.deploy.graphs import head_of
from noisyssl.deploy.ranges import quiet
from noisyssl.deploy.to_fp16 import narrowed
from noisyssl.deploy.to_onnx import LOGITS, PROBABILITIES

PRODUCTS = ("Conv", "Gemm", "MatMul")
CPU = (*PRODUCTS, "Add", "Relu", "MaxPool")
"""What ONNX Runtime's CPU kernels compute in INT8 from one convolution to the next."""
TENSORRT: dict[str, Any] = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,  # TensorRT refuses INT32 Q/DQ
    "OpTypesToExcludeOutputQuantization": list(PRODUCTS),  # it fuses what follows a product by itself
}


def quantise(onnx_path: Path, out: Path, form: str, ranges: Any, *, reduced: bool = False) -> None:
    """Write the INT8 copy of `onnx_path` in `form` int8-cpu or int8-trt.

    Args:
        ranges: what `ranges.measure` found on calibration images.
        reduced: 7-bit weights, for CPUs that `machine.int8_saturates` describes; exact on any other as well.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

    with quiet():
        model = load_model_with_shape_infer(onnx_path)
        ends = {node.name for node in model.graph.node if {LOGITS, PROBABILITIES} & set(node.output)}
        is_cpu = form == "int8-cpu"
        quantizer = QDQQuantizer(
            model=model,
            per_channel=True,
            reduce_range=reduced and is_cpu,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8 if is_cpu else QuantType.QInt8,
            tensors_range=ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=sorted(head_of(model.graph) | ends),
            op_types_to_quantize=list(CPU if is_cpu else PRODUCTS),
            extra_options={"MatMulConstBOnly": True} | ({} if is_cpu else TENSORRT),
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    quantised = quantizer.model.model
    if not is_cpu:  # Turing has no FP32 matrix product in TensorRT for RTX
        integers = {
            n for node in quantised.graph.node if node.op_type == "DequantizeLinear" for n in node.output
        }
        quantised = narrowed(
            quantised,
            {
                node.name for node in quantised.graph.node
                if node.op_type in ("Gemm", "MatMul") and not integers.intersection(node.input)
            },
        )  # fmt: skip
    bundle.save(out, quantised.SerializeToString(deterministic=True))
