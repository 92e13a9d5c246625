"""A Triton model repository: written whole beside its place and renamed, then only added to.

    REPO/noisyssl.json                 what each version is: bundle, digests, parity of its first step
    REPO/NAME/config.pbtxt             the ONNX variant; beside it NAME_trt, NAME_dali, NAME_ensemble
    REPO/NAME/VERSION/model.onnx       never edited; `config.pbtxt` says which version is served
    REPO/launch.sh, compose.yaml, ...  for administrators; Triton reads folders only

A new bundle becomes the next version of the same models. Which version is served stands in `config.pbtxt`,
replaced in one rename; Triton takes it at its next start (it runs with model control off).
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from noisyssl.deploy import bundle, triton_launch
from noisyssl.deploy.triton_models import Version
from noisyssl.deploy.triton_record import (
    FORMAT,
    RECORD,
    SCHEMA,
    Repository,
    configs,
    must_be_ours,
    parse,
    read,
    verify,
)
from noisyssl.errors import ConfigError, MachineError

NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,63}")


def deploy(folder: Path, new: Version, name: str | None) -> Repository:
    """The repository `folder`, made of `new`, or with `new` as its next version, which is then served.

    Raises:
        ConfigError: `folder` is something else, or serves other classes, another size or other models.
        BundleError: a file of the repository was altered.
        MachineError: it cannot be written.
    """
    if not os.path.lexists(folder):
        return _create(folder, new, name or "noisyssl")
    must_be_ours(folder)
    with _locked(folder):
        repository = read(folder)
        record = repository.record
        if name not in (None, record["name"]):
            raise ConfigError(f"--name is {name}; {folder} serves {record['name']}. Leave --name out.")
        for field in ("classes", "size", "batch"):
            if (here := record[field]) != (given := new.facts[field]):
                raise ConfigError(
                    f"{folder} serves {field} {here}, this version has {given}; its clients would break. "
                    "Deploy it to a new folder."
                )
        kinds = sorted(record["models"].values())
        if kinds != sorted(new.kinds):
            raise ConfigError(
                f"{folder} has models for {', '.join(kinds)}, this version "
                f"for {', '.join(sorted(new.kinds))}; "
                "a rollback would lose one. Deploy with the same options (--images: ensemble), or elsewhere."
            )
        number = max(map(int, record["versions"])) + 1
        try:
            _write_version(folder, record["name"], new, number)
            record["versions"][str(number)] = _facts(record["name"], new, number)
            record["active"] = number
            _activate(folder, record)
        except OSError as error:
            raise _unwritable(folder, error) from error
    return read(folder)


def roll_back(folder: Path, version: int | None) -> Repository:
    """The repository, serving `version` again; without one, the version before the active one.

    Raises:
        ConfigError: no repository of ours, or no such version.
        BundleError: a file of that version was altered; nothing is changed.
    """
    must_be_ours(folder)
    with _locked(folder):
        record = parse(folder)
        known = sorted(map(int, record["versions"]))
        if version is None:
            older = [number for number in known if number < record["active"]]
            if not older:
                raise ConfigError(f"{folder} serves version {record['active']}; no older one to go back to.")
            version = older[-1]
        if version not in known:
            raise ConfigError(f"--version is {version}; {folder} has {', '.join(map(str, known))}.")
        record["active"] = version
        verify(folder, record)
        try:
            _activate(folder, record)
        except OSError as error:
            raise _unwritable(folder, error) from error
    return read(folder)


def _create(folder: Path, new: Version, name: str) -> Repository:
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name is {name!r}; write a letter, then letters, digits or - (64 at most).")
    folder = folder.absolute()
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
        _write_version(draft, name, new, 1)
        record = {
            "format": FORMAT, "schema": SCHEMA, "name": name, **new.facts,
            "models": {_model(name, kind): kind for kind in new.kinds},
            "active": 1, "versions": {"1": _facts(name, new, 1)},
        }  # fmt: skip
        limit = triton_launch.input_limit(record["batch"], record["size"])
        for file, text in triton_launch.files(name, limit, gpu_only="tensorrt" in new.kinds).items():
            bundle.save(draft / file, text.encode())
        (draft / "launch.sh").chmod(0o755)
        _activate(draft, record)
        read(draft)  # what a server will do
        draft.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        if draft.exists():
            shutil.rmtree(draft, ignore_errors=True)
    return read(folder)


def _model(name: str, kind: str) -> str:
    return name + {"onnxruntime": "", "tensorrt": "_trt"}.get(kind, f"_{kind}")


def _write_version(out: Path, name: str, new: Version, number: int) -> None:
    """The version folder of each model, complete before it gets its name."""
    for kind, files in new.files.items():
        place = out / _model(name, kind)
        final, draft = place / str(number), place / f"new.{number}"
        for left in (final, draft):  # of a deploy that was killed: no record names it, so nothing serves it
            shutil.rmtree(left, ignore_errors=True)
        draft.mkdir(parents=True)
        for file, data in files.items():
            bundle.save(draft / file, data)
        _flush(draft)
        draft.rename(final)
        _flush(place)


def _facts(name: str, new: Version, number: int) -> dict[str, Any]:
    digests = {
        f"{_model(name, kind)}/{number}/{file}": hashlib.sha256(data).hexdigest()
        for kind, files in new.files.items()
        for file, data in files.items()
    }
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {**new.about, "created": created, "files": digests}


def _activate(folder: Path, record: dict[str, Any]) -> None:
    """Put the record, then what follows from it, in place; a killed one is finished by the same command."""
    record.pop("sha256", None)
    record["sha256"] = bundle.own_digest(record)
    _replace(folder / RECORD, json.dumps(record, indent=2) + "\n")
    for path, text in configs(record).items():
        _replace(folder / path, text)


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    bundle.save(draft, text.encode())
    draft.rename(path)
    _flush(path.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One deploy at a time; the lock goes with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MachineError(f"{folder} is being deployed to by another process; wait for it.") from None
        yield
    finally:
        os.close(descriptor)


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(folder: Path, error: OSError) -> MachineError:
    return MachineError(
        f"{folder} cannot be written ({error.strerror or error}); what it served stays as it was. "
        "Free some space or choose another folder."
    )
