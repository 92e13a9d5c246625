"""An exported classifier on disk: one folder, one `manifest.json`, every file listed with its SHA-256.

A bundle is written once and never edited. Files that the manifest does not list are ignored: nothing here
opens them. Names are `NAME` or `engines/NAME`; links of either kind are refused. A reader hashes the very
bytes it then deserialises (`content`), so nothing can change in between.

Schema policy: a new optional field leaves `SCHEMA` alone, and readers ignore fields they do not know. A
changed or removed field raises it. A reader takes every schema up to its own and refuses newer ones.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from noisyssl.deploy.typed_json import built, short
from noisyssl.errors import BundleError, ConfigError
from noisyssl.geometry import FITS

SCHEMA = 1
MANIFEST = "manifest.json"
ONNX = "model.onnx"
FORMS = {
    "fp32": ONNX,
    "fp16": "model.fp16.onnx",
    "int8-cpu": "model.int8-cpu.onnx",
    "int8-trt": "model.int8-trt.onnx",
}
"""ONNX file of each form of the classifier. INT8 has two: each is slow or refused where the other belongs."""
PRECISIONS = ("fp32", "fp16", "int8")
WEIGHTS = "model.safetensors"
NAME = re.compile(r"(engines/)?[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
DIGEST = re.compile(r"[0-9a-f]{64}")
MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """What the graph takes: (B, size, size, 3) RGB bytes."""

    size: int
    """Height and width in pixels."""
    layout: str = "NHWC"
    dtype: str = "uint8"


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How an image of any shape becomes the input: `geometry.evaluation_view(image, size, fit)`."""

    size: int
    fit: str
    """crop, squash or pad."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What `classifier.build_classifier` needs to load `model.safetensors`."""

    backbone: str
    stem: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """All that a server needs to feed the model correctly and to refuse the wrong one."""

    schema: int = SCHEMA
    classes: tuple[str, ...]
    """Class name of each logit, in order."""
    input: Input
    geometry: Geometry
    architecture: Architecture
    checkpoint: dict[str, Any]
    """Which weights of the run these are: `which` (best or last), `epoch`, digest of the stage."""
    training: dict[str, Any]
    """Method, objective, noise asked and realised, digest of the data."""
    figures: dict[str, Any]
    """Test figures with intervals of exactly these weights, their probabilities at `temperature`, which is
    that of `answers`; without one, softmax alone."""
    parity: dict[str, Any]
    """What `parity.check` measured."""
    tools: dict[str, str]
    """Version of each package that took part."""
    files: dict[str, str]
    """SHA-256 of every other file, by name."""
    created: str
    """UTC, ISO 8601."""
    precisions: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By form (a key of FORMS) its figures on the test set, whether it passed its gate, or why it was left
    out: see `forms.write`. Empty in bundles of noisyssl 0.1."""
    answers: dict[str, Any] = field(default_factory=dict)
    """What makes probabilities of logits, and which are sure enough: `temperature`, the number that divides
    all logits before softmax, here and in the ONNX files; `fitted_on`, `warning`; `threshold`, from which
    probability on an answer is right as often as `wanted_accuracy`, with its coverage and accuracy on
    validation and test. Empty: softmax alone."""

    def temperature(self) -> float:
        """The number that divides all logits before softmax."""
        return float(self.answers.get("temperature", 1.0))

    def threshold(self) -> float | None:
        """The probability from which on an answer is sure; None where the bundle names none."""
        return self.answers.get("threshold")


def write(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, last of all files, and wait until it is on the disk."""
    fields = finite(asdict(manifest))
    fields["sha256"] = own_digest(fields)
    save(folder / MANIFEST, (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode())


def own_digest(fields: Mapping[str, Any]) -> str:
    """SHA-256 over everything else in a manifest: two class names that changed places are found."""
    text = json.dumps({name: fields[name] for name in fields if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read(folder: Path) -> Manifest:
    """The manifest of `folder`, after every listed file has been hashed; nothing is deserialised before.

    Raises:
        ConfigError: there is no such folder.
        BundleError: no manifest or one that is not understood, or a file is missing, a link or altered.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; pass a bundle written by `noisyssl export`.")
    manifest = parse(folder)
    for name, expected in manifest.files.items():
        with _opened(folder, name) as file:
            _same(folder / name, hashlib.file_digest(file, "sha256").hexdigest(), expected)
    return manifest


def content(folder: Path, manifest: Manifest, name: str) -> bytes:
    """The bytes of one file of the bundle, verified: deserialise these, not the path.

    Raises:
        BundleError: the manifest does not list `name`, or the file differs from it.
    """
    if name not in manifest.files:
        listed = ", ".join(sorted(manifest.files))
        raise BundleError(f"{folder} lists no {name}; it lists {listed}. Export it again.")
    with _opened(folder, name) as file:
        data = file.read()
    _same(folder / name, hashlib.sha256(data).hexdigest(), manifest.files[name])
    return data


def model_file(folder: Path, manifest: Manifest, form: str) -> str:
    """The name of the ONNX file of one of FORMS.

    Raises:
        BundleError: this bundle was exported without it; the message says why.
    """
    name = FORMS[form]
    if name in manifest.files:
        return name
    precision = form.partition("-")[0]
    why = manifest.precisions.get(form, {}).get("why") or "it was not asked for"
    raise BundleError(
        f"{folder} has no {name} ({why}). Use --precision fp32, or `noisyssl export RUN NEW_BUNDLE "
        f"--precision {precision}`."
    )


def parse(folder: Path) -> Manifest:
    """The manifest of `folder` itself, types and names checked, files not.

    Raises:
        BundleError: it is missing, no JSON, of a newer schema, or a field is missing or wrong.
    """
    path = folder / MANIFEST
    try:
        with _opened(folder, MANIFEST) as file:
            data = file.read(MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise BundleError(
            f"{folder} has no {MANIFEST}; pass a folder written by `noisyssl export`."
        ) from None
    if len(data) > MANIFEST_BYTES:
        raise BundleError(f"{path} is over {MANIFEST_BYTES >> 20} MiB; copy the bundle again.")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is no JSON ({error}); copy the bundle again.") from None
    schema = values.get("schema") if isinstance(values, dict) else None
    if type(schema) is int and schema > SCHEMA:
        raise BundleError(
            f"{path} has schema {schema}; this noisyssl reads 1-{SCHEMA}. Run `pip install -U noisyssl`."
        )
    own = values.pop("sha256", None) if isinstance(values, dict) else None
    manifest = built(Manifest, values, str(path))
    size, kind = manifest.input.size, (manifest.input.layout, manifest.input.dtype)
    faults = {
        f"schema is {manifest.schema}; it must be 1-{SCHEMA}": not 1 <= manifest.schema <= SCHEMA,
        f"classes is {short(manifest.classes)}; it must be 2 or more different names": (
            len(manifest.classes) < 2 or len(set(manifest.classes)) < len(manifest.classes)
        ),
        f"input is {size} {kind}; it must be 8-4096 pixels, NHWC uint8": (
            not 8 <= size <= 4096 or kind != ("NHWC", "uint8")
        ),
        f"geometry is {manifest.geometry}; it must have the input's size and fit {', '.join(FITS)}": (
            manifest.geometry.size != size or manifest.geometry.fit not in FITS
        ),
        f"files lacks {ONNX}; every bundle has it": ONNX not in manifest.files,
        f"answers has temperature {short(manifest.answers.get('temperature'))}; it must be above 0": (
            not _lies_in(manifest.answers.get("temperature", 1.0), 1e-6, 1e6)
        ),
        f"answers has threshold {short(manifest.answers.get('threshold'))}; it must lie in 0-1": (
            not _lies_in(manifest.answers.get("threshold", 0.0), 0.0, 1.0)
        ),
    }
    for name, digest in manifest.files.items():
        faults[f"files lists {short(name)}; only NAME and engines/NAME are allowed"] = not NAME.fullmatch(
            name
        )
        faults[f"files has {short(digest)} for {name}; it must be a SHA-256"] = not DIGEST.fullmatch(digest)
    for fault, found in faults.items():
        if found:
            raise BundleError(f"{path}: {fault}. Do not serve it; export it again.")
    if own != own_digest(values):
        raise BundleError(
            f"{path} was altered: its own SHA-256 differs. Do not serve it; copy the bundle again."
        )
    return manifest


def _lies_in(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def sha256(path: Path) -> str:
    """The digest of one file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk.

    Raises:
        OSError: it could not be written.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def finite(value: Any) -> Any:
    """`value` with every float that JSON has no word for (an undefined figure) as None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _opened(folder: Path, name: str) -> BufferedReader:
    """A file of the bundle, opened for reading: a plain file, neither link nor hard link."""
    path = folder / name
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    remedy = "a bundle holds plain files only. Copy it again with `cp -rL`."
    if path.parent != folder and path.parent.is_symlink():
        raise BundleError(f"{path.parent} is a link; {remedy}")
    try:
        if path.is_symlink():
            raise BundleError(f"{path} is a link; {remedy}")
        file = open(os.open(path, flags), "rb")
    except FileNotFoundError:
        if name == MANIFEST:
            raise
        raise BundleError(f"{folder} lacks {name}, which its manifest lists; copy it again.") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}; copy the bundle again.") from None
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        file.close()
        what = "a hard link" if stat.S_ISREG(status.st_mode) else "no plain file"
        raise BundleError(f"{path} is {what}; {remedy}")
    return file


def _same(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise BundleError(
            f"{path} has SHA-256 {found[:12]}..., its manifest says {expected[:12]}...; it was altered. "
            "Do not serve it; copy the bundle again."
        )
