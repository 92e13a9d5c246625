"""One ONNX file from a classifier: bytes in, logits and probabilities out, normalisation inside.

BatchNorm is folded into the convolutions here, in float64, so the graph does not depend on the exporter's
own fusions (onnxscript 0.5.6 folded wrongly: pytorch #169178). `Cast` comes first: TensorRT refuses to
transpose uint8.
"""

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from noisyssl.deploy.bundle import save
from noisyssl.errors import ExportError, MachineError

if TYPE_CHECKING:
    import onnx
    from torch import fx, nn

    from noisyssl.classifier import Classifier

OPSET = 20
INPUT = "image"
LOGITS = "logits"
PROBABILITIES = "probabilities"
PIXELS = {  # the standard keys of https://onnx.ai/onnx/repo-docs/MetadataProps.html
    "Image.BitmapPixelFormat": "Rgb8",
    "Image.ColorSpaceGamma": "SRGB",
    "Image.NominalPixelRange": "NominalRange_0_255",
}


def export(
    classifier: "Classifier",
    path: Path,
    *,
    size: int,
    metadata: Mapping[str, object],
    temperature: float = 1.0,
) -> None:
    """Write `classifier` to `path`; the classifier itself stays as it is.

    Input `image` is (B, size, size, 3) uint8 RGB with any B; outputs `logits` and `probabilities` are
    (B, K) float32, the latter softmax of logits / `temperature`. The file holds its weights and nothing of
    the machine that wrote it.

    `metadata` is stored as `noisyssl.KEY` in the file; anything but a string is written as JSON.

    Raises:
        ExportError: a BatchNorm cannot be folded, or the exporter changed the contract above.
        MachineError: the package `onnx` or `onnxscript` is missing.
    """
    import torch
    from torch import nn

    from noisyssl.transformer import Transformer

    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError:
            raise MachineError(
                f"package {package!r} is missing; export needs it. Run `pip install 'noisyssl[onnx]'`."
            ) from None

    class Served(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            # contiguous (weights too, in `folded`): channels-last strides would be traced into Gather nodes
            logits = self.network(image.float().permute(0, 3, 1, 2).contiguous())
            return logits, (logits if temperature == 1 else logits / temperature).softmax(1)

    fixed = copy.deepcopy(classifier)
    for module in fixed.modules():
        if isinstance(module, Transformer):
            module.settle(size)
    served = Served(folded(fixed)).eval()
    example = torch.zeros(
        2, size, size, 3, dtype=torch.uint8
    )  # a batch of 1 would be frozen in (pytorch #157621)
    with _silence(), torch.no_grad():
        program = torch.onnx.export(
            served,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[LOGITS, PROBABILITIES],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _strip(model)
    _shapes_after_the_cast(model.graph)
    _check(model, size, classifier.head.out_features)
    words = {f"noisyssl.{key}": value for key, value in metadata.items()} | PIXELS
    for key, value in words.items():
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    save(path, model.SerializeToString(deterministic=True))


def folded(classifier: "nn.Module") -> "fx.GraphModule":
    """A float32 CPU copy in eval mode whose BatchNorms have become part of the convolutions before them.

    Raises:
        ExportError: a BatchNorm does not directly follow a convolution of its own.
    """
    import torch
    from torch import fx, nn
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    plain = copy.deepcopy(classifier).cpu().float().eval().to(memory_format=torch.contiguous_format)
    graph = fx.symbolic_trace(plain)
    modules = dict(graph.named_modules())
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    for node in list(graph.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        before = node.args[0]
        conv = modules.get(str(before.target)) if before.op == "call_module" else None
        if (
            not isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
            or len(before.users) > 1
            or calls.count(before.target) > 1
        ):
            raise ExportError(
                f"layer {node.target} is a BatchNorm that follows {before.target}; only one that directly "
                "follows a convolution of its own can be folded. Export a torchvision ResNet."
            )
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            weight, bias = fuse_conv_bn_weights(
                conv.weight.double(), None if conv.bias is None else conv.bias.double(),
                norm.running_mean.double(), norm.running_var.double(), norm.eps,
                None if norm.weight is None else norm.weight.double(),
                None if norm.bias is None else norm.bias.double(),
            )  # fmt: skip
        conv.weight = nn.Parameter(weight.float().contiguous(), requires_grad=False)
        conv.bias = nn.Parameter(bias.float(), requires_grad=False)
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


def _check(model: "onnx.ModelProto", size: int, classes: int) -> None:
    """Raises ExportError unless the graph is what the docstring of `export` promises."""
    import onnx

    graph = model.graph
    readers = [node.op_type for node in graph.node if INPUT in node.input]
    signature = {
        value.name: (value.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in
                     value.type.tensor_type.shape.dim]) for value in (*graph.input, *graph.output)
    }  # fmt: skip
    batch = next(iter(signature.values()))[1][0]
    promised = {
        INPUT: (onnx.TensorProto.UINT8, [batch, size, size, 3]),
        LOGITS: (onnx.TensorProto.FLOAT, [batch, classes]),
        PROBABILITIES: (onnx.TensorProto.FLOAT, [batch, classes]),
    }
    faults = {
        f"its inputs and outputs are {signature}, not {promised}": signature != promised,
        f"its batch is fixed at {batch}": not isinstance(batch, str),
        f"the input goes to {readers}, not to one Cast": readers != ["Cast"],
        f"it starts with {graph.node[0].op_type}, not with Cast": graph.node[0].op_type != "Cast",
        "a BatchNormalization is left": any(node.op_type == "BatchNormalization" for node in graph.node),
        f"its opsets are {model.opset_import}": [o.version for o in model.opset_import] != [OPSET],
    }
    if wrong := [fault for fault, found in faults.items() if found]:
        raise ExportError(
            f"the exporter wrote a wrong graph: {'; '.join(wrong)}. "
            "Install the versions of constraints.txt (torch, onnx, onnxscript) and export again."
        )
    onnx.checker.check_model(model, full_check=True)


def _shapes_after_the_cast(graph: "onnx.GraphProto") -> None:
    """Let what asks for the shape of the input ask its cast, which has the same: one reader is promised."""
    casts = [node for node in graph.node if node.op_type == "Cast" and list(node.input) == [INPUT]]
    shapes = [node for node in graph.node if node.op_type == "Shape" and list(node.input) == [INPUT]]
    if len(casts) != 1 or not shapes:
        return
    rest = [node for node in graph.node if node is not casts[0] and node not in shapes]
    for node in shapes:
        node.input[0] = casts[0].output[0]
    ordered = [*casts, *shapes, *rest]
    copies = [type(node).FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)


def _strip(model: "onnx.ModelProto") -> None:
    """Drop what the exporter notes about the machine: source paths, stack traces, module names."""
    for item in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output,
                 *model.graph.value_info, *model.graph.initializer):  # fmt: skip
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    model.ClearField("doc_string")
    model.ClearField("metadata_props")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's warnings, log and prints from the user; what matters is checked afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
