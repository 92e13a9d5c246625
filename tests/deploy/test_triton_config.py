"""Every configuration is what Triton's own protobuf takes, and says what the page on deployment promises."""

import json

import pytest

from noisyssl.deploy import triton_config, triton_launch
from noisyssl.deploy.triton_models import FILES

pytest.importorskip("tritonclient.grpc", reason="pip install 'noisyssl[triton]'")


def parsed(text: str):
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(text, model_config_pb2.ModelConfig())


def onnx(**changes):
    settings = {"version": 3, "batch": 64, "precision": "fp32", "digest": "ab" * 32} | changes
    return parsed(triton_config.onnx_model("lung", 3, 224, **settings))


def test_the_onnx_variant_is_complete():
    config = onnx()
    assert (config.name, config.backend, config.max_batch_size) == ("lung", "onnxruntime", 64)
    assert [(i.name, list(i.dims)) for i in config.input] == [("image", [224, 224, 3])]
    assert [(o.name, list(o.dims), o.label_filename) for o in config.output] == [
        ("logits", [3], "labels.txt"),
        ("probabilities", [3], "labels.txt"),
    ]
    assert list(config.version_policy.specific.versions) == [3]
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    policy = config.dynamic_batching.default_queue_policy
    assert policy.timeout_action == policy.REJECT
    assert policy.max_queue_size > 0
    assert policy.default_timeout_microseconds > 0
    assert [w.batch_size for w in config.model_warmup] == [1, 8, 64]
    assert [g.count for g in config.instance_group] == [1]
    assert config.parameters["bundle_sha256"].string_value == "ab" * 32


def test_a_gpu_server_builds_its_engine_and_two_versions_never_share_one():
    (first,) = onnx().optimization.execution_accelerators.gpu_execution_accelerator
    assert first.name == "tensorrt"
    assert first.parameters["trt_engine_cache_enable"] == "1"
    assert first.parameters["precision_mode"] == "FP32"
    paths = {
        onnx(digest=digest, precision=precision)
        .optimization.execution_accelerators.gpu_execution_accelerator[0]
        .parameters["trt_engine_cache_path"]
        for digest in ("ab" * 32, "cd" * 32)
        for precision in ("fp32", "fp16")
    }
    assert len(paths) == 4  # ONNX Runtime would find an engine of the same graph with other weights
    assert all(path.startswith(f"{triton_config.ENGINE_CACHE}/") for path in paths)


def test_a_file_for_cpus_asks_for_no_accelerator():
    config = onnx(precision="int8")
    assert not config.optimization.execution_accelerators.gpu_execution_accelerator
    assert config.instance_group[0].kind == config.instance_group[0].KIND_CPU
    assert FILES["int8"] == "model.int8-cpu.onnx"


def test_plans_are_chosen_by_capability():
    text = triton_config.plan_model(
        "lung_trt",
        3,
        64,
        version=1,
        batch=8,
        plans={"9.0": "b.plan", "8.6": "a.plan"},
        precision="fp32",
        digest="x",
    )
    config = parsed(text)
    assert dict(config.cc_model_filenames) == {"8.6": "a.plan", "9.0": "b.plan"}
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU


def test_the_ensemble_joins_two_models_of_one_version():
    view = parsed(triton_config.view_model("lung_dali", 64, version=2, batch=16))
    assert view.input[0].allow_ragged_batch
    assert list(view.output[0].dims) == [64, 64, 3]
    whole = parsed(triton_config.ensemble("lung_ensemble", "lung_dali", "lung", 3, version=2, batch=16))
    first, second = whole.ensemble_scheduling.step
    assert [(s.model_name, s.model_version) for s in (first, second)] == [("lung_dali", 2), ("lung", 2)]
    assert dict(first.input_map) == {whole.input[0].name: whole.input[0].name}
    assert first.output_map[view.output[0].name] == second.input_map["image"]
    assert sorted(second.output_map) == sorted(o.name for o in whole.output)


@pytest.mark.parametrize("text", ['a "quoted" name', "back\\slash", "tab\tand é"])
def test_any_text_survives_the_text_format(text):
    assert parsed(triton_config.text({"name": text})).name == text


def test_the_launch_line_is_hardened():
    files = triton_launch.files("lung", 64 << 20, gpu_only=False)
    launch = files["launch.sh"]
    for word in (
        "--read-only", "--cap-drop=ALL", "no-new-privileges", "--user=1000:1000", "--pids-limit", "--memory",
        "dst=/models,readonly", "--publish=127.0.0.1:8000:8000", "--publish=127.0.0.1:8001:8001",
        "--publish=127.0.0.1:8002:8002", "--model-control-mode=none", "--disable-auto-complete-config",
        "--strict-readiness=true", "--http-max-input-size=67108864", "--http-restricted-api=shared-memory,",
        "--grpc-restricted-protocol=shared-memory,",
    ):  # fmt: skip
        assert word in launch, word
    assert "@" not in "".join(files.values()).replace('"$@"', "")


def test_compose_keeps_triton_inside():
    yaml = pytest.importorskip("yaml", reason="parses compose.yaml; comes with noisyssl[ray]")
    files = triton_launch.files("lung", 100 << 20, gpu_only=True)
    services = yaml.safe_load(files["compose.yaml"])["services"]
    triton, proxy = services["triton"], services["proxy"]
    assert "ports" not in triton
    assert triton["networks"] == ["inside"]
    assert triton["read_only"]
    assert triton["user"] == "1000:1000"
    assert triton["cap_drop"] == ["ALL"]
    assert all(port.startswith("${PROXY_ADDRESS:-127.0.0.1}:") for port in proxy["ports"])
    assert yaml.safe_load(files["compose.gpu.yaml"])["services"]["triton"]["deploy"]
    assert "ssl_verify_client on;" in files["proxy.conf"]
    assert "client_max_body_size 100m;" in files["proxy.conf"]
    assert json.dumps(triton["command"]).count("NOISYSSL_ADMIN_KEY") == 2


def test_the_limit_holds_a_batch():
    assert triton_launch.input_limit(64, 64) == 64 << 20
    assert triton_launch.input_limit(64, 1024) >= 64 * 1024 * 1024 * 3


@pytest.mark.parametrize("limit", [None, 64 << 20])
def test_every_flag_of_the_server_is_one_argument(limit):
    found = triton_launch.flags(
        "/models", address="127.0.0.1", ports=triton_launch.PORTS, limit=limit, secret="s"
    )
    assert all(flag.startswith("--") and flag.count("--") == 1 for flag in found)
    assert {"--exit-timeout-secs=10", "--allow-cpu-metrics=false", "--model-control-mode=none"} <= set(found)
    assert {f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")} <= set(found)
