"""The process that decodes what can bring a process down."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="needs noisyssl[dicom]")

from noisyssl import dicom_child
from noisyssl.benchmarks import dicom_phantoms as phantoms
from noisyssl.errors import MachineError
from noisyssl.images import BadImage, decode

pytestmark = pytest.mark.filterwarnings(r"ignore:::pydicom\.")
GOOD = phantoms.dataset(phantoms.picture(12), 12)


def test_a_decoder_that_dies_costs_one_file(monkeypatch):
    data = phantoms.file(GOOD, phantoms.JPEGLosslessSV1)
    expected = decode(data)
    dicom_child._end_all()
    started = subprocess.Popen
    greet = "import os, sys, time; from noisyssl.dicom_child import GREETING; os.write(1, GREETING); "
    dying = [sys.executable, "-c", greet + "sys.stdin.buffer.read(8); os.abort()"]
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: started(dying, **how))
    with pytest.raises(BadImage, match="is a broken DICOM file"):
        decode(data)
    monkeypatch.setattr(subprocess, "Popen", started)
    assert np.array_equal(decode(data), expected)
    silent = [sys.executable, "-c", greet + "time.sleep(600)"]
    dicom_child._end_all()
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: started(silent, **how))
    monkeypatch.setattr(dicom_child, "PATIENCE_S", 5)
    large = phantoms.file(phantoms.dataset(phantoms.picture(12, size=400), 12), phantoms.JPEGLosslessSV1)
    dicom_child._idle.append((dicom_child.os.getpid(), dicom_child._child()))
    monkeypatch.setattr(dicom_child, "PATIENCE_S", 0.3)
    with pytest.raises(BadImage, match="is a broken DICOM file"):
        decode(large)  # more than a pipe holds: neither writing nor reading waits for ever


def test_a_decoder_that_cannot_start_is_the_machines_fault(monkeypatch, tmp_path):
    data = phantoms.file(GOOD, phantoms.JPEGLosslessSV1)
    dicom_child._end_all()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MachineError, match="does not start"):
        decode(data)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    with pytest.raises(MachineError, match="cannot be started"):
        decode(data)


def test_the_decoder_runs_nothing_of_the_current_folder_and_ignores_the_terminals_signals(
    tmp_path, monkeypatch
):
    (tmp_path / "json.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path)
    dicom_child._end_all()
    data = phantoms.file(GOOD, phantoms.JPEGLosslessSV1)
    assert decode(data).any()
    ((_, child),) = dicom_child._idle
    assert dicom_child.os.getpgid(child.pid) != dicom_child.os.getpgrp()


def test_children_serve_threads_side_by_side():
    from concurrent.futures import ThreadPoolExecutor

    pictures = [phantoms.picture(12, seed=seed) for seed in range(12)]
    files = [phantoms.file(phantoms.dataset(one, 12), phantoms.JPEGLosslessSV1) for one in pictures]
    plain = [decode(phantoms.file(phantoms.dataset(one, 12))) for one in pictures]
    with ThreadPoolExecutor(4) as pool:
        for seen, expected in zip(pool.map(decode, files), plain, strict=True):
            assert np.array_equal(seen, expected)
    assert 1 <= len(dicom_child._idle) <= 5
