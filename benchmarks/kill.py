"""Question "kill": does a run killed at any moment resume to the same bits?

Each trial trains in a process of its own, kills it with SIGKILL (at a random moment, or inside a
checkpoint write that is slowed down for the purpose), resumes, and compares every tensor with those of
a run that was left alone.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from noisyssl import checkpoint
from noisyssl.benchmarks.records import Record, record
from noisyssl.pipelines.generate import generate

SETTINGS = (
    "backbone=resnet18-w16", "data.size=32", "threads=1", "train.epochs=6", "train.batch=32",
    "train.noise=symmetric:0.4", "train.checkpoint_minutes=0.005", "train.ema=0.9",
)  # fmt: skip
SLOW = """
import os, sys, time
from pathlib import Path
from noisyssl import disk
marker, fsync = Path(sys.argv.pop(1)), os.fsync
def slow(handle):
    if marker.parent.exists() and "step-" in os.readlink(f"/proc/self/fd/{handle}"):
        marker.touch()
        time.sleep(0.25)
        marker.unlink(missing_ok=True)
    fsync(handle)
disk.os = type("slow_os", (), dict(vars(os), fsync=staticmethod(slow)))
from noisyssl.cli import main
main(sys.argv[1:])
"""
"""A training process whose checkpoint writes take a quarter of a second before they reach the disk."""


def measure(folder: Path, kills: int = 10, inside: int = 4, seed: int = 0) -> Record:
    """Figures: runs killed, of these inside a write, resumed, equal to the last bit, unreadable checkpoints.

    Args:
        folder: an empty folder for data and runs.
        kills: runs to kill.
        inside: how many of them inside a checkpoint write.
        seed: of the random moments.
    """
    rng = random.Random(seed)
    data = folder / "data"
    generate(data, count=450, size=32, seed=0)
    began = time.monotonic()
    _run(data, folder / "whole").wait()
    length = time.monotonic() - began
    expected = _tensors(folder / "whole")
    resumed = equal = unreadable = hit = 0
    for trial in range(kills):
        run = folder / f"killed-{trial}"
        kill_once(data, run, rng.uniform(0.35, 0.95) * length, within_write=trial < inside)
        left = list((run / "checkpoints").glob("*.tmp"))
        hit += trial < inside and bool(left)
        unreadable += _unreadable(run)
        had = any((run / "checkpoints").glob("step-*.safetensors"))
        resumed += _run(data, run, "--resume").wait() == 0 and _went_on(run) == had
        equal += (run / "metrics.json").exists() and _same(expected, _tensors(run))
        shutil.rmtree(run)
    figures = {
        "killed": kills, "inside a write": hit, "resumed": resumed,
        "equal bit for bit": equal, "unreadable checkpoints": unreadable,
    }  # fmt: skip
    return record("kill", settings={"training": list(SETTINGS), "seed": seed}, figures=figures, n=kills)


def kill_once(data: Path, run: Path, after_s: float, *, within_write: bool) -> None:
    """Start a run and kill it `after_s` seconds later, or inside the first checkpoint write after that."""
    while True:
        marker = run.with_name("writing") / run.name
        marker.parent.mkdir(exist_ok=True)
        process = _run(data, run, marker=marker if within_write else None)
        began = time.monotonic()
        while process.poll() is None:
            late = time.monotonic() - began > after_s
            if late and (run / "run.json").exists() and (not within_write or marker.exists()):
                process.kill()
                process.wait()
                if (run / "metrics.json").exists():
                    break  # it had just finished: that was no kill
                return
            time.sleep(0.002)
        shutil.rmtree(run, ignore_errors=True)  # it ended before the moment came
        after_s *= 0.8


def _run(data: Path, out: Path, *more: str, marker: Path | None = None) -> "subprocess.Popen[bytes]":
    arguments = ["train", str(data / "manifest.csv"), "--out", str(out), *more]
    if "--resume" not in more:
        arguments += [part for setting in SETTINGS for part in ("--set", setting)]
    start: Sequence[str] = ("-c", SLOW, str(marker)) if marker else ("-m", "noisyssl.cli")
    environment = {**os.environ, "NOISYSSL_CACHE": str(data.parent / "cache")}
    return subprocess.Popen(
        [sys.executable, *start, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _tensors(run: Path) -> dict[str, dict[str, object]]:
    """Every tensor of what a finished run produced and of its final training state."""
    names = [
        "best.safetensors",
        "last.safetensors",
        max(p.name for p in (run / "checkpoints").glob("step-*")),
    ]
    return {name: dict(checkpoint.load(run / "checkpoints" / name)[0]) for name in names}


def _went_on(run: Path) -> bool:
    """Whether the last process of a run started from a checkpoint and not afresh."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    starts = [entry for entry in map(json.loads, lines) if entry["kind"] == "start"]
    return bool(starts[-1]["resumed"])


def _same(first: dict[str, dict[str, object]], second: dict[str, dict[str, object]]) -> bool:
    import torch

    return first.keys() == second.keys() and all(
        first[name].keys() == second[name].keys()
        and all(torch.equal(first[name][key], second[name][key]) for key in first[name])  # type: ignore[arg-type]
        for name in first
    )


def _unreadable(run: Path) -> int:
    """Checkpoints under their final name that do not load."""
    broken = 0
    for path in (run / "checkpoints").glob("*.safetensors"):
        try:
            checkpoint.load(path)
        except Exception:
            broken += 1
    return broken
