"""A run folder: configuration, log, checkpoints and figures of one training."""

import fcntl
import json
import os
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
import torch

from noisyssl import checkpoint
from noisyssl.config import AutoBatch, Config
from noisyssl.disk import disk, write_whole
from noisyssl.distributed import exchange, rank, wait_for_all
from noisyssl.errors import ConfigError, DataError, TrainingError
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.state import State
from noisyssl.pipelines.tables import table_text
from noisyssl.recipe import differences, parse, tree_of

FREE = ("path", "quarantine", "allow_leaks")
"""Settings of `data` that a resumed run may change."""
KEEP = 2
"""Training checkpoints kept: the newest, and one to fall back to."""


class Run:
    """`config.toml`, `run.json`, `samples.csv`, `log.jsonl`, `checkpoints/`, `metrics.json` in one folder.

    Among several processes the first one writes, and what the others would write is left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writes = rank() == 0
        self.checkpoints = folder / "checkpoints"
        self.shown: Any = lambda entry: None
        """Also receives each log entry, for a terminal or TensorBoard."""

    @classmethod
    def create(
        cls, folder: Path, config: Config, stage: str, samples: Samples, batch: dict[str, Any] | None = None
    ) -> "Run":
        """A new run; `folder` appears with its configuration complete or not at all.

        Args:
            batch: how a batch of auto was settled, see `batch_size.settle`.

        Raises:
            ConfigError: the folder exists.
        """
        if rank() > 0:
            wait_for_all()
            return cls(folder)
        if folder.exists():
            raise ConfigError(
                f"--out {folder} already exists; give a new folder, or --resume to go on with it."
            )
        with disk(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
            shutil.rmtree(beside, ignore_errors=True)
            try:
                (beside / "checkpoints").mkdir(parents=True)
                (beside / "config.toml").write_text(tomli_w.dumps(tree_of(config)), encoding="utf-8")
                (beside / "samples.csv").write_text(
                    table_text(samples.columns()), encoding="utf-8", errors="surrogateescape"
                )
                found: dict[str, Any] = {"batch": batch} if batch else {}
                facts = {"stage": stage, "data": samples.digest(), "classes": list(samples.classes)} | found
                (beside / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
                beside.rename(folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        wait_for_all()
        return cls(folder)

    @classmethod
    def open(cls, folder: Path, stage: str | None = None) -> "Run":
        """An existing run.

        Raises:
            ConfigError: no run there, or one of another stage.
        """
        run = cls(folder)
        if not (folder / "run.json").is_file():
            what = "is not a run folder" if folder.exists() else "does not exist"
            given = f"`noisyssl {stage}`" if stage else "`noisyssl pretrain` or `train`"
            raise ConfigError(f"{folder} {what}; give the --out folder of {given}.")
        if stage and (found := run.facts()["stage"]) != stage:
            raise ConfigError(
                f"{folder} is a run of `noisyssl {found}`; this needs one of `noisyssl {stage}`."
            )
        return run

    def facts(self) -> dict[str, Any]:
        """Stage, data digest and classes; how its batch was found if that was auto."""
        return self._read("run.json", json.loads)

    def config(self) -> Config:
        """The resolved configuration this run started with."""
        return parse(self._read("config.toml", tomllib.loads))

    def _read(self, name: str, understand: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / name
        try:
            return understand(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist; copy the run again, whole.") from None
        except ValueError as error:  # what JSON, TOML and UTF-8 say
            raise ConfigError(
                f"{path} cannot be read ({error}); copy the run again, or undo the edit."
            ) from None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the run, so that no second training writes into it; a process that dies lets go.

        Raises:
            ConfigError: another process holds it.
        """
        if not self.writes:
            yield
            return
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConfigError(
                        f"{self.folder} is in use by another process; wait for it, or end it first."
                    ) from None
            yield
        finally:
            os.close(handle)

    def must_match(self, config: Config) -> None:
        """Raises ConfigError naming each setting of this stage that differs from the run's own.

        Where the data is and what is accepted of it may change: its content is compared by `must_hold`.
        """
        config = self.settled(config)
        foreign = ("export.", {"train": "pretrain.", "pretrain": "train."}[self.facts()["stage"]])
        free = tuple(f"data.{name}:" for name in FREE)
        found = differences(self.config(), config)
        if changed := [name for name in found if not name.startswith((*foreign, *free))]:
            raise ConfigError(
                f"--resume goes on with the settings of {self.folder}, but {'; '.join(changed)}. "
                "Leave them out, or start a new run with another --out."
            )

    def settled(self, config: Config) -> Config:
        """`config` with this run's own batch for auto, and the learning rate that was scaled for it."""
        name = self.facts()["stage"]
        own, asked = getattr(self.config(), name), getattr(config, name)
        if not isinstance(asked.batch, AutoBatch):
            return config
        scaled = asked.lr == self.facts().get("batch", {}).get("asked", {}).get("lr")
        stage = replace(asked, batch=own.batch, lr=own.lr if scaled else asked.lr)
        return replace(config, **{name: stage})

    def adopt(self, config: Config) -> None:
        """Keep from `config` what `must_match` lets differ, for whatever opens this run later."""
        own = self.config()
        data = replace(own.data, **{name: getattr(config.data, name) for name in FREE})
        if data != own.data:
            self.write("config.toml", tomli_w.dumps(tree_of(replace(own, data=data))))

    def must_hold(self, samples: Samples) -> None:
        """Raises DataError if `samples` is not the data this run started with."""
        if samples.digest() != self.facts()["data"]:
            raise DataError(
                f"the data is not what {self.folder} was started with (its digest differs); "
                "restore it, or start a new run with another --out."
            )

    def log(self, entry: dict[str, Any]) -> None:
        """Append one JSON line."""
        if not self.writes:
            return
        path = self.folder / "log.jsonl"
        with disk(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.shown(entry)

    def cut_log(self, step: int, epoch: int) -> None:
        """Drop the log lines after `step` and `epoch`: a resumed run writes them again."""
        path = self.folder / "log.jsonl"
        if not self.writes or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that a kill cut short
            if entry.get("step", 0) <= step and (
                entry["kind"] not in ("epoch", "probe") or entry["epoch"] <= epoch
            ):
                kept.append(line)
        write_whole(path, "".join(line + "\n" for line in kept))

    def save(self, state: State) -> None:
        """Write a training checkpoint and drop the oldest beyond `KEEP`."""
        if not self.writes:
            return
        path = self.checkpoints / f"step-{state.step:09}.safetensors"
        checkpoint.save(path, state.tensors(), state.record())
        for old in sorted(self.checkpoints.glob("step-*.safetensors"))[:-KEEP]:
            old.unlink()

    def restore(self, state: State) -> Path | None:
        """Bring `state` to the newest readable checkpoint; its path, or None to start afresh.

        A damaged file is set aside and reported in the log, and the one before it is used. Among several
        processes the first chooses.

        Raises:
            TrainingError: there are checkpoints and all are damaged.
            MachineError: a checkpoint cannot be read; it may be whole.
        """
        path = self._restore(state) if self.writes else None
        name = exchange(path.name if path else None)[0]
        if not self.writes and name is not None:
            path = self.checkpoints / name
            state.restore(*checkpoint.load(path))
        return path

    def _restore(self, state: State) -> Path | None:
        for leftover in self.checkpoints.glob("*.tmp"):
            leftover.unlink()  # a write that a kill cut short
        for path in sorted(self.checkpoints.glob("step-*.safetensors"), reverse=True):
            try:
                tensors, record = checkpoint.load(path)
            except TrainingError as error:
                self.log({"kind": "warning", "message": str(error), "time": time.time()})
                path.rename(path.with_suffix(".damaged"))
                continue
            state.restore(tensors, record)
            self.cut_log(state.step, state.epoch)
            return path
        if damaged := sorted(self.checkpoints.glob("*.damaged")):
            raise TrainingError(
                f"{damaged[-1]} and all before it are damaged; start a new run with another --out."
            )
        self.cut_log(0, -1)
        return None

    def is_fresh(self) -> bool:
        """Whether no checkpoint was written yet, so that starting weights still matter."""
        return not any(self.checkpoints.glob("step-*.safetensors"))

    def save_weights(self, name: str, module: torch.nn.Module, facts: dict[str, Any]) -> None:
        """Write the weights that this run produces: `best` or `last`."""
        if self.writes:
            checkpoint.save(self.checkpoints / f"{name}.safetensors", module.state_dict(), facts)

    def weights(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The weights called `best` or `last` of a finished run.

        Raises:
            ConfigError: the run has not finished.
        """
        path = self.checkpoints / f"{name}.safetensors"
        if not self.is_finished():
            raise ConfigError(
                f"{self.folder} has no finished checkpoint {name!r}; finish it with --resume first."
            )
        if not path.is_file():
            raise ConfigError(
                f"{path} does not exist, although the run is finished; copy the run again, whole."
            )
        return checkpoint.load(path, "copy the run again, whole")

    def is_finished(self) -> bool:
        """Whether the figures are there: they are written last."""
        return (self.folder / "metrics.json").is_file()

    def metrics(self) -> dict[str, Any]:
        """The figures of a finished run."""
        if not self.is_finished():
            raise ConfigError(f"{self.folder} has no metrics.json yet; finish it with --resume first.")
        return self._read("metrics.json", json.loads)

    def write(self, name: str, data: bytes | str) -> None:
        """Write a file of the run, whole or not at all."""
        if self.writes:
            write_whole(self.folder / name, data)
