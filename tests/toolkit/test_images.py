import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from noisyssl import images
from noisyssl.benchmarks import image_zoo as zoo
from noisyssl.formats import SUFFIXES
from noisyssl.images import BadImage, decode, header

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")  # pytest sets the filters of images.py aside
SIZE = 64
RGB = zoo.paint(SIZE, 1)
FILES = {kind: encode(RGB) for kind, (_, encode) in zoo.KINDS.items()}
LOOSE = {
    "JPEG": 6,
    "WebP": 6,
    "palette": 25,
    "YCbCr": 3,
    "lossless": 0,
}  # mean grey levels; the last match counts
NOT_NATIVE = {
    "JPEG CMYK", "PNG turned", "TIFF grey 16 white is zero", "TIFF grey white is zero", "TIFF PackBits",
    "TIFF JPEG", "TIFF RGBA", "TIFF grey alpha", "TIFF palette", "TIFF CMYK", "TIFF YCbCr", "TIFF 1 bit",
    "TIFF 1 bit fax", "TIFF turned", "BMP 1 bit", "WebP RGBA", "WebP turned",
}  # fmt: skip
UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def expected(kind: str) -> np.ndarray:
    grey = RGB @ [0.299, 0.587, 0.114]
    if "turned" in kind:
        return UPRIGHT[int(kind[-1]) if kind[-1].isdigit() else 6](RGB)
    if "16" in kind and "grey" in kind:  # the writers of 16 bits take one channel as it is
        grey = RGB[..., 0 if "alpha" in kind or "interlaced" in kind else 1]
    elif kind == "TIFF grey white is zero":
        grey = RGB[..., 1]
    return np.repeat(grey[..., None], 3, 2) if "grey" in kind else RGB


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def frames(kind, count):
    others = [Image.fromarray(RGB + i) for i in range(1, count)]
    return saved(Image.fromarray(RGB), kind, save_all=True, append_images=others)


@pytest.mark.parametrize("kind", [kind for kind in FILES if "1 bit" not in kind])
def test_every_kind_gives_the_painted_colours(kind):
    image = decode(FILES[kind])
    tolerance = ([value for word, value in LOOSE.items() if word in kind] or [0])[-1]
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert image.flags.c_contiguous
    assert image.shape == expected(kind).shape
    assert np.abs(image.astype(int) - expected(kind)).mean() <= tolerance + ("grey" in kind) * 0.5


@pytest.mark.parametrize("kind", ["PNG 1 bit", "TIFF 1 bit", "TIFF 1 bit fax", "BMP 1 bit"])
def test_one_bit_is_black_and_white(kind):
    image = decode(FILES[kind])
    assert set(np.unique(image)) == {0, 255}
    assert np.array_equal(
        image, np.repeat(np.asarray(Image.fromarray(RGB).convert("1"))[..., None] * 255, 3, 2)
    )


@pytest.mark.parametrize("kind", FILES)
def test_header_tells_what_decode_gives(kind, tmp_path):
    suffix = zoo.KINDS[kind][0]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(FILES[kind])
    found = header(path)
    assert found == header(str(path)) == header(FILES[kind])
    assert (found.height, found.width, 3) == decode(path).shape
    assert found.format == ("PNG" if kind == "PNG named .jpg" else kind.split()[0])
    assert path.suffix.lower() in SUFFIXES


def test_sixteen_bits_keep_their_scale_whatever_the_content():
    dark = np.array([[0, 255, 256, 511, 512, 65535]], np.uint16)
    for data in (zoo.png(dark), zoo.tiff(dark), zoo.tiff(dark, ">"), zoo.tiff(~dark, tags={262: 0})):
        assert decode(data)[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255]


def test_alpha_is_dropped_not_composited():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., :3] = (200, 100, 50)
    assert (decode(zoo.png(rgba)) == (200, 100, 50)).all()
    palette = Image.fromarray(rgba[..., :3]).convert("P")
    assert np.array_equal(
        decode(saved(palette, "PNG")), decode(saved(palette, "PNG", transparency=b"\0" * 256))
    )


@pytest.mark.parametrize("orientation", range(2, 9))
def test_sixteen_bit_grey_is_turned_too(orientation):
    deep = zoo.png(zoo._deep(RGB)[..., 1])
    exif = Image.Exif()
    exif[274] = orientation
    turned = saved(Image.open(io.BytesIO(deep)), "PNG", exif=exif.tobytes())
    assert np.array_equal(decode(turned), UPRIGHT[orientation](decode(deep)))
    assert (header(turned).height, header(turned).width) == decode(turned).shape[:2]


def test_only_exif_turns_an_image():
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    for data in (
        saved(Image.fromarray(RGB), "TIFF", tiffinfo={700: xmp}),
        saved(Image.fromarray(RGB), "WEBP", lossless=True, xmp=xmp),
    ):
        assert xmp in data
        assert np.array_equal(decode(data), RGB)


