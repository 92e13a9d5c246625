"""What a coded image says of its size: decoders trust that, and reserve memory, whatever a header says."""

from itertools import pairwise

MARKERS = 1 << 20
"""Bytes of a JPEG in which its size must be found."""
PAD = 128
"""Bytes that an RLE segment may hold beyond its pixels: a pad, and the end of its last run."""


def _number(frame: bytes, at: int, length: int) -> int:
    return int.from_bytes(frame[at : at + length], "big")


def of_jpeg_2000(frame: bytes) -> tuple[int, int] | None:
    """(width, height) that a codestream states; some writers wrap it into the boxes of a JP2 file."""
    start, at = b"\xff\x4f\xff\x51", 0
    while frame[at + 4 : at + 8] != b"jp2c" and not frame.startswith(start, at):
        length = _number(frame, at, 4)
        if length < 8 or at + length > len(frame):
            return None
        at += length
    if not frame.startswith(start, at):
        at += 8
    if not frame.startswith(start, at):
        return None
    x1, y1, x0, y0 = (_number(frame, at + 8 + 4 * i, 4) for i in range(4))
    return x1 - x0, y1 - y0


def of_jpeg(frame: bytes) -> tuple[int, int] | None:
    """(width, height) that the frame header of a JPEG or JPEG-LS states."""
    frame = frame[:MARKERS]
    at = 2 if frame.startswith(b"\xff\xd8") else len(frame)
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], _number(frame, at + 2, 2)
        if marker == 0xFF:  # fill
            at += 1
        elif (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return _number(frame, at + 7, 2), _number(frame, at + 5, 2)
        elif length < 2:
            return None
        else:
            at += 2 + length
    return None


def unfolds_beyond(frame: bytes, pixels: int) -> bool:
    """Whether a segment of an RLE frame unfolds to more than one byte a pixel and some padding."""
    starts = [int.from_bytes(frame[4 * i : 4 * i + 4], "little") for i in range(1, 16)]
    starts = [*starts[: frame[0] if frame else 0], len(frame)]
    for at, end in pairwise(starts):
        unfolded = 0
        while at < min(end, len(frame)) and unfolded <= pixels + PAD:
            run = frame[at]
            at += 2 if run > 128 else 1 if run == 128 else run + 2
            unfolded += 257 - run if run > 128 else 0 if run == 128 else run + 1
        if unfolded > pixels + PAD:
            return True
    return False
