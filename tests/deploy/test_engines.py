"""`noisyssl engine`: a new bundle with more engines; the old one stays as it is."""

import json
import shutil

import pytest

from noisyssl.cli import run
from noisyssl.deploy import engines, to_tensorrt
from noisyssl.deploy.bundle import content, read, sha256
from noisyssl.deploy.to_tensorrt import equal_command

pytestmark = pytest.mark.skipif(
    "tensorrt_rtx" not in to_tensorrt.flavours(), reason="tensorrt_rtx is not installed"
)
RTX = ["--flavour", "tensorrt_rtx"]


def files(folder):
    return {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}


def test_an_export_builds_every_precision_and_leaves_turing_out_of_fp32(lowered):
    sidecars = engines.sidecars_of(lowered, read(lowered))
    assert {name: (s["precision"], s["compute_capabilities"]) for name, s in sidecars.items()} == {
        "engines/model.tensorrt_rtx.plan": ("fp32", ["SM86"]),
        "engines/model.fp16.tensorrt_rtx.plan": ("fp16", ["SM75", "SM86"]),
        "engines/model.int8.tensorrt_rtx.plan": ("int8", ["SM75", "SM86"]),
    }
    assert sidecars["engines/model.int8.tensorrt_rtx.plan"]["layer_types"] == {
        "CONVOLUTION INT8": 20, "MATRIX_MULTIPLY HALF": 1
    }  # fmt: skip
    for sidecar in sidecars.values():
        assert sidecar["onnx_sha256"] == read(lowered).files[sidecar["onnx"]]
        assert sidecar["bytes"] > 100_000
        assert sidecar["build_s"] > 0
    fp32, half = (sidecars[f"engines/model{p}.tensorrt_rtx.plan"]["bytes"] for p in ("", ".fp16"))
    assert half < 0.7 * fp32


def test_a_new_bundle_has_more_engines_and_the_old_one_is_untouched(lowered, tmp_path, capsys):
    before, out = files(lowered), tmp_path / "a" / "new"
    command = ["engine", str(lowered), "--out", str(out), "--tensorrt", "SM89", "--precision", "fp16", *RTX]
    assert run([*command, "--batch", "1,4,16"]) == 0
    assert files(lowered) == before
    name = "engines/model.fp16.tensorrt_rtx.SM89.plan"
    manifest = read(out)
    assert set(manifest.files) == set(before) - {"manifest.json"} | {name, f"{name}.json"}
    assert {n: d for n, d in manifest.files.items() if name not in n} == {
        n: d for n, d in before.items() if n != "manifest.json"
    }
    sidecar = json.loads(content(out, manifest, f"{name}.json"))
    assert sidecar["profile"] == {"min": 1, "opt": 4, "max": 16}
    assert manifest.precisions == read(lowered).precisions
    said = capsys.readouterr().out
    assert "fp16 proved by the network's types" in said
    assert (
        "tensorrt_rtx --onnx=model.fp16.onnx --saveEngine=model.fp16.tensorrt_rtx.SM89.plan "
        "--minShapes=image:1x32x32x3 --optShapes=image:4x32x32x3 --maxShapes=image:16x32x32x3 --noTF32 "
        "--computeCapabilities=89 --skipInference"
    ) in said
    assert run(["engine", str(lowered), "--out", str(out), *RTX]) == 2  # exists


def test_the_equal_line_of_tensorrt_itself():
    line = equal_command(
        "m.onnx", "m.plan", size=224, profile=(1, 8, 64), flavour="tensorrt", capabilities=["SM90"]
    )
    assert line == (
        "trtexec --onnx=m.onnx --saveEngine=m.plan --minShapes=image:1x224x224x3 "
        "--optShapes=image:8x224x224x3 --maxShapes=image:64x224x224x3 --stronglyTyped --noTF32 "
        "--skipInference"
    )


@pytest.mark.parametrize(
    ("extra", "code", "words"),
    [
        (["--precision", "fp16"], 6, "has no model.fp16.onnx (it was not asked for)"),
        (["--precision", "int4"], 2, "precision 'int4' is unknown"),
        (["--batch", "1,8"], 2, "--batch is '1,8'; it must be three batch sizes"),
        (["--batch", "8,4,2"], 2, "must be smallest,usual,largest"),
        (["--tensorrt", "SM90"], 2, "SM90"),
        (["--tensorrt", "SM75"], 2, "no FP32 matrix multiplication on Turing"),
    ],
)
def test_what_cannot_be_built_leaves_nothing_behind(exported, tmp_path, capsys, extra, code, words):
    assert run(["engine", str(exported), "--out", str(tmp_path / "new"), *RTX, *extra]) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_never_written_into(bundle, capsys):
    before = files(bundle)
    for inner in ("new", "engines/new"):
        assert run(["engine", str(bundle), "--out", str(bundle / inner), *RTX]) == 2
        assert "never written into" in capsys.readouterr().err
    assert files(bundle) == before


def test_the_same_targets_again_replace_their_engine(lowered, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    wish = {"precisions": ["int8"], "capabilities": ["SM80"], "flavour": "tensorrt_rtx"}
    engines.add(lowered, first, **wish)
    manifest, _ = engines.add(first, second, **wish, profile=(2, 2, 2))
    name = "engines/model.int8.tensorrt_rtx.SM80.plan"
    assert engines.sidecars_of(second, manifest)[name]["profile"]["max"] == 2
    assert set(manifest.files) == set(read(first).files)
    shutil.rmtree(first)
