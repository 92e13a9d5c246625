"""The inference benchmark on a small classifier: what takes turns, and a machine that lacks a runtime."""

from contextlib import ExitStack

import pytest

from noisyssl.benchmarks import inference
from noisyssl.deploy.bundle import read
from noisyssl.errors import BundleError, MachineError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("inference") / "bundle"
    inference.random_bundle(out, "resnet18-w16", 32)
    return out


def test_records_of_every_runtime_batch_and_precision(bundle, monkeypatch):
    monkeypatch.setattr(inference, "BATCHES", (1, 4))
    found = [*inference.measure(bundle, threads=1, runs=2)]
    assert [one["settings"]["case"] for one in found] == [
        "model", "model", "file to label, ONNX Runtime", "precisions, ONNX Runtime",
    ]  # fmt: skip
    for one, batch in zip(found[:2], (1, 4), strict=True):
        assert one["settings"]["batch"] == batch
        assert {"torch eager", "torch channels-last", "ONNX Runtime"} <= set(one["figures"])
        row = one["figures"]["torch eager"]
        assert row["times torch eager"] == 1
        assert row["images/s"] == pytest.approx(batch / row["p50 ms"] * 1e3, rel=0.5)
    share = found[2]["figures"]
    assert 0 < share["file to label images/s"] < share["model alone images/s"] * 1.5
    assert {"fp32", "fp16", "int8-cpu"} == set(found[3]["figures"])


@pytest.mark.parametrize("error", [MachineError("no GPU"), BundleError("no engine for this GPU")])
def test_a_machine_that_cannot_run_tensorrt_measures_the_others(bundle, monkeypatch, error):
    real = inference.open_runtime

    def opened(folder, name, *how):
        if name == "tensorrt":
            raise error
        return real(folder, name, *how)

    monkeypatch.setattr(inference, "open_runtime", opened)
    with ExitStack() as stack:
        sides = inference.runtimes(bundle, read(bundle), 1, stack)
    assert list(sides) == ["torch eager", "torch channels-last", "ONNX Runtime"]


def test_a_side_that_computes_something_else_is_not_timed(bundle):
    manifest = read(bundle)
    with ExitStack() as stack:
        sides = inference.runtimes(bundle, manifest, 1, stack)
        sides["ONNX Runtime"] = lambda images: sides["torch eager"](images) + 1
        with pytest.raises(AssertionError, match="ONNX Runtime computes something else"):
            inference.alone(manifest, sides, 2, 1, 1)
