"""DICOM pixels: lossless syntaxes alike, twins alike, grey scales as pydicom and highdicom compute them."""

import io
import logging
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom", reason="needs noisyssl[dicom]")
from pydicom.dataset import Dataset  # noqa: E402

from noisyssl import dicom  # noqa: E402
from noisyssl.benchmarks import dicom_phantoms as phantoms  # noqa: E402
from noisyssl.errors import MachineError  # noqa: E402
from noisyssl.formats import is_image_name  # noqa: E402
from noisyssl.images import BadImage, decode, header, patient  # noqa: E402

pytestmark = pytest.mark.filterwarnings(r"ignore:::pydicom\.")  # pytest sets the filters of dicom.py aside
COLOUR = np.stack([phantoms.picture(8, seed=seed) for seed in range(3)], axis=2)


def by_pydicom(data: bytes) -> np.ndarray:
    """The grey image of pydicom's own pipeline: its VOI output over the range that it documents."""
    d = pydicom.dcmread(io.BytesIO(data))
    hu = pydicom.pixels.apply_modality_lut(d.pixel_array, d)
    seen = pydicom.pixels.apply_voi_lut(hu, d).astype(np.float64)
    if "VOILUTSequence" in d:
        low, high = 0, 2 ** d.VOILUTSequence[0].LUTDescriptor[2] - 1
    else:
        half = 2 ** (d.BitsStored - 1)
        low, high = (-half, half - 1) if d.PixelRepresentation else (0, 2 * half - 1)
        slope, shift = float(d.get("RescaleSlope", 1)), float(d.get("RescaleIntercept", 0))
        low, high = low * slope + shift, high * slope + shift
    seen = (seen - low) / (high - low)
    return 255 * (1 - seen if d.PhotometricInterpretation == "MONOCHROME1" else seen)


def by_highdicom(data: bytes) -> np.ndarray:
    highdicom = pytest.importorskip("highdicom", reason="needs highdicom")
    image = highdicom.imread(io.BytesIO(data))
    return image.get_frame(
        1, apply_voi_transform=True, voi_output_range=(0, 255), apply_presentation_lut=True, dtype=np.float64
    )


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("windowed", [False, True])
def test_every_lossless_syntax_gives_the_same_pixels(bits, signed, windowed):
    stored = phantoms.picture(bits, signed=signed)
    window = {"WindowCenter": float(stored.mean()), "WindowWidth": float(2 * stored.std())}
    d = phantoms.dataset(stored, bits, signed=signed, **(window if windowed else {}))
    seen = {name: decode(phantoms.file(d, syntax)) for name, syntax in phantoms.LOSSLESS.items()}
    assert seen["explicit"].std() > 20
    for name, image in seen.items():
        assert np.array_equal(image, seen["explicit"]), name


