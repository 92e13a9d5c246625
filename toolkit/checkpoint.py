"""Tensors and facts on disk in one safetensors file: written whole or not at all, checked when read."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from noisyssl.disk import write_whole
from noisyssl.errors import ConfigError, MachineError, TrainingError


def save(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write `tensors` and JSON-able `facts`, so that `path` is at any moment the old or the new file.

    Raises:
        MachineError: the disk is full or refuses; the previous file is intact.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"facts": json.dumps(facts), "sha256": digest(tensors)}
    write_whole(path, to_bytes(tensors, metadata))


def load(
    path: Path, remedy: str = "delete it to use an earlier one"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and facts of a file that `save` wrote.

    Args:
        remedy: what a person can do where the file is damaged.

    Raises:
        TrainingError: the file is damaged.
        MachineError: the disk does not give it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        facts = json.loads(metadata["facts"])
        damaged = digest(tensors) != metadata["sha256"]
    except OSError as error:
        raise MachineError(
            f"{path} cannot be read: {error.strerror or error}. Try again; it may be whole."
        ) from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise TrainingError(f"{path} is not a readable checkpoint ({error}); {remedy}.") from None
    if damaged:
        raise TrainingError(f"{path} is damaged: its digest differs; {remedy}.")
    return tensors, facts


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.contiguous().flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return total.hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a foreign .safetensors file or PyTorch state dict, loaded without running its code.

    Raises:
        ConfigError: no such file, or not a plain mapping of names to tensors.
    """
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        hint = " A pretraining run is named with --init." if (path / "run.json").is_file() else ""
        raise ConfigError(f"--weights {path} {what}; give a .safetensors file or a PyTorch state dict.{hint}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().split("\n", 1)[0]
        if first.startswith("Weights only load failed"):  # goes on to advise loading it unsafely
            first = "it holds more than plain tensors, or is no PyTorch file"
        raise ConfigError(
            f"--weights {path} cannot be loaded safely ({first}); "
            "convert it to a .safetensors file of plain tensors."
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(
            f"--weights {path} is not a mapping of names to tensors; save model.state_dict() alone."
        )
    return state


def fit_weights(
    module: torch.nn.Module, weights: dict[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Copy what matches into `module`; (names loaded, names left at their start, names of `weights` unused).

    A common prefix such as `module.`, `backbone.` or `backbone.trunk.` is found and removed.

    Raises:
        ConfigError: nothing matches: the weights are of another architecture.
    """
    own = module.state_dict()

    def matches(prefix: str) -> list[str]:
        return [
            n for n, v in own.items() if (w := weights.get(prefix + n)) is not None and w.shape == v.shape
        ]

    prefixes = {""} | {
        name[: -len(own_name)] for own_name in list(own)[:3] for name in weights if name.endswith(own_name)
    }
    prefix = max(sorted(prefixes), key=lambda p: len(matches(p)))
    loaded = matches(prefix)
    if not any(own[name].ndim > 1 for name in loaded):
        theirs, ours = next(iter(weights), "nothing"), next(iter(own))
        raise ConfigError(
            f"no weight fits: the file has {theirs!r}, the model {ours!r}; "
            "set backbone and stem to the architecture of the file."
        )
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(weights[prefix + name])
    used = {prefix + name for name in loaded}
    return loaded, [n for n in own if n not in loaded], [n for n in weights if n not in used]
