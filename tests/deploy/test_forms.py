"""Each precision's file is what its server needs, keeps its gate, or is not there."""

import errno
import os
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from noisyssl.deploy import bundle as bundles
from noisyssl.deploy import forms, parity, to_onnx
from noisyssl.deploy.bundle import FORMS, read
from noisyssl.deploy.export import export_bundle
from noisyssl.deploy.gates import Gates
from noisyssl.deploy.runtime import open_runtime
from noisyssl.errors import BundleError, ConfigError, MachineError

FIGURES = {
    "n", "top1_changes", "max_probability_difference", "balanced_accuracy", "macro_auroc",
    "calibration_error", "passed", "why",
}  # fmt: skip


@pytest.fixture
def quick(exported, monkeypatch):
    data = (exported / "model.onnx").read_bytes()
    monkeypatch.setattr(to_onnx, "export", lambda classifier, path, **_: bundles.save(path, data))


def graph(folder, form):
    return onnx.load(folder / FORMS[form]).graph


def test_the_manifest_has_the_figures_of_every_form(lowered):
    manifest = read(lowered)
    assert list(manifest.precisions) == list(FORMS)
    for form, row in manifest.precisions.items():
        assert row.keys() >= FIGURES
        assert row["passed"]
        assert (row["why"], row["n"], row["file"]) == ("", 37, FORMS[form])
        assert row["file"] in manifest.files
        assert 0 < row["macro_auroc"] <= 1
    assert 1e-6 < manifest.precisions["fp16"]["max_probability_difference"] < 1e-2
    assert manifest.precisions["fp16"]["gates"] == {
        "fp16_flips": 0.001, "fp16_difference": 0.01, "fp16_range": 16384.0
    }  # fmt: skip
    assert manifest.precisions["int8-cpu"]["calibration_images"] == 32
    assert manifest.precisions["int8-cpu"]["reduced_range"]
    assert not manifest.precisions["int8-trt"]["reduced_range"]


@pytest.mark.parametrize("form", ["int8-cpu", "int8-trt"])
def test_int8_starts_at_the_first_convolution_and_spares_the_logits(lowered, form):
    nodes = graph(lowered, form).node
    makers = {name: node for node in nodes for name in node.output}
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    assert len(convolutions) == 20
    for node in convolutions:
        assert [makers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
    head, name = [], convolutions[0].input[0]
    while name in makers:
        head.append(makers[name].op_type)
        name = makers[name].input[0]
    assert head == ["DequantizeLinear", "QuantizeLinear", "Mul", "Sub", "Transpose", "Cast"]
    assert nodes[0].op_type == "Cast"
    for kind in ("Gemm", "Softmax"):
        last = next(node for node in nodes if node.op_type == kind)
        assert makers[last.input[0]].op_type not in ("DequantizeLinear", "QuantizeLinear")


def scales(folder, form):
    """(dequantised initializer, its scales, its zero points) of every Q/DQ'd weight and bias."""
    found = graph(folder, form)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.initializer}
    for node in found.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in arrays:
            yield tuple(arrays[name] for name in node.input[:3])


def test_weights_are_per_channel_and_the_cpu_form_fits_16_bits(lowered):
    for form, largest in (("int8-cpu", 64), ("int8-trt", 127)):
        weights = [w for w in scales(lowered, form) if w[0].ndim == 4]
        assert len(weights) == 20
        for values, scale, zero in weights:
            assert values.dtype == np.int8
            assert scale.shape == (len(values),)
            assert not zero.any()
        assert max(np.abs(values.astype(int)).max() for values, *_ in weights) == largest


def test_tensorrt_gets_symmetric_signed_pairs_without_int32(lowered):
    cpu, trt = graph(lowered, "int8-cpu"), graph(lowered, "int8-trt")
    for found, kind in ((cpu, np.uint8), (trt, np.int8)):
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.initializer}
        zeros = [arrays[n.input[2]] for n in found.node if n.op_type == "QuantizeLinear"]
        assert {zero.dtype for zero in zeros} == {np.dtype(kind)}
        assert any(zero.any() for zero in zeros) == (kind is np.uint8)
    assert TensorProto.INT32 in {tensor.data_type for tensor in cpu.initializer}
    assert TensorProto.INT32 not in {tensor.data_type for tensor in trt.initializer}
    halves = {t.name for t in trt.initializer if t.data_type == TensorProto.FLOAT16}
    assert halves == {"network.head.weight.fp16", "network.head.bias.fp16"}  # for Turing


def test_runtimes_serve_the_precision_that_is_asked(lowered, images, monkeypatch):
    batch = images[0]
    answers = {}
    for precision in ("fp32", "fp16", "int8"):
        with open_runtime(lowered, "onnx", "cpu", 1, precision) as opened:
            answers[precision] = opened.logits(batch)
    assert 0 < np.abs(answers["fp16"] - answers["fp32"]).max() < 0.05
    assert 0 < np.abs(answers["int8"] - answers["fp32"]).max() < 1
    with pytest.raises(ConfigError, match="precision is int8; the torch runtime computes in fp32 only"):
        open_runtime(lowered, "torch", precision="int8")
    with pytest.raises(ConfigError, match="precision 'int4' is unknown"):
        open_runtime(lowered, "onnx", precision="int4")
    with pytest.raises(ConfigError, match="use --runtime tensorrt"):
        open_runtime(lowered, "onnx", "cuda", precision="int8")


