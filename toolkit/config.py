"""All settings of the main job: typed and checked once; `noisyssl.recipe` reads and writes them.

Sections: `data`, `pretrain`, `train`, `export`, beside a few settings shared by both stages.
A method's or loss's own settings are the table of its name: `[pretrain.simclr]`, `[train.gce]`; their
dataclasses stand in `methods/` and `losses/`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from noisyssl.errors import ConfigError, near_miss
from noisyssl.views import MODALITIES


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    path: str = ""
    """Class folders, CSV, npz or packed folder."""
    size: int = 224
    """Height and width of training and serving, in pixels."""
    fit: str = "crop"
    """How an image becomes square: crop, squash or pad."""
    modality: str = "natural"
    """What the images are: natural, histology, xray or fundus; what the views of both stages may change."""
    loader: str = "auto"
    """auto, resident (packed images in the GPU's memory), dali or batched."""
    split_seed: int = 0
    """Seed of splits the source does not give; apart from `seed`, so that all runs share a test set."""
    quarantine: bool = False
    """Leave broken files out instead of stopping."""
    allow_leaks: bool = False
    """Go on although images or groups cross splits."""

    def __post_init__(self) -> None:
        require(self.size >= 16, "data.size", self.size, "at least 16 pixels")
        require(self.split_seed >= 0, "data.split_seed", self.split_seed, "0 or above")
        one_of("data.fit", self.fit, ("crop", "squash", "pad"))
        one_of("data.modality", self.modality, tuple(MODALITIES))
        one_of("data.loader", self.loader, ("auto", "resident", "dali", "batched"))


class AutoBatch(int):
    """`batch = "auto"`: measured before the run begins. As a number it is the batch that `lr` belongs to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Settings of one run of the loop; `pretrain` and `train` each have their own."""

    epochs: int = 30
    """Passes over the training split."""
    batch: int | AutoBatch = 128
    """Images a step of the loader, over all processes; a step of the optimizer takes `accumulate` of them.
    auto measures it on a GPU, scales `lr` to what it found, and writes both into the run."""
    optimizer: str = "adamw"
    """sgd, adam, adamw or lars."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-2
    """Of weights; biases and norms never decay."""
    momentum: float = 0.9
    """Of sgd and lars."""
    warmup: float = 0.05
    """Share of the training over which the learning rate rises; cosine to zero afterwards."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    clip: float = 0.0
    """Largest gradient norm; 0 is no clipping."""
    precision: str = "auto"
    """float32, bf16 or fp16; auto is bf16 on a GPU that has it, else float32."""
    ema: float = 0.0
    """Decay of averaged weights, which are then evaluated and saved; 0 is off."""
    compile: str = "off"
    """torch.compile: off, on, graphs (compiled steps as CUDA graphs: one process on an NVIDIA GPU), or auto,
    which times these ways on the first batch and keeps the fastest."""
    log_every: int = 10
    """Steps between log lines; the only point where the host waits for the GPU."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints inside an epoch; each epoch ends with one anyway."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run."""
    weights: str = ""
    """Starting weights: a .safetensors file or a PyTorch state dict, such as ImageNet's."""

    def __post_init__(self) -> None:
        name = self.section()
        require(self.epochs >= 1, f"{name}.epochs", self.epochs, "at least 1")
        require(self.batch >= 1, f"{name}.batch", self.batch, "at least 1, or auto")
        one_of(f"{name}.optimizer", self.optimizer, ("sgd", "adam", "adamw", "lars"))
        require(0 < self.lr < math.inf, f"{name}.lr", self.lr, "a number above 0")
        require(
            0 <= self.weight_decay < math.inf,
            f"{name}.weight_decay",
            self.weight_decay,
            "0 or a number above",
        )
        require(0 <= self.momentum < 1, f"{name}.momentum", self.momentum, "in [0, 1)")
        require(0 <= self.warmup < 1, f"{name}.warmup", self.warmup, "in [0, 1)")
        require(self.accumulate >= 1, f"{name}.accumulate", self.accumulate, "at least 1")
        require(self.clip >= 0, f"{name}.clip", self.clip, "0 (off) or above")
        one_of(f"{name}.compile", self.compile, ("off", "on", "graphs", "auto"))
        one_of(f"{name}.precision", self.precision, ("auto", "float32", "bf16", "fp16"))
        require(0 <= self.ema < 1, f"{name}.ema", self.ema, "in [0, 1)")
        require(self.log_every >= 1, f"{name}.log_every", self.log_every, "at least 1")
        require(self.checkpoint_minutes > 0, f"{name}.checkpoint_minutes", self.checkpoint_minutes, "above 0")

    @classmethod
    def section(cls) -> str:
        """The name of this stage in a recipe."""
        return cls.__name__.removesuffix("Config").lower()


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig(Stage):
    method: str = "simclr"
    """A self-supervised method's name."""
    batch: int | AutoBatch = 256
    lr: float = 2e-3
    probe_every: int = 5
    """Epochs between looks at the frozen features (k-NN, linear probe, rank, collapse); 0 is never."""
    options: Any = None
    """The method's own settings, from the table of its name."""

    def __post_init__(self) -> None:
        Stage.__post_init__(self)
        require(self.probe_every >= 0, "pretrain.probe_every", self.probe_every, "0 (never) or above")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Stage):
    objective: str = "ce"
    """What is minimised: a robust loss's name."""
    noise: str = "none"
    """Label noise to inject into the labels of training and validation, KIND:RATE such as symmetric:0.4."""
    noise_seed: int = 0
    """Seed of that noise alone, so that runs with other seeds share the flips."""
    val_labels: str = "noisy"
    """Labels that choose BEST: noisy (as in reality) or clean."""
    choice: str = "validation"
    """What BEST is chosen by: validation, or stability of predictions on training images (Label Wave).

    both: by validation, and what stability would have chosen is measured too.
    """
    init: str = ""
    """Pretraining run whose backbone starts the classifier."""
    tune: str = "all"
    """What learns: all, head (the backbone stays), or head:N (the head alone for N epochs, then all)."""
    options: Any = None
    """The objective's own settings, from the table of its name."""

    def __post_init__(self) -> None:
        Stage.__post_init__(self)
        one_of("train.val_labels", self.val_labels, ("noisy", "clean"))
        one_of("train.choice", self.choice, ("validation", "stability", "both"))
        first = self.tune.removeprefix("head:")
        in_turn = self.tune != first and first.isdecimal() and 1 <= int(first) < self.epochs
        allowed = f"all, head, or head:N with N below train.epochs ({self.epochs})"
        require(self.tune in ("all", "head") or in_turn, "train.tune", self.tune, allowed)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    checkpoint: str = "best"
    """best, or last: the final epoch's weights."""
    tensorrt: tuple[str, ...] = ("SM80", "SM86", "SM89", "SM120")
    """Compute capabilities of the TensorRT engine; empty for none."""
    profile: tuple[int, ...] = (1, 8, 64)
    """Smallest, usual and largest batch of the engine."""
    tolerance: float = 1e-4
    """Largest allowed difference of a logit between PyTorch and ONNX Runtime."""
    accuracy: float = 0.0
    """Wanted accuracy of sure answers, whose threshold the bundle then holds; 0 is none."""
    precision: tuple[str, ...] = ("fp32",)
    """fp32, which every bundle has, and those of fp16 and int8 that are wanted beside it."""
    calibration: int = 512
    """Training images that set the scales of INT8 and say what FP16 leaves in float32."""
    int8_range: str = "auto"
    """Weights of the INT8 file for CPUs: full (8 bits), reduced (7), or auto: 7 if this CPU lacks VNNI."""
    fp16_flips: float = 0.001
    """Share of the test images whose class FP16 may change; one always may."""
    fp16_difference: float = 1e-2
    """Largest difference of a probability in FP16; a change of class within it does not count."""
    fp16_range: float = 16384.0
    """Largest activation or weight computed in FP16, which ends at 65504; float32 above."""
    int8_agreement: float = 0.99
    """Smallest share of the test images that keep their class in INT8."""
    int8_auroc_drop: float = 0.002
    """Largest loss of macro-AUROC in INT8."""

    def __post_init__(self) -> None:
        one_of("export.checkpoint", self.checkpoint, ("best", "last"))
        ordered = len(self.profile) == 3 and 1 <= self.profile[0] <= self.profile[1] <= self.profile[2]
        require(ordered, "export.profile", list(self.profile), "three rising batch sizes such as [1, 8, 64]")
        require(0 <= self.accuracy <= 1, "export.accuracy", self.accuracy, "in [0, 1]")
        require(self.tolerance > 0, "export.tolerance", self.tolerance, "above 0")
        for name in self.precision:
            one_of("export.precision", name, ("fp32", "fp16", "int8"))
        require(self.calibration >= 32, "export.calibration", self.calibration, "at least 32 images")
        one_of("export.int8_range", self.int8_range, ("auto", "full", "reduced"))
        for name in ("fp16_flips", "fp16_difference", "int8_agreement", "int8_auroc_drop"):
            require(0 <= getattr(self, name) <= 1, f"export.{name}", getattr(self, name), "in [0, 1]")
        require(0 < self.fp16_range <= 65504, "export.fp16_range", self.fp16_range, "in (0, 65504]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    seed: int = 0
    """Of initial weights, order and augmentation; noise and splits have their own."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int = 0
    """CPU threads; 0 is one per core, then stored: the same number gives the same bits."""
    backbone: str = "resnet18"
    """A backbone's name."""
    stem: str = "plain"
    """plain, or small for images of 64 pixels and less."""
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "0 or above")
        require(self.threads >= 0, "threads", self.threads, "0 (one per core) or above")
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        one_of("stem", self.stem, ("plain", "small"))


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value}; it must be {allowed}. Set it with --set {name}=VALUE.")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = near_miss(value, choices)
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}.{hint}")
