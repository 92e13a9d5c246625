"""Which files are DICOM files, however they are named and begin."""

import io
import pathlib

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="needs noisyssl[dicom]")

from noisyssl.benchmarks import dicom_phantoms as phantoms  # noqa: E402
from noisyssl.formats import is_image_name  # noqa: E402
from noisyssl.images import BadImage, decode, header  # noqa: E402

pytestmark = pytest.mark.filterwarnings(r"ignore:::pydicom\.")


def test_files_without_a_preamble_or_meta_information():
    stored = phantoms.picture(12)
    d = phantoms.dataset(stored, 12)
    whole = phantoms.file(d, phantoms.ImplicitVRLittleEndian)
    expected = decode(whole)
    assert np.array_equal(decode(whole[132:]), expected)
    for syntax in (phantoms.ImplicitVRLittleEndian, phantoms.ExplicitVRLittleEndian):
        whole = phantoms.file(d, syntax)
        length = pydicom.dcmread(io.BytesIO(whole)).file_meta.FileMetaInformationGroupLength
        assert np.array_equal(decode(whole[132 + 12 + length :]), expected)


def test_header_says_what_decode_gives():
    found = header(phantoms.file(phantoms.dataset(phantoms.picture(12), 12)))
    assert (found.format, found.mode, found.width, found.height, found.native) == (
        "DICOM", "MONOCHROME2", 56, 48, False,
    )  # fmt: skip


def test_images_are_known_by_ending_or_by_content(tmp_path):
    data = phantoms.file(phantoms.dataset(phantoms.picture(8), 8))
    for name in ("1.2.840.10008.1", "IM_0001", "a.dcm", "b.DCM", "DICOMDIR", "c.txt"):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "notes").write_text("none")
    (tmp_path / "1.2").mkdir()
    found = {path.name for path in tmp_path.iterdir() if is_image_name(str(path))}
    assert found == {"1.2.840.10008.1", "IM_0001", "a.dcm", "b.DCM"}


def test_pydicoms_own_files_are_read_or_refused_for_what_they_are():
    """Twenty years of odd files; eight of the images begin as TIFF, as the standard allows."""
    folder = pydicom.data.get_testdata_file("CT_small.dcm").rsplit("/", 1)[0]
    refused = {}
    for path in sorted(pathlib.Path(folder).glob("*.dcm")):
        try:
            assert decode(path).dtype == np.uint8
        except BadImage as error:
            refused[path.name] = str(error).removeprefix(f"{path}: ")
    assert {"CT_small.dcm", "MR_small_RLE.dcm", "examples_rgb_color.dcm"}.isdisjoint(refused)
    kinds = (
        "without",
        "frames",
        "truncated",
        "broken",
        "bits",
        "samples",
        "no image of a known format",
        "says",
    )
    assert all(any(kind in reason for kind in kinds) for reason in refused.values()), refused
