"""A Triton model repository of ours on the disk: its record, and whether its files are still its own.

`noisyssl.json` says for each version which bundle it came from, the SHA-256 of its files and the parity of
its first step. Every `config.pbtxt` follows from it, so one that was edited by hand is noticed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noisyssl.deploy import bundle, triton_config
from noisyssl.errors import BundleError, ConfigError

RECORD = "noisyssl.json"
FORMAT = "noisyssl-triton"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """A repository that was read and whose files are those that were written."""

    folder: Path
    record: dict[str, Any]

    @property
    def active(self) -> dict[str, Any]:
        """The record of the version that is served."""
        version: dict[str, Any] = self.record["versions"][str(self.record["active"])]
        return version

    @property
    def models(self) -> dict[str, str]:
        """Model to its backend."""
        return dict(self.record["models"])


def read(folder: Path) -> Repository:
    """The repository in `folder`; every file of the version that is served was hashed.

    Raises:
        ConfigError: it is no repository of ours.
        BundleError: it was altered.
    """
    must_be_ours(folder)
    record = parse(folder)
    verify(folder, record)
    for path, text in configs(record).items():
        if not _is_plain(folder, path) or (folder / path).read_text(encoding="utf-8") != text:
            raise BundleError(
                f"{folder / path} was altered. Do not serve it; `noisyssl deploy rollback {folder} --version "
                f"{record['active']}` writes it again."
            )
    return Repository(folder=folder, record=record)


def configs(record: Mapping[str, Any]) -> dict[str, str]:
    """`config.pbtxt` and `labels.txt` of every model, by path, for the version that is served."""
    version = record["versions"][str(record["active"])]
    name, classes, batch = record["name"], record["classes"], record["batch"]
    shared: dict[str, Any] = {"version": record["active"], "batch": batch}
    found = {}
    for model, kind in record["models"].items():
        if kind == "dali":
            text = triton_config.view_model(model, record["size"], **shared)
        elif kind == "ensemble":
            text = triton_config.ensemble(model, f"{name}_dali", name, len(classes), **shared)
        elif kind == "tensorrt":
            text = triton_config.plan_model(
                model,
                len(classes),
                record["size"],
                plans=version["plans"],
                precision=version["precision"],
                digest=version["bundle"],
                **shared,
            )
        else:
            text = triton_config.onnx_model(
                model, len(classes), record["size"], precision=version["precision"],
                digest=version["bundle"], threads=version["threads"], **shared,
            )  # fmt: skip
        found[f"{model}/config.pbtxt"] = text
        if kind != "dali":
            found[f"{model}/{triton_config.LABELS}"] = "".join(f"{_one_line(c)}\n" for c in classes)
    return found


def _one_line(name: str) -> str:
    """A class name as one line."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name
    )


def must_be_ours(folder: Path) -> None:
    """Raises ConfigError unless `folder` has our record."""
    path = folder / RECORD
    if not path.is_file() or path.is_symlink():
        raise ConfigError(
            f"{folder} is no repository of `noisyssl deploy` (it has no {RECORD}); nothing was touched. "
            "Name a new folder."
        )


def parse(folder: Path) -> dict[str, Any]:
    """The record; raises BundleError where it was altered."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        own = record.pop("sha256")
        is_known = record["format"] == FORMAT and record["schema"] == SCHEMA
    except (ValueError, KeyError, TypeError, AttributeError):
        own, is_known, record = None, False, {}
    if not is_known:
        raise ConfigError(
            f"{folder / RECORD} is not of `noisyssl deploy`, schema {SCHEMA}; nothing was touched. "
            "Name a new folder."
        )
    if own != bundle.own_digest(record):
        raise BundleError(f"{folder / RECORD} was altered: its own SHA-256 differs. Deploy to a new folder.")
    return dict(record)


def verify(folder: Path, record: Mapping[str, Any]) -> None:
    """Raises BundleError unless the files of the version that is served are those that were written."""
    for name, expected in record["versions"][str(record["active"])]["files"].items():
        path = folder / name
        if not _is_plain(folder, name) or bundle.sha256(path) != expected:
            raise BundleError(
                f"{path} is missing or altered. Do not serve it; deploy the bundle again, or "
                f"`noisyssl deploy rollback {folder}` to another version."
            )


def _is_plain(folder: Path, name: str) -> bool:
    """Whether `name` is a file of `folder` that no link leads to."""
    parts = Path(name).parts
    return (folder / name).is_file() and not any(
        folder.joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts))
    )
