"""A folder of DICOM files as archives write it: named by UIDs, patients known from the files alone."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom", reason="needs noisyssl[dicom]")

from noisyssl.benchmarks import dicom_phantoms as phantoms
from noisyssl.pipelines.scan import check, open_samples

pytestmark = pytest.mark.filterwarnings(r"ignore:::pydicom\.")
PATIENTS = 12


@pytest.fixture
def folder(tmp_path):
    """Two classes; patient n has two films in the first and, if n is even, one in the second."""
    data = tmp_path / "films"
    for number in range(PATIENTS):
        for film, name in enumerate(["healthy", "healthy", "ill"][: 3 - number % 2]):
            stored = phantoms.picture(12, seed=10 * number + film)
            syntax = list(phantoms.LOSSLESS.values())[(number + film) % len(phantoms.LOSSLESS)]
            d = phantoms.dataset(stored, 12, PatientID=f"CANARY{number}", PatientName=f"CANARY^{number}")
            (data / name).mkdir(parents=True, exist_ok=True)
            (data / name / f"1.2.{number}.{film}").write_bytes(phantoms.file(d, syntax))
    (data / "DICOMDIR").write_bytes(phantoms.file(d))
    return data


def test_patients_are_groups_that_never_cross_splits(folder):
    samples = open_samples(folder)
    assert samples.classes == ("healthy", "ill")
    assert len(samples) == 30
    assert len(set(samples.groups)) == PATIENTS
    assert all(group.startswith("patient-") for group in samples.groups)
    of = {}
    for path, group in zip(samples.paths, samples.groups, strict=True):
        of.setdefault(path.split("/")[1].split(".")[2], set()).add(group)
    assert all(len(groups) == 1 for groups in of.values())
    splits = {}
    for group, split in zip(samples.groups, samples.splits, strict=True):
        splits.setdefault(group, set()).add(split)
    assert all(len(names) == 1 for names in splits.values())
    assert "Images of one patient form a group: 12 patients, by PatientID." in samples.notes
    assert not samples.native.any()
    again = open_samples(folder)
    assert (again.groups, again.splits.tolist()) == (samples.groups, samples.splits.tolist())


def test_groups_of_a_table_win_and_other_files_stay_alone(folder):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "plain.png")
    table = folder / "films.csv"
    table.write_text(
        "path,label,group\nhealthy/1.2.0.0,a,G\nhealthy/1.2.0.1,a,\nill/1.2.0.2,b,\nplain.png,b,\n"
    )
    first, second, third, fourth = open_samples(table, evaluation=True).groups
    assert (first, fourth) == ("G", "plain.png")
    assert second == third
    assert second.startswith("patient-")


def test_no_identifier_is_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NOISYSSL_CACHE", str(tmp_path / "cache"))
    (folder / "ill" / "1.2.99").write_bytes(next((folder / "ill").iterdir()).read_bytes()[:-700])
    report = check(folder, out=tmp_path / "out")
    assert [path for path, _ in report.bad] == ["ill/1.2.99"]
    kept = [path for base in ("cache", "out") for path in (tmp_path / base).rglob("*") if path.is_file()]
    assert len(kept) >= 4
    for path in kept:
        assert b"CANARY" not in path.read_bytes(), path
    assert "CANARY" not in repr(report)


def test_names_of_patients_depend_on_their_files_alone(folder):
    before = open_samples(folder)
    groups = dict(zip(before.paths, before.groups, strict=True))
    more = phantoms.dataset(phantoms.picture(12, seed=999), 12, PatientID="CANARY-new")
    (folder / "healthy" / "1.1").write_bytes(phantoms.file(more))  # the first of all paths
    after = open_samples(folder)
    assert all(
        groups.get(path, group) == group for path, group in zip(after.paths, after.groups, strict=True)
    )
    assert len(set(after.groups)) == PATIENTS + 1


def test_a_patient_counts_more_than_a_folder(folder):
    for name in ("healthy", "ill"):
        for path in sorted((folder / name).iterdir()):
            study = path.parent / f"study{path.name[-1]}"
            study.mkdir(exist_ok=True)
            path.rename(study / path.name)
    assert len(set(open_samples(folder).groups)) == PATIENTS


def test_one_identifier_in_all_files_is_a_dummy(tmp_path):
    for number in range(20):
        place = tmp_path / "films" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        d = phantoms.dataset(phantoms.picture(12, seed=number), 12, PatientID="ANONYMOUS")
        (place / f"{number}.dcm").write_bytes(phantoms.file(d))
    samples = open_samples(tmp_path / "films")
    assert samples.groups == samples.paths
    assert any("taken for a dummy" in note for note in samples.notes)
    assert len(set(open_samples(tmp_path / "films", evaluation=True).groups)) == 1


def test_a_run_on_dicom_files_goes_on_and_is_exported(folder, tmp_path):
    from noisyssl.cli import main

    run, bundle = str(tmp_path / "run"), str(tmp_path / "bundle")
    small = ["--size", "32", "--batch", "8", "--epochs", "2", "--set", "backbone=resnet18-w16"]

    def ok(*arguments):
        with pytest.raises(SystemExit) as end:
            main([*arguments])
        assert not end.value.code

    ok("train", str(folder), "--out", run, *small)
    (tmp_path / "run" / "metrics.json").unlink()  # as if it had been killed at the end
    ok("train", str(folder), "--out", run, "--resume")
    ok("export", run, bundle, "--tensorrt", "none")
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"CANARY" not in path.read_bytes(), path
