"""Whether an ONNX file is all there is to read: looked at before any library deserialises it.

A reader of ONNX follows `external_data` to wherever it points, and a node of a foreign domain may name files
of its own. This walks the protobuf wire format (https://protobuf.dev/programming-guides/encoding) without
the package `onnx`, which servers do not need.
"""

from collections.abc import Iterator
from pathlib import Path

from noisyssl.errors import BundleError

INNER = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
"""Fields of onnx.proto through which a tensor or a node can be reached, by message, number and kind."""
EXTERNAL_DATA, DATA_LOCATION = 13, 14
"""Of TensorProto."""
DOMAIN = 7
"""Of NodeProto."""
DOMAINS = (b"", b"ai.onnx")
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def self_contained(data: bytes, path: Path) -> None:
    """Returns when `data`, the content of `path`, is an ONNX model that needs no other file.

    Raises:
        BundleError: it is no ONNX or was cut off, keeps data in other files, or has operators that are not
            ONNX's own.
    """
    remedy = "Do not serve it; export the bundle again."
    nodes = 0
    waiting = [("Model", memoryview(data))]
    try:
        while waiting:
            kind, message = waiting.pop()
            nodes += kind == "Node"
            for number, value in _fields(message):
                if kind == "Tensor" and (number == EXTERNAL_DATA or (number == DATA_LOCATION and value)):
                    raise BundleError(f"{path} keeps a tensor in another file; it must be whole. {remedy}")
                if kind == "Node" and number == DOMAIN and bytes(_message(value)) not in DOMAINS:
                    domain = bytes(_message(value)[:60])
                    raise BundleError(f"{path} has operators of {domain!r}, not of ONNX itself. {remedy}")
                if inner := INNER[kind].get(number):
                    waiting.append((inner, _message(value)))
    except (IndexError, ValueError):
        nodes = 0
    if not nodes:
        raise BundleError(f"{path} is no ONNX model, or was cut off. {remedy}")


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of every field; fixed-width values as 0, which nothing here asks for.

    Raises:
        IndexError, ValueError: the bytes end too early, or are no protobuf.
    """
    place, end = 0, len(message)
    while place < end:
        key, place = _varint(message, place)
        wire = key & 7
        value: int | memoryview = 0
        if wire == VARINT:
            value, place = _varint(message, place)
        elif wire == BYTES:
            length, place = _varint(message, place)
            value = message[place : place + length]
            place += length
        elif wire in (FIXED64, FIXED32):
            place += 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if place > end:
            raise ValueError("cut off")
        yield key >> 3, value


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """(value, place behind it)."""
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("varint of more than 10 bytes")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message is due")
    return value
