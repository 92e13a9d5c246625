"""A repository is written whole, only added to, rolled back, and refused once a byte of it changed."""

import errno
import json

import pytest

from noisyssl.cli import run
from noisyssl.deploy import bundle as bundles
from noisyssl.deploy.triton_models import classic_plans, version
from noisyssl.deploy.triton_record import read
from noisyssl.deploy.triton_repository import deploy, roll_back
from noisyssl.errors import BundleError, ConfigError, MachineError


def state(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def rewritten(folder, change):
    """The bundle with a changed manifest that fits itself again."""
    fields = json.loads((folder / "manifest.json").read_text())
    change(fields)
    fields["sha256"] = bundles.own_digest(fields)
    (folder / "manifest.json").write_text(json.dumps(fields))
    return folder


def plan(folder, name, **sidecar):
    """Put a plan of any flavour into the bundle."""
    (folder / "engines").mkdir(exist_ok=True)
    facts = {"flavour": "tensorrt", "precision": "fp32", "profile": {"min": 1, "opt": 8, "max": 32},
             "compute_capabilities": ["SM86"]} | sidecar  # fmt: skip
    files = {f"engines/{name}.plan": b"plan " + name.encode(), f"engines/{name}.plan.json": json.dumps(facts)}
    for path, data in files.items():
        (folder / path).write_bytes(data if isinstance(data, bytes) else data.encode())
    rewritten(folder, lambda f: f["files"].update({p: bundles.sha256(folder / p) for p in files}))


def made(folder, out, **changes):
    return deploy(out, version(folder, **({"precision": "fp32", "batch": 16} | changes)), None)


@pytest.fixture
def repository(exported, tmp_path):
    made(exported, tmp_path / "repository")
    return tmp_path / "repository"


def test_it_holds_the_bundles_own_file_and_names(exported, repository, capsys):
    assert (repository / "noisyssl/1/model.onnx").read_bytes() == (exported / "model.onnx").read_bytes()
    assert (repository / "noisyssl/labels.txt").read_text() == "benign\nmalignant\n=other\n"
    folders = sorted(path.name for path in repository.iterdir() if path.is_dir())
    assert folders == ["noisyssl"]  # Triton takes every folder for a model
    assert read(repository).active["bundle"] == json.loads((exported / "manifest.json").read_text())["sha256"]
    assert not list(repository.parent.glob(".*"))


def test_a_version_is_added_and_rolled_back_without_touching_another(exported, repository):
    first = state(repository / "noisyssl/1")
    made(exported, repository)
    assert "versions: 2" in (repository / "noisyssl/config.pbtxt").read_text()
    assert state(repository / "noisyssl/1") == first
    assert roll_back(repository, None).record["active"] == 1
    assert "versions: 1" in (repository / "noisyssl/config.pbtxt").read_text()
    assert roll_back(repository, 2).record["active"] == 2
    with pytest.raises(ConfigError, match="has 1, 2"):
        roll_back(repository, 3)
    roll_back(repository, 1)
    with pytest.raises(ConfigError, match="no older one"):
        roll_back(repository, None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda f: f.update(classes=["a", "b", "c"]), "serves classes"),
        (lambda f: (f["input"].update(size=40), f["geometry"].update(size=40)), "serves size 32"),
    ],
)
def test_what_would_break_its_clients_is_refused(repository, bundle, change, why):
    before = state(repository)
    with pytest.raises(ConfigError, match=why):
        made(rewritten(bundle, change), repository)
    assert state(repository) == before


@pytest.mark.parametrize("content", ["", "notes", "{}", '{"format": "other"}', "[1]"])
def test_a_folder_that_is_not_ours_is_left_alone(exported, tmp_path, content):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep")
    if content:
        (folder / "noisyssl.json").write_text(content)
    before = state(folder)
    assert run(["deploy", "triton", str(exported), str(folder)]) == 2
    assert run(["deploy", "rollback", str(folder)]) == 2
    assert run(["serve", str(folder)]) == 2
    assert state(folder) == before


def test_a_tampered_bundle_is_never_copied(bundle, repository, tmp_path):
    before = state(repository)
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    assert run(["deploy", "triton", str(bundle), str(repository)]) == 6
    assert run(["deploy", "triton", str(bundle), str(tmp_path / "new")]) == 6
    assert run(["serve", str(bundle)]) == 6
    assert state(repository) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["noisyssl/1/model.onnx", "noisyssl/config.pbtxt", "noisyssl/labels.txt",
                                  "noisyssl.json"])  # fmt: skip
def test_a_repository_that_was_altered_is_not_served(repository, name):
    path = repository / name
    path.write_bytes(path.read_bytes().replace(b"noisyssl", b"n0isyssl") + b" ")
    if name == "noisyssl.json":
        path.write_bytes(path.read_bytes().replace(b'"active": 1', b'"active": 2').replace(b"n0", b"no"))
    with pytest.raises(BundleError, match="altered"):
        read(repository)


