"""What both stages prepare alike: device, threads, seed, starting weights."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noisyssl import checkpoint
from noisyssl.errors import MachineError
from noisyssl.pipelines.launch import local_rank, local_world


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
