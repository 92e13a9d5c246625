"""What both stages prepare alike: device, threads, seed, starting weights."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noisyssl import checkpoint
from noisyssl.errors import MachineError


def device_of(name: str) -> torch.device:
    """The device called auto, cpu or cuda.

    Raises:
        MachineError: cuda was asked for and is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "--device is cuda, but PyTorch finds no NVIDIA GPU; use --device cpu, or see `noisyssl doctor`."
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def threads_of(asked: int) -> int:
    """The number of CPU threads: as asked, or one per core this process may use."""
    return asked or len(os.sched_getaffinity(0))


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
