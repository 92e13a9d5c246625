"""Bundles made to lead a server astray: every one is refused with exit code 6, before anything is loaded."""

import json
import os
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image

from noisyssl.cli import run
from noisyssl.deploy import onnx_scan, to_tensorrt
from noisyssl.deploy.bundle import own_digest, sha256
from noisyssl.errors import BundleError

SECRET = "secret.bin"


def external(location):
    """A weight that lies somewhere else."""

    def change(model, folder):
        tensor = model.graph.initializer[0]
        move(tensor, location.replace("ABSOLUTE", str(folder.parent / SECRET)))

    return change


def move(tensor, location):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def linked(model, folder):
    (folder / "weights.bin").symlink_to(folder.parent / SECRET)
    move(model.graph.initializer[0], "weights.bin")


def hard_linked(model, folder):
    os.link(folder.parent / SECRET, folder / "weights.bin")
    move(model.graph.initializer[0], "weights.bin")


def quiet(model, folder):
    """External data without the flag that says so."""
    model.graph.initializer[0].external_data.add(key="location", value=f"../{SECRET}")


def hidden():
    return move(onnx.numpy_helper.from_array(np.zeros(4, np.float32), "hidden"), f"../{SECRET}")


def in_constant(model, folder):
    model.graph.node.append(helper.make_node("Constant", [], ["hidden"], value=hidden()))


def in_branch(model, folder):
    branch = helper.make_graph([], "branch", [], [], initializer=[hidden()])
    model.graph.node.append(helper.make_node("If", ["image"], ["x"], then_branch=branch, else_branch=branch))


def in_sparse(model, folder):
    model.graph.sparse_initializer.add().values.CopyFrom(hidden())


def in_function(model, folder):
    inner = helper.make_node("Constant", [], ["y"], value=hidden())
    model.functions.append(helper.make_function("", "F", [], ["y"], [inner], model.opset_import))


def in_training(model, folder):
    model.training_info.add().algorithm.initializer.append(hidden())


def foreign(domain, kind):
    def change(model, folder):
        model.graph.node.append(
            helper.make_node(kind, ["image"], ["x"], domain=domain, ep_cache_context=f"../{SECRET}")
        )

    return change


def other_signature(model, folder):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 64


def whole(data):
    """Not a change of the model, but of its bytes."""
    return lambda model, folder: data(model.SerializeToString())


def resign(folder, change=lambda values: None):
    """The manifest as somebody writes it who knows how."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    values["files"]["model.onnx"] = sha256(folder / "model.onnx")
    change(values)
    values.pop("sha256")
    values["sha256"] = own_digest(values)
    path.write_text(json.dumps(values))


MODELS = {
    "external data above": external(f"../{SECRET}"),
    "external data, absolute": external("ABSOLUTE"),
    "external data through a link": linked,
    "external data through a hard link": hard_linked,
    "external data of the bundle": external("model.safetensors"),
    "external data, unsaid": quiet,
    "in a constant": in_constant,
    "in a branch": in_branch,
    "in a sparse weight": in_sparse,
    "in a function": in_function,
    "in training information": in_training,
    "foreign operator": foreign("evil.example", "Read"),
    "a context of another runtime": foreign("com.microsoft", "EPContext"),
    "another input": other_signature,
    "cut off": whole(lambda data: data[: len(data) // 2]),
    "noise": whole(lambda data: np.random.default_rng(0).bytes(5000)),
    "empty": whole(lambda data: b""),
}


def tampered(folder):
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)


def cut_plan(folder):
    (folder / "engines").mkdir(exist_ok=True)
    (folder / "engines" / "model.tensorrt_rtx.plan").write_bytes(b"vtrt" * 10)
    resign(folder, lambda values: values["files"].update({"engines/model.tensorrt_rtx.plan": "0" * 64}))


def linked_model(folder):
    (folder / "model.onnx").rename(folder.parent / "model.onnx")
    (folder / "model.onnx").symlink_to(folder.parent / "model.onnx")


def named(name):
    return lambda folder: resign(
        folder, lambda values: values["files"].update({name: sha256(folder.parent / SECRET)})
    )


FOLDERS = {
    "tampered model": tampered, "cut plan": cut_plan, "linked model": linked_model,
    "a file above": named(f"../{SECRET}"), "an absolute file": named("/etc/passwd"),
}  # fmt: skip


@pytest.fixture
def watched(monkeypatch):
    """Files that Python opens for reading; the runtimes, which open by themselves, must not be reached."""
    opened, state = [], {"on": True}

    def hook(event, arguments):
        if state["on"] and event == "open" and isinstance(arguments[0], str | os.PathLike):
            opened.append(os.path.realpath(arguments[0]))

    def never(*_, **__):
        raise AssertionError("deserialised")

    inner = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda data, *a, **k: inner(data, *a, **k) if harmless(data) else never(),
    )
    monkeypatch.setattr(to_tensorrt, "load", never)
    sys.addaudithook(hook)
    yield opened
    state["on"] = False


def harmless(data):
    """Bytes that name no other file may be loaded, to see that their inputs are not the manifest's."""
    return isinstance(data, bytes) and SECRET.encode() not in data and b"location" not in data


