"""DICOM files that are broken, hostile or not for us: refused in one line, naming no patient."""

import io
import logging
import subprocess
import sys

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="needs noisyssl[dicom]")

from noisyssl import dicom  # noqa: E402
from noisyssl.benchmarks import dicom_phantoms as phantoms  # noqa: E402
from noisyssl.errors import MachineError  # noqa: E402
from noisyssl.images import BadImage, decode, patient  # noqa: E402

pytestmark = pytest.mark.filterwarnings(r"ignore:::pydicom\.")  # pytest sets the filters of dicom.py aside
GOOD = phantoms.dataset(phantoms.picture(12), 12)


def changed(**tags):
    d = pydicom.dcmread(io.BytesIO(phantoms.file(GOOD)))
    for keyword, value in tags.items():
        if value is None:
            delattr(d, keyword)
        else:
            setattr(d, keyword, value)
    return phantoms.written(d)


BAD = {
    "without pixels": (changed(PixelData=None), "is a DICOM file without pixels"),
    "no image": (changed(Rows=None), "is a DICOM file without an image"),
    "frames": (changed(NumberOfFrames=7), "has 7 frames; only single images are supported"),
    "bomb": (changed(Rows=60000, Columns=60000), "has 60000 x 60000 pixels; at most 100,000,000"),
    "32 bits": (changed(BitsAllocated=32, BitsStored=32), "has 32 of 32 bits a pixel"),
    "1 bit": (changed(BitsAllocated=1, BitsStored=1), "has 1 of 1 bits a pixel"),
    "more stored than allocated": (changed(BitsStored=17), "has 17 of 16 bits a pixel"),
    "samples": (changed(SamplesPerPixel=4), "has 4 samples a pixel"),
    "strange colour": (
        changed(PhotometricInterpretation="HSV"), "an unknown photometric interpretation; supported are grey",
    ),
    "short": (changed(Rows=480), "is a truncated DICOM file (Explicit VR Little Endian pixels"),
    "window": (changed(WindowCenter=9, WindowWidth=0), "has a window of width 0 that cannot be applied"),
    "window function": (
        changed(WindowCenter=9, WindowWidth=9, VOILUTFunction="CUBIC"), "has a window of width 9 that cannot",
    ),
    "table": (
        changed(VOILUTSequence=[phantoms.table(np.arange(16), 0, 12, says=4096)]),
        "has a lookup table of 16 entries that says 4096 of 12 bits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(name):
    data, reason = BAD[name]
    with pytest.raises(BadImage) as error:
        decode(data)
    assert reason in str(error.value)


def test_unknown_transfer_syntax():
    d = pydicom.dcmread(io.BytesIO(phantoms.file(GOOD, phantoms.RLELossless)))
    d.file_meta.TransferSyntaxUID = pydicom.uid.UID("1.2.3.4.5")
    with pytest.raises(BadImage, match="has an unknown transfer syntax, which no decoder reads"):
        decode(phantoms.written(d, implicit_vr=False, little_endian=True))
    d.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    with pytest.raises(BadImage, match=r"MPEG2 .*, which no decoder reads"):
        decode(phantoms.written(d))


@pytest.mark.parametrize("name", phantoms.LOSSLESS)
def test_cut_files_are_refused_or_whole(name):
    data = phantoms.file(GOOD, phantoms.LOSSLESS[name])
    whole = decode(data)
    for cut in np.linspace(1, len(data) - 1, 40).astype(int):
        try:
            seen = decode(data[:cut])
        except BadImage:
            continue
        # what is missing after the last pixel hurts nothing
        assert np.array_equal(seen, whole), cut


def test_a_coded_image_of_another_size_is_refused_before_it_is_decoded():
    big = phantoms.dataset(np.zeros((3000, 3000), np.uint16), 12)
    for syntax in (phantoms.JPEG2000Lossless, phantoms.JPEGLSLossless, phantoms.JPEGLosslessSV1):
        d = pydicom.dcmread(io.BytesIO(phantoms.file(big, syntax)))
        d.Rows = d.Columns = 30
        with pytest.raises(BadImage, match="says 30 x 30 pixels, but its coded image has 3000 x 3000"):
            decode(phantoms.written(d))


def test_a_deflated_bomb_is_refused_without_unfolding_it(tmp_path):
    import tracemalloc
    import zlib

    d = phantoms.dataset(phantoms.picture(8), 8)
    small = phantoms.file(d, phantoms.DeflatedExplicitVRLittleEndian)
    start = 132 + 12 + pydicom.dcmread(io.BytesIO(small)).file_meta.FileMetaInformationGroupLength
    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join([small[:start], *(pack.compress(bytes(1 << 20)) for _ in range(300)), pack.flush()])
    assert len(bomb) < 2e6
    tracemalloc.start()
    with pytest.raises(BadImage, match="unfolds to over 268,435,456 bytes"):
        decode(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


def test_patients_are_told_apart_without_their_names():
    one, same, other, none = (
        phantoms.file(phantoms.dataset(phantoms.picture(8, seed=seed), 8, **tags))
        for seed, tags in enumerate(
            [{"PatientID": "A 1"}, {"PatientID": "A 1 "}, {"PatientID": "A 2"}, {"PatientName": "Doe^J"}]
        )
    )
    assert patient(one) == patient(same) != patient(other)
    assert len(patient(one)) == 8
    assert patient(none) == b""
    assert b"A 1" not in patient(one)
    elsewhere = phantoms.file(
        phantoms.dataset(phantoms.picture(8), 8, PatientID="A 1", IssuerOfPatientID="elsewhere")
    )
    assert patient(elsewhere) != patient(one)


def test_no_word_of_a_file_reaches_messages_or_logs(caplog, recwarn):
    caplog.set_level(logging.DEBUG)
    canary = "CANARY"
    tags = {
        "PatientName": f"{canary}^A", "PatientID": canary, "PatientBirthDate": canary, "StudyDate": canary,
        "InstitutionName": canary * 40, "StudyInstanceUID": canary, "WindowCenter": 9, "WindowWidth": 0,
    }  # fmt: skip
    with pydicom.config.disable_value_validation():
        data = phantoms.file(phantoms.dataset(phantoms.picture(12), 12, **tags))
    broken = [data, data[:-900], data.replace(b"MONOCHROME2", b"CANARYCANA "), data.replace(b"DS", b"XX")]
    rows = b"\x28\0\x10\0US"
    broken += [data[: data.index(canary.encode()) + 3], data.replace(rows + b"\2\0", rows + b"\xff\xff")]
    for one in broken:
        with pytest.raises(BadImage) as error:
            decode(one)
        assert "CANARY" not in str(error.value)
        assert error.value.__cause__ is None
        patient(one)
    assert "CANARY" not in caplog.text
    assert not [str(w.message) for w in recwarn if "CANARY" in str(w.message)]


def test_without_pydicom_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    dicom._pydicom.cache_clear()
    with pytest.raises(MachineError, match=r"DICOM files need pydicom.*pip install 'noisyssl\[dicom\]'"):
        decode(phantoms.file(GOOD))
    dicom._pydicom.cache_clear()


def test_png_needs_no_pydicom():
    code = (
        "import sys; sys.modules['pydicom'] = None; import io; import numpy as np; from PIL import Image\n"
        "from noisyssl.images import decode; out = io.BytesIO()\n"
        "Image.new('L', (4, 4)).save(out, 'PNG'); assert decode(out.getvalue()).shape == (4, 4, 3)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


FUZZ = """
import random, sys, time
from noisyssl.images import BadImage, decode, patient

rng, count, folder = random.Random(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3]
import pathlib
files = [path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())]
good = bad = 0
for _ in range(count):
    data = bytearray(rng.choice(files))
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, kind = rng.randrange(128, min(len(data), rng.choice((600, 1200, 1 << 20)))), rng.random()
        if kind < 0.6:
            data[at] = rng.randrange(256)
        elif kind < 0.8:
            del data[at : at + rng.randrange(1, 60)]
        elif kind < 0.9:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        else:
            data = data[: max(at, 140)]
        if len(data) < 140:
            break
    start = time.monotonic()
    try:
        decode(bytes(data))
        good += 1
    except BadImage as error:
        bad += 1
        assert "CANARY" not in str(error), error
    patient(bytes(data))
    assert time.monotonic() - start < 5
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
assert int(peak) < 1 << 20  # kB, of this process alone: getrusage counts the parent that forked it
print(good, bad)
"""


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_or_shown_and_bring_nothing_down(tmp_path, count):
    colours = np.stack([phantoms.picture(8, seed=seed) for seed in range(3)], axis=2)
    kinds = phantoms.LOSSLESS | {"JPEG": phantoms.JPEGBaseline8Bit}
    for number, (name, syntax) in enumerate(kinds.items()):
        if name != "JPEG":
            window = {"WindowCenter": 1000, "WindowWidth": 900, "PatientID": "CANARY"}
            grey = phantoms.dataset(phantoms.picture(12, seed=number), 12, **window)
            (tmp_path / f"{name} grey").write_bytes(phantoms.file(grey, syntax))
        colour = phantoms.dataset(colours, 8, kind="RGB", PatientName="CANARY")
        (tmp_path / f"{name} colour").write_bytes(phantoms.file(colour, syntax))
    table = phantoms.dataset(
        phantoms.picture(12), 12, VOILUTSequence=[phantoms.table(np.arange(4096), 0, 16)]
    )
    (tmp_path / "table").write_bytes(phantoms.file(table))
    seed = str(count)
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, seed, str(count), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    good, bad = map(int, done.stdout.split())
    assert good > count / 10
    assert bad > count / 10


def jpeg_2000(**changes):
    d = pydicom.dcmread(io.BytesIO(phantoms.file(GOOD, phantoms.JPEG2000Lossless)))
    frame = pydicom.encaps.get_frame(d.PixelData, 0, number_of_frames=1)
    return d, frame


def boxed(kind, content):
    return (8 + len(content)).to_bytes(4, "big") + kind + content


def test_sizes_cannot_hide_behind_boxes_fills_or_fragments():
    d, frame = jpeg_2000()
    expected = decode(phantoms.wrapped(d, frame, phantoms.JPEG2000Lossless))
    far = boxed(b"free", bytes(2000)) + boxed(b"jp2c", frame)
    from noisyssl.codestream import of_jpeg, of_jpeg_2000

    assert of_jpeg_2000(frame) == of_jpeg_2000(far) == (56, 48)
    decoy = boxed(b"free", frame[:4] + bytes(60)) + boxed(b"jp2c", frame)
    assert of_jpeg_2000(decoy) == (56, 48)
    assert of_jpeg_2000(bytes(100)) is None
    header = b"\xff\xc3\0\x0b\x0c\0\x30\0\x38\1\1\x11\0"
    assert of_jpeg(b"\xff\xd8" + b"\xff" * 9 + header) == (56, 48)
    assert of_jpeg(b"\xff\xd8\xff\0" + header) is None
    assert of_jpeg(b"\xff\xd8" + bytes(1 << 22)) is None
    assert np.array_equal(decode(phantoms.wrapped(d, frame, phantoms.JPEG2000Lossless)), expected)
    with pytest.raises(BadImage, match="its coded image states no size"):
        decode(phantoms.wrapped(d, bytes(5000), phantoms.JPEG2000Lossless))


def test_runs_that_unfold_to_more_than_the_image_are_refused():
    whole = phantoms.file(phantoms.dataset(phantoms.picture(8), 8), phantoms.RLELossless)
    d = pydicom.dcmread(io.BytesIO(whole))
    head = b"".join(number.to_bytes(4, "little") for number in (1, 64, *[0] * 14))
    bomb = phantoms.wrapped(d, head + b"\x81\0" * 100_000, phantoms.RLELossless)
    with pytest.raises(BadImage, match="its runs unfold to more pixels than it has"):
        decode(bomb)


def test_a_deflated_bomb_cannot_hide_behind_a_long_element(monkeypatch):
    monkeypatch.setattr(dicom, "MAX_INFLATED", 1000)
    d = phantoms.dataset(phantoms.picture(8), 8)
    data = phantoms.file(d, phantoms.DeflatedExplicitVRLittleEndian)
    hidden = data[:144] + b"\2\0\2\1UC\0\0\x04\0\0\0abcd" + data[144:]
    with pytest.raises(BadImage, match="unfolds to over 1,000 bytes"):
        decode(hidden)


BAD_GREYS = {
    "left-aligned": ({"HighBit": 15}, "has 12 bits a pixel that end at bit 15"),
    "no slope": ({"RescaleSlope": 0, "RescaleIntercept": 0}, "has a rescale slope of 0"),
    "endless window": ({"WindowCenter": "inf", "WindowWidth": 9}, "has a window of width 9 that cannot"),
    "segmented palette": ({"SegmentedRedPaletteColorLookupTableData": b"\0\0"}, "has a segmented palette"),
}


@pytest.mark.parametrize("name", BAD_GREYS)
def test_greys_that_would_be_wrong_are_refused(name):
    tags, reason = BAD_GREYS[name]
    with pydicom.config.disable_value_validation(), pytest.raises(BadImage) as error:
        decode(changed(**tags))
    assert reason in str(error.value)


def test_jpeg_of_12_bits_is_named():
    d = pydicom.dcmread(io.BytesIO(phantoms.file(GOOD, phantoms.JPEGLosslessSV1)))
    d.file_meta.TransferSyntaxUID = pydicom.uid.JPEGExtended12Bit
    with pytest.raises(BadImage, match="is a JPEG of 12 bits, which no free decoder reads"):
        decode(phantoms.written(d))
