"""Real engines where TensorRT for RTX is installed (it builds without a GPU); choices against stand-ins."""

import hashlib
import json
from types import SimpleNamespace

import pytest

from noisyssl.deploy import cuda_driver, to_tensorrt
from noisyssl.deploy.bundle import read, sha256
from noisyssl.errors import ConfigError, MachineError

rtx = pytest.mark.skipif("tensorrt_rtx" not in to_tensorrt.flavours(), reason="tensorrt_rtx is not installed")


@rtx
def test_the_engine_of_a_bundle_is_real_and_described(exported):
    name = "engines/model.tensorrt_rtx.plan"
    sidecar = json.loads((exported / f"{name}.json").read_text())
    plan = (exported / name).read_bytes()
    assert len(plan) == sidecar["bytes"] > 300_000
    assert hashlib.sha256(plan).hexdigest() == sidecar["plan_sha256"] == read(exported).files[name]
    assert sidecar["onnx_sha256"] == sha256(exported / "model.onnx")
    assert sidecar["compute_capabilities"] == ["SM86", "SM120"]
    assert sidecar["profile"] == {"min": 1, "opt": 8, "max": 64}
    assert sidecar["precision"] == "fp32"
    assert sidecar["tf32"] is False
    assert sidecar["layer_types"] == {"CONVOLUTION FLOAT": 20, "MATRIX_MULTIPLY FLOAT": 1}
    assert sidecar["version"] == str(to_tensorrt.load("tensorrt_rtx").__version__)


@rtx
def test_one_capability_makes_a_smaller_engine_and_capabilities_count_once(exported, tmp_path):
    sidecar = to_tensorrt.build(
        exported / "model.onnx", tmp_path / "a.plan", capabilities=["SM89", "SM89"], profile=(2, 4, 4),
        flavour="tensorrt_rtx",
    )  # fmt: skip
    assert sidecar["compute_capabilities"] == ["SM89"]
    assert sidecar["profile"] == {"min": 2, "opt": 4, "max": 4}
    assert json.loads((tmp_path / "a.plan.json").read_text()) == sidecar


@rtx
def test_turing_is_refused_in_one_line_before_the_build(exported, tmp_path):
    with pytest.raises(ConfigError, match=r"SM75 is asked for an FP32 engine.*Leave SM75 out") as caught:
        to_tensorrt.build(exported / "model.onnx", tmp_path / "a.plan", capabilities=["SM75", "SM86"],
                          flavour="tensorrt_rtx")  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@rtx
def test_what_is_no_network_is_refused_with_tensorrts_own_words(tmp_path, capfd):
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in
            (("x", [2, 3, 3]), ("y", [2])))  # fmt: skip
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["y"])], "g", [x], [y])
    (tmp_path / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(MachineError, match=r"TensorRT for RTX .* cannot parse model\.onnx for SM86: .{10,}"):
        to_tensorrt.build(
            tmp_path / "model.onnx", tmp_path / "a.plan", capabilities=["SM86"], flavour="tensorrt_rtx"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert capfd.readouterr() == ("", "")


@rtx
@pytest.mark.parametrize(
    ("name", "answer"), [("SM90", "Other GPUs need `tensorrt`"), ("SM88", "Did you mean 'SM89'")]
)
def test_a_capability_that_is_no_target_lists_the_targets(name, answer):
    with pytest.raises(ConfigError, match=f"{name}.*SM75, SM80, SM86, SM89, SM120.*{answer}"):
        to_tensorrt.choose([name], "tensorrt_rtx")


@pytest.mark.parametrize("name", ["8.6", "sm86", "SM", "SM8", "", "SM86 "])
def test_a_capability_that_is_none_says_how_to_write_it(name):
    with pytest.raises(ConfigError, match="write SM and digits, such as SM75"):
        to_tensorrt.choose([name])


@pytest.mark.parametrize("profile", [(0, 1, 2), (4, 2, 8), (1, 9, 8)])
def test_a_profile_must_rise_from_one(exported, tmp_path, profile):
    with pytest.raises(ConfigError, match="it must be smallest,usual,largest batch"):
        to_tensorrt.build(exported / "model.onnx", tmp_path / "a.plan", profile=profile)


def machine(monkeypatch, installed, gpu):
    names = ("NONE", "CURRENT", "SM80", "SM86", "SM120")
    module = SimpleNamespace(
        __version__="9", ComputeCapability=SimpleNamespace(__members__=dict.fromkeys(names))
    )
    monkeypatch.setattr(to_tensorrt, "flavours", lambda: installed)
    monkeypatch.setattr(to_tensorrt, "load", lambda name: module)
    monkeypatch.setattr(cuda_driver, "capability", lambda: gpu)


BOTH = ["tensorrt", "tensorrt_rtx"]


@pytest.mark.parametrize(
    ("installed", "gpu", "asked", "flavour", "expected"),
    [
        (BOTH, "SM90", [], "auto", "tensorrt"),
        (BOTH, "SM90", ["SM90"], "auto", "tensorrt"),
        (BOTH, "SM90", ["SM86", "SM120"], "auto", "tensorrt_rtx"),
        (BOTH, None, [], "auto", "tensorrt_rtx"),
        (BOTH, "SM86", ["SM86"], "tensorrt_rtx", "tensorrt_rtx"),
        (["tensorrt_rtx"], None, ["SM86"], "auto", "tensorrt_rtx"),
        (["tensorrt"], "SM90", ["SM90"], "auto", "tensorrt"),
    ],
)
def test_the_flavour_that_can_build_is_taken(monkeypatch, installed, gpu, asked, flavour, expected):
    machine(monkeypatch, installed, gpu)
    assert to_tensorrt.choose(asked, flavour) == expected


@pytest.mark.parametrize(
    ("installed", "gpu", "asked", "flavour", "error", "words"),
    [
        (
            [],
            None,
            [],
            "auto",
            MachineError,
            r"neither tensorrt nor tensorrt_rtx is installed.*noisyssl\[rtx\]",
        ),
        (
            ["tensorrt"],
            None,
            ["SM90"],
            "auto",
            MachineError,
            "no usable GPU; asked is SM90. Build on the target",
        ),
        (BOTH, "SM90", ["SM86"], "tensorrt", MachineError, "this machine has SM90; asked is SM86"),
        (["tensorrt_rtx"], None, [], "rtx", ConfigError, "TensorRT flavour 'rtx' is unknown"),
        (["tensorrt_rtx"], None, ["SM90"], "auto", ConfigError, "SM90.*SM80, SM86, SM120"),
    ],
)
def test_what_cannot_be_built_here_says_where(monkeypatch, installed, gpu, asked, flavour, error, words):
    machine(monkeypatch, installed, gpu)
    with pytest.raises(error, match=words):
        to_tensorrt.choose(asked, flavour)


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MachineError, match=r"package 'tensorrt' cannot be loaded.*noisyssl\[tensorrt\]"):
        to_tensorrt.load("tensorrt")
