import errno
import os
import shutil
import stat

import numpy as np
import pytest

from noisyssl.deploy import bundle as bundles
from noisyssl.deploy import export, parity, to_onnx, to_tensorrt
from noisyssl.deploy.bundle import read
from noisyssl.deploy.export import export_bundle
from noisyssl.errors import ConfigError, ExportError, MachineError


@pytest.fixture
def quick(exported, monkeypatch):
    """The exporter gives the session's file again; everything else is real."""
    data = (exported / "model.onnx").read_bytes()
    monkeypatch.setattr(to_onnx, "export", lambda classifier, path, **_: bundles.save(path, data))


def test_a_bundle_says_what_it_is(exported, classifier):
    manifest = read(exported)
    assert manifest.classes == ("benign", "malignant", "=other")
    assert (manifest.geometry.size, manifest.geometry.fit) == (32, "crop")
    assert (manifest.architecture.backbone, manifest.architecture.stem) == ("resnet18-w16", "plain")
    assert manifest.checkpoint == {"which": "best", "epoch": 3}
    assert manifest.training["noise"]["realised"] == 0.397
    assert manifest.figures == {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}, "auroc": None}
    assert manifest.parity["n"] == 37
    assert manifest.parity["max_logit_difference"] <= 1e-4
    assert {"torch", "onnx", "onnxruntime-gpu", "noisyssl", "python"} <= manifest.tools.keys()
    assert {"model.onnx", "model.safetensors"} <= manifest.files.keys()


def test_a_bundle_is_whole_and_alone(exported):
    there = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert there == {*read(exported).files, "manifest.json"}
    assert [path.name for path in exported.parent.iterdir()] == ["bundle"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(exported.stat().st_mode) == 0o777 & ~umask  # a server under another user reads it
    for path in exported.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask


def test_weights_are_those_that_were_trained(exported, classifier):
    import torch
    from safetensors.torch import load_file

    saved = load_file(exported / "model.safetensors")
    assert saved.keys() == classifier.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in classifier.state_dict().items())


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_output_is_left_alone(wishes, tmp_path, kind):
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": lambda: out.write_text("mine"),
     "dangling link": lambda: out.symlink_to(tmp_path / "nowhere")}[kind]()  # fmt: skip
    with pytest.raises(ConfigError, match=r"out already exists; give a new folder"):
        export_bundle(out, **wishes, tensorrt=None)
    assert os.path.lexists(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_gate_leaves_nothing_behind(wishes, tmp_path, quick):
    from noisyssl.classifier import build_classifier

    other = build_classifier("resnet18-w16", "plain", 3).eval()
    with pytest.raises(ExportError, match="No bundle was written"):
        export_bundle(tmp_path / "a" / "b", **wishes | {"classifier": other}, tensorrt=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", range(3))
def test_a_full_disk_at_any_write_leaves_nothing_behind(wishes, tmp_path, quick, monkeypatch, step):
    writes = []
    inner = bundles.save

    def save(path, data):
        writes.append(path.name)
        if len(writes) > step:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inner(path, data)

    monkeypatch.setattr(bundles, "save", save)
    with pytest.raises(MachineError, match=r"No space left on device\); nothing was left behind\. Free some"):
        export_bundle(tmp_path / "new" / "out", **wishes, tensorrt=None)
    assert not list(tmp_path.iterdir())
    assert writes == ["model.onnx", "model.safetensors", "manifest.json"][: step + 1]


def test_an_interrupt_leaves_nothing_behind(wishes, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(parity, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_bundle(tmp_path / "out", **wishes, tensorrt=None)
    assert not list(tmp_path.iterdir())


def test_two_exports_to_one_place_make_one_bundle(wishes, tmp_path, quick, exported, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(export.bundle, "write", lambda folder, _: shutil.copytree(exported, out)
                        and shutil.copytree(exported, folder, dirs_exist_ok=True))  # fmt: skip
    with pytest.raises((MachineError, ConfigError)):
        export_bundle(out, **wishes, tensorrt=None)
    assert read(out) == read(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_manifest_is_written_last(wishes, tmp_path, quick, monkeypatch):
    seen = []
    monkeypatch.setattr(export.bundle, "write", lambda folder, manifest: seen.append(
        ({*manifest.files}, {p.name for p in folder.rglob("*") if p.is_file()})) or (_ for _ in ()).throw(
            OSError(errno.EIO, "stop")))  # fmt: skip
    with pytest.raises(MachineError):
        export_bundle(tmp_path / "out", **wishes, tensorrt=None)
    assert seen[0][0] == seen[0][1] == {"model.onnx", "model.safetensors"}


def test_an_engine_that_cannot_be_built_costs_no_export(wishes, tmp_path, monkeypatch):
    monkeypatch.setattr(to_onnx, "export", lambda *_, **__: pytest.fail("exported first"))
    with pytest.raises(ConfigError, match="write SM and digits"):
        export_bundle(tmp_path / "out", **wishes, tensorrt=["8.6"])
    monkeypatch.setattr(to_tensorrt, "flavours", list)
    with pytest.raises(MachineError, match="neither tensorrt nor tensorrt_rtx"):
        export_bundle(tmp_path / "out", **wishes, tensorrt=[])
    with pytest.raises(ConfigError, match="classes has 2 names; the classifier has 3 logits"):
        export_bundle(tmp_path / "out", **wishes | {"classes": ("a", "b")}, tensorrt=None)
    assert not list(tmp_path.iterdir())


def test_images_are_asked_for_and_not_kept(wishes, tmp_path, quick, images):
    asked = []

    def batches():
        asked.append(0)
        for _ in range(6):
            yield np.copy(images[2])

    manifest = export_bundle(tmp_path / "out", **wishes | {"images": batches}, tensorrt=None)
    assert manifest.parity["n"] == 30
    assert asked == [0]
    assert not (tmp_path / "out" / "engines").exists()