def test_full_range_weights_are_refused_where_they_overflow(wishes_lower, tmp_path, quick, monkeypatch):
    out = tmp_path / "out"
    wide = wishes_lower | {
        "precisions": ("int8",),
        "reduced": False,
        "gates": Gates(int8_agreement=0, int8_auroc_drop=1),
    }
    export_bundle(out, **wide, tensorrt=None)
    monkeypatch.setattr("noisyssl.deploy.run_onnx.int8_saturates", lambda: True)
    with pytest.raises(MachineError, match=r"overflow on this CPU without VNNI; use --precision fp32"):
        open_runtime(out, "onnx", precision="int8")
    monkeypatch.setattr("noisyssl.deploy.run_onnx.int8_saturates", lambda: False)
    open_runtime(out, "onnx", precision="int8")


def test_a_precision_that_was_not_exported_says_so(exported):
    with pytest.raises(
        BundleError, match=r"has no model\.fp16\.onnx \(it was not asked for\)\. Use --precision fp32"
    ):
        open_runtime(exported, "onnx", precision="fp16")


def test_what_fails_its_gate_is_left_out_and_says_why(wishes_lower, tmp_path, quick):
    out = tmp_path / "out"
    strict = Gates(fp16_difference=1e-7, int8_agreement=1.0, int8_auroc_drop=0.0)
    wrong = wishes_lower | {"gates": strict, "labels": None}
    manifest = export_bundle(out, **wrong, tensorrt=None)
    table = manifest.precisions
    assert not any(table[form]["passed"] for form in ("fp16", "int8-cpu", "int8-trt"))
    assert "at most 1e-07 is allowed" in table["fp16"]["why"]
    assert "macro-AUROC is undefined" in table["int8-trt"]["why"]
    assert sorted(manifest.files) == ["model.onnx", "model.safetensors"]
    assert forms.faults(table).count("left out") == 3
    with pytest.raises(BundleError, match="at most 1e-07 is allowed"):
        open_runtime(out, "onnx", precision="fp16")


def test_a_file_that_gives_no_numbers_is_left_out(wishes_lower, tmp_path, quick, monkeypatch):
    inner = parity.outputs_of

    def broken(path):
        run = inner(path)
        return (
            run
            if path.name == "model.onnx"
            else lambda batch: parity._finite(np.full((2, 3), np.nan), path.name)
        )

    monkeypatch.setattr(parity, "outputs_of", broken)
    manifest = export_bundle(tmp_path / "out", **wishes_lower | {"precisions": ("fp16",)}, tensorrt=None)
    assert manifest.precisions["fp16"]["why"] == (
        "model.fp16.onnx gives logits that are not finite for 2 of 2 images"
    )
    assert "model.fp16.onnx" not in manifest.files


def test_calibration_is_asked_for(wishes, tmp_path):
    with pytest.raises(ConfigError, match="precision int8 needs calibration images"):
        export_bundle(tmp_path / "out", **wishes, tensorrt=None, precisions=("int8",))


@pytest.mark.parametrize("step", range(6))
def test_a_full_disk_at_any_write_leaves_nothing_behind(wishes_lower, tmp_path, quick, monkeypatch, step):
    writes = []
    inner = bundles.save

    def save(path, data):
        writes.append(path.name)
        if len(writes) > step:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inner(path, data)

    monkeypatch.setattr(bundles, "save", save)
    with pytest.raises(MachineError, match=r"No space left on device\); nothing was left behind"):
        export_bundle(tmp_path / "new" / "out", **wishes_lower, tensorrt=None)
    assert not list(tmp_path.iterdir())
    files = [*FORMS.values(), "model.safetensors", "manifest.json"]
    assert writes == files[: step + 1]


def test_older_bundles_without_precisions_still_load(lowered, tmp_path):
    import json

    old = shutil.copytree(lowered, tmp_path / "old")
    values = json.loads((old / "manifest.json").read_text())
    del values["precisions"], values["sha256"]
    values["sha256"] = bundles.own_digest(values)
    (old / "manifest.json").write_text(json.dumps(values))
    assert read(old).precisions == {}
    with open_runtime(old, "onnx", "cpu", 1) as opened:
        assert opened.logits(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext_tiny", "efficientnet_b0", "vit_ti_16"])
def test_every_family_of_backbones_has_files_of_every_precision_that_open(name, tmp_path):
    from noisyssl.benchmarks.inference import random_bundle
    from noisyssl.deploy.bundle import read

    random_bundle(tmp_path / "bundle", name, 64)  # its gates let INT8 pass: a random network has no margins
    found = read(tmp_path / "bundle").precisions
    assert set(found) == {"fp32", "fp16", "int8-cpu", "int8-trt"}
    assert found["fp16"]["passed"]
    assert found["fp16"]["max_probability_difference"] < 1e-2
    assert found["int8-trt"]["max_probability_difference"] < 5e-2