def test_a_link_in_a_repository_is_not_followed(repository, tmp_path):
    path = repository / "noisyssl/1/model.onnx"
    path.rename(tmp_path / "elsewhere.onnx")
    path.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError, match="altered"):
        read(repository)


def test_a_damaged_version_is_no_way_back(exported, repository):
    made(exported, repository)
    (repository / "noisyssl/1/model.onnx").write_bytes(b"")
    before = state(repository)
    with pytest.raises(BundleError, match="missing or altered"):
        roll_back(repository, 1)
    assert state(repository) == before


def test_a_full_disk_changes_nothing_that_is_served(exported, repository, tmp_path, monkeypatch):
    before = read(repository).record

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundles, "save", full)
    for place in (repository, tmp_path / "new"):
        with pytest.raises(MachineError, match="No space left"):
            made(exported, place)
    monkeypatch.undo()
    assert read(repository).record == before
    assert not (tmp_path / "new").exists()
    made(exported, repository)  # what the failed one left is no hindrance
    assert read(repository).record["active"] == 2


def test_a_killed_deploy_leaves_the_old_version_served(exported, repository, monkeypatch):
    from noisyssl.deploy import triton_repository

    def killed(folder, record):
        raise KeyboardInterrupt

    monkeypatch.setattr(triton_repository, "_activate", killed)
    with pytest.raises(KeyboardInterrupt):
        made(exported, repository)
    monkeypatch.undo()
    assert read(repository).record["active"] == 1
    made(exported, repository)
    assert sorted(read(repository).record["versions"]) == ["1", "2"]


def test_classic_plans_become_a_variant_and_rtx_plans_are_named(bundle, tmp_path):
    plan(bundle, "h100", compute_capabilities=["SM90"])
    plan(bundle, "a10", profile={"min": 1, "opt": 8, "max": 16})
    plan(bundle, "half", precision="fp16")
    plan(bundle, "rtx", flavour="tensorrt_rtx")
    new = version(bundle, precision="fp32", batch=16)
    plans = new.files["tensorrt"]
    assert plans == {"model_cc86.plan": b"plan a10", "model_cc90.plan": b"plan h100"}
    assert any("rtx.plan" in line and "TensorRT for RTX" in line for line in new.left_out)
    assert any("half.plan" in line and "fp16" in line for line in new.left_out)
    repository = deploy(tmp_path / "repository", new, "lung")
    assert repository.models == {"lung": "onnxruntime", "lung_trt": "tensorrt"}
    text = (repository.folder / "lung_trt/config.pbtxt").read_text()
    assert 'key: "9.0"\n  value: "model_cc90.plan"' in text
    assert "gpus=${TRITON_GPUS-all}" in (repository.folder / "launch.sh").read_text()
    with pytest.raises(ConfigError, match="take at most 16"):
        version(bundle, precision="fp32", batch=32)


def test_an_rtx_engine_alone_makes_no_variant(exported):
    manifest = bundles.read(exported)
    plans, _, left_out = classic_plans(exported, manifest, "fp32")
    assert plans == {}
    assert len(left_out) == sum(name.endswith(".plan") for name in manifest.files)


def test_a_precision_the_bundle_lacks_is_said(exported, capsys, tmp_path):
    assert run(["deploy", "triton", str(exported), str(tmp_path / "r"), "--precision", "fp99"]) == 2
    assert run(["deploy", "triton", str(exported), str(tmp_path / "r"), "--name", "../up"]) == 2
    assert run(["deploy", "triton", str(exported), str(tmp_path / "r"), "--batch", "0"]) == 2
    capsys.readouterr()
    assert run(["deploy", "triton", str(exported), str(tmp_path / "r")]) == 0
    assert "serves version 1" in capsys.readouterr().out
    assert run(["deploy", "triton", str(exported), str(tmp_path / "r"), "--name", "other"]) == 2
    assert run(["deploy", "triton", str(exported), str(tmp_path / "r"), "--batch", "8"]) == 2


def test_another_precision_is_picked_by_its_name(bundle, tmp_path):
    half = (bundle / "model.onnx").read_bytes() + b"\x1a\x00"  # an empty domain, a file of its own
    (bundle / "model.fp16.onnx").write_bytes(half)
    digest = bundles.sha256(bundle / "model.fp16.onnx")
    rewritten(bundle, lambda f: f["files"].update({"model.fp16.onnx": digest}))
    repository = made(bundle, tmp_path / "r", precision="fp16")
    assert (repository.folder / "noisyssl/1/model.onnx").read_bytes() == half
    assert 'value: "FP16"' in (repository.folder / "noisyssl/config.pbtxt").read_text()


def test_two_deploys_at_once_do_not_mix(exported, repository):
    from noisyssl.deploy.triton_repository import _locked

    with _locked(repository), pytest.raises(MachineError, match="another process"):
        made(exported, repository)
