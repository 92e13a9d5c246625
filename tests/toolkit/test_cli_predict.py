"""`noisyssl predict` without torch: an ONNX file made by hand whose logits are the mean colour."""

import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from noisyssl.cli.predict import Csv, Table, predict
from noisyssl.deploy.bundle import Architecture, Geometry, Input, Manifest, sha256, write
from noisyssl.deploy.predict import Row
from noisyssl.errors import BundleError, ConfigError, DataError

CLASSES = ("red", "green", "=blue")
COLOURS = ((200, 10, 10), (10, 200, 10), (10, 10, 200))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper, save

    folder = tmp_path_factory.mktemp("bundle")
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 8, 8, 3])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3])
        for name in ("logits", "probabilities")
    ]
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    constants = {"axes": np.array([1, 2]), "scale": np.float32(0.01)}
    graph = helper.make_graph(
        nodes,
        "g",
        [image],
        outputs,
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        folder / "model.onnx",
    )
    write(folder, Manifest(
        classes=CLASSES, input=Input(size=8), geometry=Geometry(size=8, fit="crop"),
        architecture=Architecture(backbone="resnet18", stem="plain"), checkpoint={}, training={}, figures={},
        parity={}, tools={}, files={"model.onnx": sha256(folder / "model.onnx")}, created="now",
    ))  # fmt: skip
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, colour in enumerate(COLOURS):
        Image.new("RGB", (20, 16), colour).save(folder / f"{i}.png")
    (folder / "1b.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    return folder


def test_the_table_is_aligned_and_says_what_is_broken(bundle, images, capsys):
    predict(bundle, [images], batch=2)
    out, err = capsys.readouterr()
    header, *rows = out.splitlines()
    assert header.split() == ["label", "probability", "path"]
    assert [row.split()[0] for row in rows] == ["red", "green", "error", "=blue"]
    assert {row.index(str(images)) for row in rows} == {header.index("path")}
    assert rows[2].endswith(f"{images}/1b.jpg: is a truncated JPEG")
    powers = np.exp(np.array(COLOURS[0]) * 0.01)
    assert float(rows[0].split()[1]) == pytest.approx(powers[0] / powers.sum(), abs=1e-4)
    assert err == "1 of 4 images could not be read; their rows say why.\n"


def test_masks_that_training_leaves_out_are_left_out_and_said(bundle, images, capsys):
    (images / "images").mkdir()
    (images / "masks").mkdir()
    for name in ("images", "masks"):
        (images / name / "x.png").write_bytes((images / "0.png").read_bytes())
    (images / "1b.jpg").unlink()
    predict(bundle, [images])
    out, err = capsys.readouterr()
    assert "images/images/x.png" in out
    assert "masks/x.png" not in out
    assert err.startswith("note: 1 files in folders of masks beside a folder 'images' were left out")
    assert err.count("\n") == 1


def test_json_has_one_object_per_line(bundle, images, capsys):
    predict(bundle, [images], as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("label") for row in rows] == ["red", "green", None, "=blue"]
    assert rows[2].keys() == {"path", "error"}
    assert list(rows[0]["probabilities"]) == list(CLASSES)
    assert rows[0]["probability"] == max(rows[0]["probabilities"].values())
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_csv_reads_back_and_holds_no_formula(bundle, images, capsys):
    (images / "@sum.png").write_bytes((images / "2.png").read_bytes())
    predict(bundle, [images], as_csv=True)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["path", "label", "probability", "error", "p_red", "p_green", "p_=blue"]
    assert [row["label"] for row in rows] == ["red", "green", "", "'=blue", "'=blue"]
    assert rows[2]["error"]
    assert not rows[2]["p_red"]
    assert sum(float(rows[0][f"p_{name}"]) for name in CLASSES) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("cell", ["=1+1", "+a", "-a", "@a", "\t=1", "-1+1", "'a"])
def test_cells_that_a_spreadsheet_would_run_are_made_inert(cell):
    line = Csv(CLASSES).line(Row(path=cell, error="no"))
    assert next(csv.reader([line]))[0][0] in "'\\"


@pytest.mark.parametrize("label", ["-1", "+1", "-0.5", "1e-3"])
def test_numbers_stay_what_they_are(label):
    """A set with the labels -1 and 1 is joined by them."""
    row = Row(path="a.png", probabilities=np.array([0.9, 0.1], np.float32))
    assert next(csv.reader([Csv((label, "1")).line(row)]))[1] == label


def test_a_path_cannot_break_the_rows():
    path = "a\nb\x1b[31m\udcff.png"
    for style in (Table(CLASSES), Csv(CLASSES)):
        line = style.line(Row(path=path, error="no"))
        assert line.isprintable()
        assert r"a\nb\x1b[31m\udcff.png" in line


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batch": 0}, ConfigError, "--batch is 0; it must lie in 1-4096"),
        ({"as_json": True, "as_csv": True}, ConfigError, "--json and --csv are both given"),
        ({"runtime": "onxn"}, ConfigError, "Did you mean 'onnx'"),
        ({"device": "gpu"}, ConfigError, "device 'gpu' is unknown"),
        ({"threads": 0}, ConfigError, "--threads is 0"),
    ],
)
def test_wrong_options(bundle, images, capsys, arguments, error, words):
    with pytest.raises(error, match=words):
        predict(bundle, [images], **arguments)
    assert capsys.readouterr().out == ""


def test_when_nothing_can_be_read_the_data_are_wrong(bundle, images, capsys):
    with pytest.raises(DataError, match=r"all 1 images could not be read; their rows say why"):
        predict(bundle, [images / "1b.jpg"])
    assert capsys.readouterr().out.splitlines()[1].startswith("error  -")


def test_an_altered_bundle_and_a_missing_path(bundle, images, tmp_path):
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        predict(bundle, [tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="is no folder"):
        predict(tmp_path / "nowhere", [images])
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        predict(images, [images])


BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(("torch", "torchvision", "nvidia.dali", "onnx", "sklearn")))
from noisyssl.cli import main
main(["predict", *sys.argv[1:]])
"""


def test_the_command_runs_without_torch_and_dali(bundle, images):
    command = [sys.executable, "-c", BLOCKED, str(bundle), str(images), "--csv", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    assert done.stderr == "1 of 4 images could not be read; their rows say why.\n"


def test_a_reader_that_leaves_ends_it_quietly(bundle, images):
    for i in range(200):
        Image.new("RGB", (9, 9), COLOURS[i % 3]).save(images / f"x{i:03d}.png")
    command = [sys.executable, "-c", BLOCKED, str(bundle), str(images), "--json", "--batch", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "path" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_wrong_data_end_in_one_line_and_their_code(bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, code in ((tmp_path / "empty", 5), (tmp_path / "nowhere", 2)):
        command = [sys.executable, "-c", BLOCKED, str(bundle), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