@pytest.mark.parametrize("name", phantoms.LOSSLESS)
def test_colour_in_every_lossless_syntax_is_the_colour_that_was_stored(name):
    d = phantoms.dataset(COLOUR, 8, kind="RGB")
    assert np.array_equal(decode(phantoms.file(d, phantoms.LOSSLESS[name])), COLOUR)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("function", ["none", "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("slope", "shift"), [(1, 0), (2.5, -100)])
def test_inverted_twins_give_the_same_pixels(bits, function, slope, shift):
    stored, top = phantoms.picture(bits), 2**bits - 1
    tags = {"RescaleSlope": slope, "RescaleIntercept": shift}
    upright, inverse = dict(tags), dict(tags)
    if function != "none":
        tags |= {"VOILUTFunction": function, "WindowWidth": round(0.45 * slope * top)}
        centre = round(0.4 * slope * top) + shift
        mirrored = slope * top + 2 * shift - centre + (function == "LINEAR")
        upright, inverse = tags | {"WindowCenter": centre}, tags | {"WindowCenter": mirrored}
    seen = decode(phantoms.file(phantoms.dataset(stored, bits, **upright)))
    twin = decode(phantoms.file(phantoms.dataset(top - stored, bits, kind="MONOCHROME1", **inverse)))
    assert seen.std() > 20
    assert np.array_equal(seen, twin)


SQUARES = (
    np.linspace(256, 0, 4096) ** 2 * 65535 // 65536
)  # from 65535 to 0: highdicom takes the ends for the range
GREYS = {
    "window": {"WindowCenter": 900, "WindowWidth": 1500},
    "window of one": {"WindowCenter": 900, "WindowWidth": 1},
    "exact": {"WindowCenter": 900, "WindowWidth": 1500, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 900, "WindowWidth": 1500, "VOILUTFunction": "SIGMOID"},
    "two windows": {"WindowCenter": [900, 3000], "WindowWidth": [1500, 100]},
    "rescaled, exact": {
        "WindowCenter": 40, "WindowWidth": 4000, "VOILUTFunction": "LINEAR_EXACT", "RescaleSlope": 2,
        "RescaleIntercept": -1024,
    },
    "rescaled": {"WindowCenter": 40, "WindowWidth": 400, "RescaleSlope": 2, "RescaleIntercept": -1024},
    "table": {"VOILUTSequence": [phantoms.table(SQUARES, 300, 16)]},
    "table of 12 bits": {"VOILUTSequence": [phantoms.table(np.arange(4096)[::-1] ** 2 // 4096, 300, 12)]},
    "table and window": {
        "VOILUTSequence": [phantoms.table(np.linspace(0, 65535, 2048), 300, 16)],
        "WindowCenter": 9, "WindowWidth": 9,
    },
}  # fmt: skip


NOT_HIGHDICOM = {
    "window of one": "divides by zero",
    "table of 12 bits": "takes 8 and 16",
    "rescaled": "divides centre and width by the slope, with the half and the one that LINEAR takes off them",
}


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", GREYS)
def test_grey_scales_are_those_of_pydicom_and_highdicom(name, signed, kind):
    stored = phantoms.picture(12, signed=signed)
    data = phantoms.file(phantoms.dataset(stored, 12, kind=kind, signed=signed, **GREYS[name]))
    ours = decode(data)[..., 0].astype(float)
    assert ours.std() > 5
    assert np.abs(ours - by_pydicom(data)).max() <= 0.5001
    if name not in NOT_HIGHDICOM:
        assert np.abs(ours - by_highdicom(data)).max() <= 0.5001


def test_a_modality_table_comes_before_the_window():
    stored = phantoms.picture(10)
    curve = (np.arange(1024) ** 1.5).astype(np.int64)
    d = phantoms.dataset(
        stored, 10, ModalityLUTSequence=[phantoms.table(curve, 0, 16)], WindowCenter=9000, WindowWidth=12000
    )
    ours = decode(phantoms.file(d))[..., 0]
    expected = np.clip((curve[stored] - 8999.5) / 11999 + 0.5, 0, 1) * 255
    assert np.abs(ours - expected).max() <= 0.5001


def test_tables_whose_entries_are_bytes():
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [256, 0, 8])
    item.add_new("LUTData", "OW", bytes(range(255, -1, -1)))
    stored = phantoms.picture(8)
    assert np.array_equal(
        decode(phantoms.file(phantoms.dataset(stored, 8, VOILUTSequence=[item])))[..., 0], 255 - stored
    )


def test_without_a_window_bytes_stay_and_deeper_pixels_use_the_whole_range():
    shallow = phantoms.picture(8) // 2
    assert np.array_equal(decode(phantoms.file(phantoms.dataset(shallow, 8)))[..., 0], shallow)
    deep = phantoms.picture(12) // 4 + 500
    seen = decode(phantoms.file(phantoms.dataset(deep, 12)))[..., 0]
    low, high = int(deep.min()), int(deep.max())
    assert np.abs(seen - (deep - low) / (high - low) * 255).max() <= 0.5001


@pytest.mark.parametrize("limit", [None, 4095])
def test_padding_does_not_count_for_the_range(limit):
    tags = {"PixelPaddingValue": 4000 if limit is None else 3900}
    tags |= {} if limit is None else {"PixelPaddingRangeLimit": limit}
    deep = np.minimum(phantoms.picture(12) // 4, 900)
    padded = deep.copy()
    padded[:5] = 4000
    plain = decode(phantoms.file(phantoms.dataset(deep[5:], 12)))
    assert np.array_equal(decode(phantoms.file(phantoms.dataset(padded, 12, **tags)))[5:], plain)


def test_a_flat_image_is_black():
    assert not decode(phantoms.file(phantoms.dataset(np.full((9, 9), 700, np.uint16), 12))).any()


def test_inverse_presentation_and_enhanced_objects():
    stored = phantoms.picture(12)
    tags = {"WindowCenter": 900, "WindowWidth": 1500, "RescaleSlope": 2, "RescaleIntercept": -500}
    plain = decode(phantoms.file(phantoms.dataset(stored, 12, **tags)))
    shaped = phantoms.dataset(stored, 12, PresentationLUTShape="INVERSE", **tags)
    assert np.abs(decode(phantoms.file(shaped)).astype(int) - (255 - plain.astype(int))).max() <= 1
    voi, rescale, shared, frame = Dataset(), Dataset(), Dataset(), Dataset()
    voi.WindowCenter, voi.WindowWidth = 900, 1500
    rescale.RescaleSlope, rescale.RescaleIntercept = 2, -500
    shared.PixelValueTransformationSequence, frame.FrameVOILUTSequence = [rescale], [voi]
    enhanced = phantoms.dataset(
        stored, 12, NumberOfFrames=1,
        SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=[frame],
    )  # fmt: skip
    assert np.array_equal(decode(phantoms.file(enhanced)), plain)


def test_palettes_deep_colour_planes_and_ybr():
    colours = np.random.default_rng(0).integers(0, 65536, (256, 3))
    stored = phantoms.picture(8)
    d = phantoms.palette(phantoms.dataset(stored, 8, kind="PALETTE COLOR"), colours)
    assert np.array_equal(decode(phantoms.file(d)), colours[stored] >> 8)
    deep = np.stack([phantoms.picture(12, seed=seed) for seed in range(3)], axis=2)
    assert np.array_equal(decode(phantoms.file(phantoms.dataset(deep, 12, kind="RGB"))), deep >> 4)
    planes = phantoms.dataset(COLOUR, 8, kind="RGB", PlanarConfiguration=1)
    planes.PixelData = np.ascontiguousarray(COLOUR.transpose(2, 0, 1).astype(np.uint8)).tobytes()
    assert np.array_equal(decode(phantoms.file(planes)), COLOUR)
    ybr = np.asarray(Image.fromarray(COLOUR.astype(np.uint8)).convert("YCbCr"))
    seen = decode(phantoms.file(phantoms.dataset(ybr, 8, kind="YBR_FULL")))
    assert np.abs(seen.astype(int) - COLOUR).max() <= 3


@pytest.mark.parametrize("grey", [True, False])
def test_baseline_jpeg_is_what_pillow_decodes(grey):
    d = phantoms.dataset(COLOUR[..., 0] if grey else COLOUR, 8, kind="MONOCHROME2" if grey else "RGB")
    data = phantoms.file(d, phantoms.JPEGBaseline8Bit)
    frame = pydicom.encaps.get_frame(pydicom.dcmread(io.BytesIO(data)).PixelData, 0, number_of_frames=1)
    expected = np.asarray(Image.open(io.BytesIO(frame)).convert("RGB"))
    assert np.abs(decode(data).astype(int) - expected).max() <= 2


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
    "strange colour": (changed(PhotometricInterpretation="HSV"), "and an unknown one; supported are grey"),
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
    import resource
    import zlib

    d = phantoms.dataset(phantoms.picture(8), 8)
    small = phantoms.file(d, phantoms.DeflatedExplicitVRLittleEndian)
    start = 132 + 12 + pydicom.dcmread(io.BytesIO(small)).file_meta.FileMetaInformationGroupLength
    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join([small[:start], *(pack.compress(bytes(1 << 20)) for _ in range(300)), pack.flush()])
    assert len(bomb) < 2e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage, match="unfolds to over 268,435,456 bytes"):
        decode(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


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
