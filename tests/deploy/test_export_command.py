"""`noisyssl export` with lower precisions: which images calibrate, and the exit code."""

from types import SimpleNamespace

import numpy as np
import pytest

from noisyssl.cli import export, run
from noisyssl.cli.calibration import calibration_rows
from noisyssl.deploy.bundle import read
from noisyssl.errors import ConfigError, DataError
from noisyssl.recipe import load


def samples(labels, train):
    return SimpleNamespace(labels=np.array(labels), where=lambda split: np.array(train))


def test_classes_take_turns_so_that_a_rare_one_is_seen():
    labels = [0] * 90 + [1] * 8 + [2] * 2 + [1] * 100
    rows = calibration_rows(samples(labels, range(100)), 40, seed=0)
    assert len(set(rows.tolist())) == len(rows) == 40
    assert rows.max() < 100  # training images only
    assert np.bincount(np.array(labels)[rows]).tolist() == [30, 8, 2]
    assert (rows == calibration_rows(samples(labels, range(100)), 40, seed=0)).all()
    assert (rows != calibration_rows(samples(labels, range(100)), 40, seed=1)).any()
    assert len(calibration_rows(samples(labels, range(100)), 512, seed=0)) == 100


@pytest.mark.parametrize(
    ("labels", "words"),
    [([0, 1] * 15, "has 30 images; calibration needs 32"), ([1] * 50, "has 1 class; calibration on one")],
)
def test_too_few_images_or_one_class_are_refused(labels, words):
    with pytest.raises(DataError, match=words):
        calibration_rows(samples(labels, range(len(labels))), 512, seed=0)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("export.calibration=3", "export.calibration is 3; it must be at least 32 images"),
        ("export.precision=int4", "export.precision is 'int4'; choose one of fp32, fp16, int8"),
        ("export.int8_agreement=99", "in \\[0, 1\\]"),
        ("export.fp16_range=70000", "in \\(0, 65504\\]"),
        ("export.int8_range=wide", "choose one of auto, full, reduced"),
    ],
)
def test_settings_out_of_range_are_named(setting, words):
    with pytest.raises(ConfigError, match=words):
        load(None, [setting])


def test_a_failed_gate_is_told_in_the_table_and_by_exit_code_4(lowered, monkeypatch, capsys):
    from dataclasses import replace

    manifest = read(lowered)
    asked = {}

    def written(run, out, **wishes):
        asked.update(wishes)
        return manifest

    monkeypatch.setattr(export, "write_bundle", written)
    command = [
        "export",
        "run",
        str(lowered),
        "--precision",
        "fp32,int8",
        "--calibration",
        "64",
        "--batch",
        "1,2,4",
    ]
    assert run(command) == 0
    assert (asked["precision"], asked["calibration"], asked["batch"]) == ("fp32,int8", 64, "1,2,4")
    table = capsys.readouterr().out
    assert "int8-trt" in table
    assert "left out" not in table
    failed = manifest.precisions["int8-cpu"] | {"passed": False, "why": "98 % of 50 images keep their class"}
    manifest = replace(manifest, precisions=manifest.precisions | {"int8-cpu": failed})
    for more in ([], ["--json"]):
        assert run([*command, *more]) == 4
        out, err = capsys.readouterr()
        assert "98 % of 50 images keep their class" in out
        assert err.startswith("error: int8-cpu was left out: 98 % of 50 images")
        assert err.count("\n") == 1