def test_unknown_orientation_turns_nothing():
    exif = Image.Exif()
    exif[274] = 9
    data = saved(Image.fromarray(RGB), "PNG", exif=exif.tobytes())
    assert np.array_equal(decode(data), RGB)
    assert header(data).width == RGB.shape[1]


def test_every_broken_kind_is_found_with_its_reason_and_no_good_one(tmp_path):
    broken = zoo.bad(tmp_path / "bad", each=6)
    assert set(broken.values()) == set(zoo.REASONS)
    for name, kind in broken.items():
        path = tmp_path / "bad" / name
        with pytest.raises(BadImage) as error:
            decode(path)
        assert zoo.REASONS[kind] in str(error.value)
        at_once = f"{path}: " + ("has " if kind == "decompression bomb" else zoo.REASONS[kind])
        assert str(error.value).startswith(at_once)
        others = [reason for other, reason in zoo.REASONS.items() if other != kind]
        assert not any(reason in str(error.value) for reason in others)
        assert "\n" not in str(error.value)
    sound = zoo.good(tmp_path / "good", count=len(zoo.KINDS), size=24)
    assert set(sound.values()) == set(zoo.KINDS)
    assert len({decode(tmp_path / "good" / name).tobytes() for name in sound}) == len(sound)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"%PDF-1.7\n\xe2\xe3", "is PDF; supported are"),
        (b"%!PS-Adobe\n\xe2", "is PostScript; supported are"),
        (b"\0" * 128 + b"DICM\2\0", "is a DICOM file without an image"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "is JPEG 2000; supported are"),
        (b"BMW is no bitmap", "is text, not an image"),
        (FILES["WebP lossy"][:-9], "is a truncated WebP"),
        (b"RIFF\x10\0\0\0WAVEfmt \0\0", "is no image of a known format"),
        (saved(Image.fromarray(RGB[..., 0].astype(np.float32)), "TIFF"), "has float pixels; 8 or 16 bits"),
        (saved(Image.fromarray(RGB[..., 0].astype(np.int32)), "TIFF"), "has signed or 32-bit pixels"),
        (zoo.tiff(RGB[..., 0].astype(np.uint16), tags={339: 2}), "has signed or 32-bit pixels"),
        (zoo.tiff(RGB, tags={262: 8}), "has colour mode LAB"),
        (zoo.tiff(zoo._deep(RGB), tags={284: 2}), "has separate uncompressed 16-bit planes"),
        (frames("TIFF", 3), "has 3 pages or frames; only single images"),
        (frames("PNG", 2), "has 2 pages or frames; only single images"),
        (frames("WEBP", 2), "has 2 pages or frames; only single images"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(data, reason):
    for task in (decode, header):
        with pytest.raises(BadImage) as error:
            task(data)
        assert str(error.value).startswith(reason)


def test_paths_that_are_no_readable_file(tmp_path, monkeypatch):
    def reason(path):
        with pytest.raises(BadImage) as error:
            decode(path)
        return str(error.value)

    good = tmp_path / "a.png"
    good.write_bytes(FILES["PNG RGB"])
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "b.png") == f"{tmp_path / 'b.png'}: does not exist"
    assert reason(tmp_path / "pipe.png").endswith("is not a regular file")
    assert reason("a\0b.png").endswith("is not a valid path")
    assert "File name too long" in reason("a" * 5000 + ".png")
    assert reason(good / "b.png").endswith("cannot be read (Not a directory)")
    (tmp_path / "link.png").symlink_to(good)
    assert np.array_equal(decode(tmp_path / "link.png"), RGB)
    with monkeypatch.context() as patch:
        patch.setattr(images, "MAX_BYTES", 100)
        assert "at most 100 are supported" in reason(good)
    with monkeypatch.context() as patch:
        patch.setattr(
            "builtins.open", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
        )
        text = reason(good)
    assert text == f"{good}: permission denied"


