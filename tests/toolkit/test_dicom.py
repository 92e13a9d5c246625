"""DICOM pixels: lossless syntaxes alike, twins alike, grey scales as pydicom and highdicom compute them."""

import io

import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom", reason="needs noisyssl[dicom]")
from pydicom.dataset import Dataset  # noqa: E402

from noisyssl.benchmarks import dicom_phantoms as phantoms  # noqa: E402
from noisyssl.images import decode  # noqa: E402

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


def test_signed_bytes_without_a_window_stay_in_order():
    stored = phantoms.picture(8, signed=True)
    seen = decode(phantoms.file(phantoms.dataset(stored, 8, signed=True)))[..., 0]
    assert np.array_equal(seen, stored.astype(int) + 128)


def test_twins_agree_where_a_value_lies_between_two_greys():
    stored = np.arange(512, dtype=np.uint16).reshape(16, 32)
    tags = {"VOILUTFunction": "LINEAR_EXACT", "RescaleSlope": 0.1, "RescaleIntercept": 0, "WindowWidth": 51.0}
    seen = phantoms.dataset(stored, 9, WindowCenter=25.5, **tags)
    twin = phantoms.dataset(511 - stored, 9, kind="MONOCHROME1", WindowCenter=51.1 - 25.5, **tags)
    assert np.array_equal(decode(phantoms.file(seen)), decode(phantoms.file(twin)))


@pytest.mark.parametrize("bits", [8, 12])
def test_a_scale_or_table_that_inverts_does_so_at_every_depth(bits):
    stored, top = phantoms.picture(bits), 2**bits - 1
    plain = decode(phantoms.file(phantoms.dataset(stored, bits)))
    scaled = phantoms.dataset(stored, bits, RescaleSlope=-1, RescaleIntercept=top)
    table = phantoms.table(np.arange(top + 1)[::-1], 0, bits)
    for d in (scaled, phantoms.dataset(stored, bits, ModalityLUTSequence=[table])):
        assert np.abs(decode(phantoms.file(d)).astype(int) - (255 - plain.astype(int))).max() <= 1


def test_numbers_that_lost_their_sign_are_read_with_it():
    stored = phantoms.picture(12, signed=True)
    right = phantoms.table(np.arange(4096) * 16, -2048, 16)
    expected = decode(phantoms.file(phantoms.dataset(stored, 12, signed=True, VOILUTSequence=[right])))
    wrong = phantoms.table(np.arange(4096) * 16, 65536 - 2048, 16)
    assert np.array_equal(
        decode(phantoms.file(phantoms.dataset(stored, 12, signed=True, VOILUTSequence=[wrong]))), expected
    )
    padded = stored.copy()
    padded[:4] = -2000
    d = phantoms.dataset(padded, 12, signed=True)
    d.add_new("PixelPaddingValue", "US", 65536 - 2000)
    right = phantoms.dataset(padded, 12, signed=True, PixelPaddingValue=-2000)
    assert np.array_equal(decode(phantoms.file(d)), decode(phantoms.file(right)))


def test_palettes_of_bytes_in_words():
    colours = np.random.default_rng(1).integers(0, 256, (256, 3))
    stored = phantoms.picture(8)
    d = phantoms.palette(phantoms.dataset(stored, 8, kind="PALETTE COLOR"), colours)
    for name in ("Red", "Green", "Blue"):
        d[f"{name}PaletteColorLookupTableDescriptor"].value = [256, 0, 8]
    assert np.array_equal(decode(phantoms.file(d)), colours[stored])
