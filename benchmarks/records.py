"""Records: each measured number is one JSON line that says what, how, where and with which code.

    {question, settings, figures, n, spread, machine, versions, commit, date}

`question` names the script that asks, `settings` is all that was chosen, `figures` what came out (numbers,
or {row: {column: number}}), `n` how many runs or images stand behind them, `spread` null or
{figure: {"median", "p10", "p90"}}. `commit` is the git commit, with "+changed" when the files differ from it,
null outside a checkout.
"""

import dataclasses
import datetime
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noisyssl import machine
from noisyssl.errors import DataError, MachineError

Record = dict[str, Any]
FIELDS = ("question", "settings", "figures", "n", "spread", "machine", "versions", "commit", "date")
RESULTS = Path(__file__).parent / "results"
"""Where this repository keeps its own records."""


def record(
    question: str,
    *,
    settings: Mapping[str, Any],
    figures: Mapping[str, Any],
    n: int,
    spread: Mapping[str, Any] | None = None,
) -> Record:
    """A record of this machine, code and moment, as plain JSON values (`Spread`s become dicts)."""
    return {
        "question": question,
        "settings": _plain(settings),
        "figures": _plain(figures),
        "n": n,
        "spread": _plain(spread),
        "machine": machine.facts(),
        "versions": machine.versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write(path: Path, one: Record) -> None:
    """Append `one` as a line with a single write, so that two writers do not mix; then flush it to the disk.

    Raises:
        ValueError: a figure is not finite, a field is missing or unknown.
        MachineError: the file cannot be written, the disk is full for example.
    """
    if tuple(sorted(one)) != tuple(sorted(FIELDS)):
        raise ValueError(f"record has fields {sorted(one)}; expected {sorted(FIELDS)}")
    line = json.dumps(one, allow_nan=False, ensure_ascii=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise MachineError(
            f"{path} cannot be written: {error.strerror}. Free space or name another."
        ) from None
    if written < len(line):
        raise MachineError(
            f"{path} took {written} of {len(line)} bytes; the disk is full. Cut its last line off."
        )


def read(folder: Path) -> list[Record]:
    """All records of `folder`'s *.jsonl files, oldest first.

    Raises:
        DataError: a line is no record.
    """
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                one = json.loads(line)
            except ValueError:
                one = None
            if not isinstance(one, dict) or not set(FIELDS) <= set(one):
                raise DataError(
                    f"{path.name} line {number} is no record; one JSON object a line. Delete that line."
                )
            found.append(one)
    return sorted(found, key=lambda one: str(one["date"]))


def commit() -> str | None:
    """Commit of this code, "+changed" added if a file other than the results differs; None outside git."""
    root = Path(__file__).parents[1]
    if (
        _git(root, "ls-files", "--error-unmatch", __file__) is None
    ):  # installed inside somebody else's checkout
        return None
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    changed = _git(root, "status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return head.strip() + ("+changed" if changed else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout if answer.returncode == 0 else None


def _plain(value: Any) -> Any:
    """`value` as JSON knows it: dataclasses as dicts, NumPy numbers as Python's, paths as their last name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return value.name
    return value.item() if hasattr(value, "item") else value