def test_a_bomb_is_refused_before_any_pixel_is_decoded(tmp_path, monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(BadImage, match="decoded"):
        decode(FILES["PNG RGB"])
    bombs = [zoo._broken("decompression bomb", i, np.random.default_rng(0))[1] for i in range(3)]
    canvas = b"VP8X\n\0\0\0" + b"\0\0\0\0" + (16_000).to_bytes(3, "little") * 2
    pixels = b"VP8L\n\0\0\0/" + b"\xff" * 9
    bombs.append(b"RIFF\x28\0\0\0WEBP" + canvas + pixels)
    for bomb in bombs:
        with pytest.raises(BadImage, match="at most 100,000,000"):
            decode(bomb)


def test_the_largest_allowed_image_is_allowed(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", RGB.shape[0] * RGB.shape[1])
    assert decode(FILES["PNG RGB"]).shape == RGB.shape
    monkeypatch.setattr(images, "MAX_PIXELS", RGB.shape[0] * RGB.shape[1] - 1)
    with pytest.raises(BadImage, match="has 72 x 64 pixels"):
        decode(FILES["PNG RGB"])


@pytest.mark.parametrize(
    "kind", ["JPEG 4:2:0", "JPEG progressive", "PNG RGB", "WebP lossy", "TIFF RGB", "TIFF LZW"]
)
def test_every_truncation_that_costs_a_pixel_is_found(kind):
    whole, data = decode(FILES[kind]), FILES[kind]
    for length in range(0, len(data), 1 + len(data) // 150):
        with pytest.raises(BadImage):
            decode(data[:length])
    for missing in range(1, 12):
        try:
            assert np.array_equal(decode(data[:-missing]), whole)
        except BadImage:
            pass


def test_one_wrong_byte_in_a_png_is_found():
    data = bytearray(FILES["PNG RGB"])
    for position in range(8, len(data), 1 + len(data) // 200):
        data[position] ^= 16
        with pytest.raises(BadImage):
            decode(bytes(data))
        data[position] ^= 16
    assert np.array_equal(decode(bytes(data)), RGB)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    at, kind = int(rng.integers(len(data))), rng.integers(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        changed[at] = rng.integers(256)
    elif kind == 2:
        changed[at % 200] = rng.integers(256)
    elif kind == 3:
        del changed[at : at + int(rng.integers(1, 40))]
    else:
        changed[at:at] = rng.bytes(int(rng.integers(1, 40)))
    return bytes(changed)


def test_mutated_files_raise_nothing_else():
    rng = np.random.default_rng(0)
    accepted = 0
    for data in [*FILES.values()] * 8:
        data = mutated(data, rng)
        try:
            found = header(data)
        except BadImage:
            with pytest.raises(BadImage):
                decode(data)
            continue
        try:
            image = decode(data)
        except BadImage:
            continue
        assert image.shape == (found.height, found.width, 3)
        accepted += 1
    assert 50 < accepted < 8 * len(FILES) * 0.8


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("big"), RecursionError(), KeyError(3)])
def test_any_exception_of_pillow_becomes_bad_image(error, monkeypatch):
    def load(self):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(BadImage, match=r"^(is a broken PNG \(.+\)|needs more memory than there is)$"):
        decode(FILES["PNG RGB"])


def test_threads_decode_what_one_thread_decodes():
    data = [*FILES.values()] * 3
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(pool.map(decode, data), map(decode, data), strict=True):
            assert np.array_equal(one, other)


def test_decoding_is_silent_and_needs_neither_torch_nor_dali(tmp_path):
    for name, data in {
        "palette.png": saved(Image.fromarray(RGB).convert("P"), "PNG", transparency=b"\0" * 256),
        "offset.tif": zoo.tiff(RGB, tags={278: 3, 50000: 7}),
        "large.png": zoo.png_file(9_800, 9_800, 1, 0, b""),
    }.items():
        (tmp_path / name).write_bytes(data)
    code = (
        "import sys; sys.modules['torch'] = sys.modules['nvidia.dali'] = None\n"
        "from noisyssl.images import BadImage, decode\n"
        "for name in sys.argv[1:]:\n"
        "    try: decode(name)\n"
        "    except BadImage: pass\n"
    )
    command = [sys.executable, "-W", "default", "-c", code, *sorted(map(str, tmp_path.iterdir()))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stderr == ""


@pytest.mark.parametrize("stray", [b"\1\2\3", b"\0\xe0\0\3\0"])
def test_stray_bytes_between_jpeg_segments_are_left_to_pillow(stray):
    data = FILES["JPEG 4:2:0"]
    at = data.index(b"\xff\xdb")
    strayed = data[:at] + stray + data[at:]
    assert np.array_equal(decode(strayed), decode(data))
    assert header(data).native
    assert not header(strayed).native


def test_native_kinds():
    assert {kind for kind, data in FILES.items() if not header(data).native} == NOT_NATIVE


@pytest.mark.parametrize("size", [1, 9, 63])
def test_dali_gives_the_same_pixels_for_every_native_kind(size):
    pytest.importorskip("nvidia.dali", reason="needs nvidia-dali")
    from nvidia.dali import fn, pipeline_def, types

    files = {kind: encode(zoo.paint(size, 2)) for kind, (_, encode) in zoo.KINDS.items()}
    native = {kind: data for kind, data in files.items() if header(data).native}
    assert len(native) > 40

    @pipeline_def(batch_size=len(native), num_threads=2, device_id=None, prefetch_queue_depth=1)
    def graph():
        encoded = fn.external_source(
            lambda: [np.frombuffer(data, np.uint8) for data in native.values()], batch=True
        )
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, jpeg_fancy_upsampling=True)

    pipeline = graph()
    pipeline.build()
    (decoded,) = pipeline.run()
    for i, (kind, data) in enumerate(native.items()):
        ours, theirs = decode(data), decoded.at(i)
        assert theirs.shape == ours.shape, kind
        assert np.abs(theirs.astype(int) - ours).mean() <= 1, kind