@pytest.mark.parametrize("trick", [*MODELS, *FOLDERS])
def test_malicious_bundles_are_refused_and_nothing_outside_is_read(bundle, tmp_path, watched, capsys, trick):
    assert len(MODELS) + len(FOLDERS) >= 20
    (tmp_path / SECRET).write_bytes(np.ones(100_000, np.float32).tobytes())
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    if trick in MODELS:
        model = onnx.load(bundle / "model.onnx")
        data = MODELS[trick](model, bundle)
        (bundle / "model.onnx").write_bytes(model.SerializeToString() if data is None else data)
        resign(bundle)
    else:
        FOLDERS[trick](bundle)
    watched.clear()
    assert run(["predict", str(bundle), str(tmp_path / "image.png"), "--device", "cpu"]) == 6
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    outside = [p for p in watched if p.startswith(str(tmp_path)) and not p.startswith(str(bundle))]
    assert set(outside) <= {str(tmp_path / "image.png")}


@pytest.mark.skipif("tensorrt_rtx" not in to_tensorrt.flavours(), reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("trick", ["external data above", "in a function", "foreign operator", "cut off"])
def test_no_engine_is_built_of_a_malicious_model(bundle, tmp_path, capsys, trick):
    model = onnx.load(bundle / "model.onnx")
    data = MODELS[trick](model, bundle)
    (bundle / "model.onnx").write_bytes(model.SerializeToString() if data is None else data)
    resign(bundle)
    command = ["engine", str(bundle), "--out", str(tmp_path / "new"), "--tensorrt", "SM86"]
    assert run([*command, "--flavour", "tensorrt_rtx"]) == 6
    assert not (tmp_path / "new").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle"]


def test_the_scan_knows_every_way_to_a_tensor_and_a_node():
    """onnx.proto itself: a message that holds one, however deep, is followed by the scan."""
    wanted: dict[str, dict[int, str]] = {}
    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        kind = waiting.pop()
        if kind.name not in wanted:
            inner = [field for field in kind.fields if field.message_type is not None]
            wanted[kind.name] = {field.number: field.message_type.name for field in inner}
            waiting.extend(field.message_type for field in inner)
    holding = {"TensorProto", "NodeProto"}
    while more := {name for name, inner in wanted.items() if holding & set(inner.values())} - holding:
        holding |= more
    for name in holding:
        inner = {n: kind.removesuffix("Proto") for n, kind in wanted[name].items() if kind in holding}
        assert onnx_scan.INNER[name.removesuffix("Proto")] == inner
    numbers = {field.name: field.number for field in onnx.TensorProto.DESCRIPTOR.fields}
    assert (numbers["external_data"], numbers["data_location"]) == (13, 14)
    assert onnx.NodeProto.DESCRIPTOR.fields_by_name["domain"].number == onnx_scan.DOMAIN


def test_every_form_passes_the_scan_and_no_cut_does(lowered):
    for path in sorted(lowered.glob("*.onnx")):
        onnx_scan.self_contained(path.read_bytes(), path)
    data = path.read_bytes()
    generator = np.random.default_rng(0)
    for end in generator.integers(0, len(data), 100):
        with pytest.raises(BundleError, match="no ONNX model, or was cut off"):
            onnx_scan.self_contained(data[:end], path)
