"""What both stages prepare alike: device, threads, seed, starting weights."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noisyssl import checkpoint
from noisyssl.backbones import build_backbone
from noisyssl.config import Config, Stage
from noisyssl.errors import ConfigError, MachineError
from noisyssl.pipelines.board import summary_writer
from noisyssl.pipelines.fit import dtype_of
from noisyssl.pipelines.launch import local_rank, local_world
from noisyssl.pipelines.loader import must_be_possible
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.speedup import can_capture
from noisyssl.pipelines.tables import read_own_table


def device_of(name: str) -> torch.device:
    """The device called auto, cpu or cuda.

    Raises:
        MachineError: cuda was asked for and is not there, or has no GPU for this process.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not gpus:
        raise MachineError(
            "--device is cuda, but PyTorch finds no NVIDIA GPU; use --device cpu, or see `noisyssl doctor`."
        )
    if name == "cpu" or not gpus:
        return torch.device("cpu")
    if local_rank() >= gpus:
        raise MachineError(
            f"there are {local_world()} processes on this machine, but PyTorch finds {gpus} NVIDIA GPUs; "
            f"start at most {gpus}, or use --device cpu."
        )
    return torch.device("cuda")


def settings_must_hold(config: Config, stage: Stage) -> None:
    """Raises what the settings of a stage alone make impossible on this machine.

    Raises:
        ConfigError: an unknown backbone, what the device lacks, or weights that do not fit.
        MachineError: a device or a package is missing.
    """
    if stage.batch < 2:
        raise ConfigError(
            f"{stage.section()}.batch is {stage.batch}; BatchNorm needs 2 or more. Set --batch 2 or auto."
        )
    backbone = build_backbone(config.backbone, config.stem)
    device = device_of(config.device)
    dtype_of(stage, device)
    if stage.compile == "graphs" and not can_capture(device):
        raise ConfigError(
            f"{stage.section()}.compile is 'graphs', which takes an NVIDIA GPU and a single process; "
            f"set {stage.section()}.compile=on or auto."
        )
    must_be_possible(config.data.loader, device)
    if stage.tensorboard:
        summary_writer()
    if stage.weights:
        start_from(backbone.trunk, stage.weights)


def threads_of(asked: int) -> int:
    """The number of CPU threads: as asked, or this process's part of the cores that it may use."""
    return asked or max(1, len(os.sched_getaffinity(0)) // local_world())


def seed_all(seed: int) -> None:
    """Initial weights depend on the seed alone; nothing later draws from these generators."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True  # shapes are fixed
    if torch.are_deterministic_algorithms_enabled():
        torch.backends.cudnn.benchmark = False


def start_from(module: nn.Module, path: str) -> dict[str, Any]:
    """Load a foreign weights file into `module`; what matched, for the log and the terminal."""
    weights = checkpoint.read_weights(Path(path))
    loaded, missing, unused = checkpoint.fit_weights(module, weights)
    return {
        "kind": "weights",
        "message": f"{path}: {len(loaded)} of {len(loaded) + len(missing)} tensors loaded, "
        f"{len(unused)} of the file unused",
        "missing": missing[:20],
        "unused": unused[:20],
    }


def dropped_of(facts: dict[str, Any]) -> dict[int, str]:
    """The files that broke during the run so far, from a checkpoint's facts: JSON keys are text."""
    return {int(index): reason for index, reason in facts.get("dropped", {}).items()}


def seen_by(init: Path, samples: Samples) -> list[dict[str, Any]]:
    """A warning for the log where the run `init` trained on files that are tested on now."""
    splits, digests = read_own_table(init / "samples.csv", ("split", "digest")).values()
    seen = {digest for split, digest in zip(splits, digests, strict=True) if split == "train"}
    test = samples.where("test").tolist()
    count = sum(samples.digests[row] in seen for row in test)
    message = (
        f"{count:,} of {len(test):,} test images were in the training split of {init}: "
        "the test is not unseen. Use data with the same splits."
    )
    return [{"kind": "warning", "message": message}] if count else []
