"""`config.pbtxt` of each model of a Triton repository: all that Triton would otherwise guess is written down.

Fields: docs/user_guide/model_configuration.md and batcher.md of triton-inference-server/server, the README of
its onnxruntime_backend (execution accelerators) and dali_backend (ragged batches, names).
"""

from collections.abc import Mapping, Sequence
from typing import Any

QUEUE_DELAY_US = 1000
"""How long a request waits for others to share its batch. While the model is busy they gather anyway.

Batches of preferred sizes are left out on purpose: waiting for one makes all clients go in step.
"""
QUEUE_SIZE = 512
QUEUE_TIMEOUT_US = 10_000_000
ENGINE_CACHE = "/var/cache/noisyssl"
"""Where a GPU server keeps the engine that ONNX Runtime's TensorRT provider built at the first load."""
WORKSPACE_BYTES = 1 << 30
LABELS = "labels.txt"
ACCELERATORS: Mapping[str, str | None] = {"fp32": "FP32", "fp16": "FP16", "int8": None, "int8-trt": "INT8"}
"""--precision to how ONNX Runtime's TensorRT provider is asked to run its file; None: it is for CPUs."""
Plans = Mapping[str, str]
"""Compute capability ("8.6") to the file of its plan."""


class Word(str):
    """A name of the protocol, which stands without quotes."""


def onnx_model(
    name: str,
    classes: int,
    size: int,
    *,
    version: int,
    batch: int,
    precision: str,
    digest: str,
    threads: int = 0,
) -> str:
    """The ONNX variant: TensorRT by ONNX Runtime where there is a GPU, plain ONNX Runtime elsewhere.

    Args:
        precision: one of ACCELERATORS.
        digest: of the bundle's manifest, for clients that compare.
        threads: CPU threads of one run; 0 for one per core.
    """
    fields = _classifier(name, classes, size, version, batch, digest, precision)
    fields |= {"backend": "onnxruntime", "default_model_filename": "model.onnx"}
    accelerator = ACCELERATORS[precision]
    fields["instance_group"] = [{"count": 1, "kind": Word("KIND_AUTO" if accelerator else "KIND_CPU")}]
    if threads:
        fields["parameters"].append({"key": "intra_op_thread_count", "value": {"string_value": str(threads)}})
    if accelerator:
        settings = {
            "precision_mode": accelerator,
            "max_workspace_size_bytes": str(WORKSPACE_BYTES),
            "trt_engine_cache_enable": "1",
            # ONNX Runtime's own key is the graph, not its weights: another version must not find this engine
            "trt_engine_cache_path": f"{ENGINE_CACHE}/{digest[:16]}-{precision}",
        }
        provider = {
            "name": "tensorrt",
            "parameters": [{"key": key, "value": value} for key, value in settings.items()],
        }
        fields["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": [provider]}}
    return text(fields)


def plan_model(
    name: str, classes: int, size: int, *, version: int, batch: int, plans: Plans, precision: str, digest: str
) -> str:
    """The TensorRT variant: one plan per compute capability."""
    fields = _classifier(name, classes, size, version, batch, digest, precision)
    fields |= {"backend": "tensorrt", "platform": "tensorrt_plan"}
    fields["instance_group"] = [{"count": 1, "kind": Word("KIND_GPU")}]
    fields["cc_model_filenames"] = [{"key": key, "value": plans[key]} for key in sorted(plans)]
    return text(fields)


def view_model(name: str, size: int, *, version: int, batch: int) -> str:
    """The DALI graph: bytes of a file to the evaluation view; files of one batch differ in length."""
    return text(
        {
            "name": name,
            "backend": "dali",
            "default_model_filename": "model.dali",
            "max_batch_size": batch,
            "input": [
                {"name": "encoded", "data_type": Word("TYPE_UINT8"), "dims": [-1], "allow_ragged_batch": True}
            ],
            "output": [{"name": "image", "data_type": Word("TYPE_UINT8"), "dims": [size, size, 3]}],
            "version_policy": _only(version),
            "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
            "dynamic_batching": _batching(),
        }
    )


def ensemble(name: str, view: str, model: str, classes: int, *, version: int, batch: int) -> str:
    """From the bytes of a file to logits: the DALI graph, then the ONNX variant of the same version."""
    outputs = {out["name"]: out["name"] for out in _outputs(classes)}
    steps = [
        {"model_name": view, "model_version": version, "input_map": _map({"encoded": "encoded"}),
         "output_map": _map({"image": "image"})},
        {"model_name": model, "model_version": version, "input_map": _map({"image": "image"}),
         "output_map": _map(outputs)},
    ]  # fmt: skip
    return text(
        {
            "name": name,
            "platform": "ensemble",
            "max_batch_size": batch,
            "input": [{"name": "encoded", "data_type": Word("TYPE_UINT8"), "dims": [-1]}],
            "output": _outputs(classes),
            "version_policy": _only(version),
            "ensemble_scheduling": {"step": steps},
        }
    )


def _classifier(
    name: str, classes: int, size: int, version: int, batch: int, digest: str, precision: str
) -> dict[str, Any]:
    return {
        "name": name,
        "max_batch_size": batch,
        "input": [{"name": "image", "data_type": Word("TYPE_UINT8"), "dims": [size, size, 3]}],
        "output": _outputs(classes),
        "version_policy": _only(version),
        "dynamic_batching": _batching(),
        "model_warmup": [_warmup(count, size) for count in sorted({1, usual(batch), batch})],
        "parameters": [
            {"key": "bundle_sha256", "value": {"string_value": digest}},
            {"key": "bundle_precision", "value": {"string_value": precision}},
        ],
    }  # fmt: skip


def usual(batch: int) -> int:
    """A batch between the extremes, warmed up as well."""
    return min(8, batch)


def _outputs(classes: int) -> list[dict[str, Any]]:
    return [
        {"name": name, "data_type": Word("TYPE_FP32"), "dims": [classes], "label_filename": LABELS}
        for name in ("logits", "probabilities")
    ]


def _only(version: int) -> dict[str, Any]:
    return {"specific": {"versions": [version]}}


def _batching() -> dict[str, Any]:
    return {
        "max_queue_delay_microseconds": QUEUE_DELAY_US,
        "default_queue_policy": {
            "timeout_action": Word("REJECT"),
            "default_timeout_microseconds": QUEUE_TIMEOUT_US,
            "allow_timeout_override": False,
            "max_queue_size": QUEUE_SIZE,
        },
    }


def _warmup(count: int, size: int) -> dict[str, Any]:
    value = {"data_type": Word("TYPE_UINT8"), "dims": [size, size, 3], "random_data": True}
    return {"name": f"batch {count}", "batch_size": count, "inputs": [{"key": "image", "value": value}]}


def _map(names: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in names.items()]


def text(fields: Mapping[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format; a list of messages is a repeated field or a map."""
    lines = []
    for key, value in fields.items():
        for item in value if _is_repeated(value) else [value]:
            if isinstance(item, Mapping):
                lines.append(f"{indent}{key} {{\n{text(item, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{key}: {_scalar(item)}\n")
    return "".join(lines)


def _is_repeated(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
