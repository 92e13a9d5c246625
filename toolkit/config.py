"""All settings of the main job: typed, checked once, read from TOML, saved resolved with each run.

Sections: `data`, `pretrain`, `train`, `export`, beside a few settings shared by both stages.
A method's or loss's own settings are the table of its name: `[pretrain.simclr]`, `[train.gce]`; their
dataclasses stand in `methods/` and `losses/`.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from noisyssl.errors import ConfigError, near_miss, pick


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    path: str = ""
    """Class folders, CSV, npz or packed folder."""
    size: int = 224
    """Height and width of training and serving, in pixels."""
    fit: str = "crop"
    """How an image becomes square: crop, squash or pad."""
    loader: str = "auto"
    """auto, dali or batched."""
    split_seed: int = 0
    """Seed of splits the source does not give; apart from `seed`, so that all runs share a test set."""
    quarantine: bool = False
    """Leave broken files out instead of stopping."""
    allow_leaks: bool = False
    """Go on although images or groups cross splits."""

    def __post_init__(self) -> None:
        require(self.size >= 16, "data.size", self.size, "at least 16 pixels")
        one_of("data.fit", self.fit, ("crop", "squash", "pad"))
        one_of("data.loader", self.loader, ("auto", "dali", "batched"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Settings of one run of the loop; `pretrain` and `train` each have their own."""

    epochs: int = 30
    """Passes over the training split."""
    batch: int = 128
    """Images a step of the loader; a step of the optimizer takes `accumulate` of them."""
    optimizer: str = "adamw"
    """sgd, adamw or lars."""
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
    compile: bool = False
    """torch.compile the objective."""
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
        require(self.batch >= 1, f"{name}.batch", self.batch, "at least 1")
        one_of(f"{name}.optimizer", self.optimizer, ("sgd", "adamw", "lars"))
        require(self.lr > 0, f"{name}.lr", self.lr, "above 0")
        require(0 <= self.warmup < 1, f"{name}.warmup", self.warmup, "in [0, 1)")
        require(self.accumulate >= 1, f"{name}.accumulate", self.accumulate, "at least 1")
        require(self.clip >= 0, f"{name}.clip", self.clip, "0 (off) or above")
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
    batch: int = 256
    lr: float = 2e-3
    options: Any = None
    """The method's own settings, from the table of its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Stage):
    objective: str = "ce"
    """What is minimised: a robust loss's name."""
    noise: str = "none"
    """Label noise to inject into the training labels, KIND:RATE such as symmetric:0.4."""
    noise_seed: int = 0
    """Seed of that noise alone, so that runs with other seeds share the flips."""
    val_labels: str = "noisy"
    """Labels that choose BEST: noisy (as in reality) or clean."""
    init: str = ""
    """Pretraining run whose backbone starts the classifier."""
    options: Any = None
    """The objective's own settings, from the table of its name."""

    def __post_init__(self) -> None:
        Stage.__post_init__(self)
        one_of("train.val_labels", self.val_labels, ("noisy", "clean"))


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

    def __post_init__(self) -> None:
        one_of("export.checkpoint", self.checkpoint, ("best", "last"))
        ordered = len(self.profile) == 3 and 1 <= self.profile[0] <= self.profile[1] <= self.profile[2]
        require(ordered, "export.profile", list(self.profile), "three rising batch sizes such as [1, 8, 64]")
        require(self.tolerance > 0, "export.tolerance", self.tolerance, "above 0")


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


def load(
    recipe: str | None = None, settings: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> Config:
    """Defaults, then the recipe, then `section.name=value` settings, then flags that are not None.

    Args:
        recipe: a TOML file, or the name of a recipe that comes with noisyssl.
        flags: dotted setting -> value, for the command line's own options.

    Raises:
        ConfigError: unknown or wrong settings, all of them in one message.
    """
    tree = read_recipe(recipe) if recipe else {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting!r} has no '='; write --set section.name=value.")
        assign(tree, name.strip(), literal(text.strip()))
    for name, value in (flags or {}).items():
        if value is not None:
            assign(tree, name, value)
    return parse(tree)


def read_recipe(recipe: str) -> dict[str, Any]:
    """The TOML tree of a file, or of a recipe that comes with noisyssl."""
    path = Path(recipe)
    shipped = {f.name.removesuffix(".toml"): f for f in (resources.files("noisyssl") / "recipes").iterdir()}
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif path.suffix == ".toml":
        raise ConfigError(
            f"recipe {recipe} does not exist; give a TOML file or one of {', '.join(sorted(shipped))}."
        )
    else:
        text = pick(shipped, recipe, "recipe").read_text(encoding="utf-8")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {recipe} is not TOML: {error}. Correct that line.") from None


def literal(text: str) -> Any:
    """`text` as a TOML value; what is none is a string, so quotes may be left out."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, name = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {dotted} goes below {section!r}, which is a value and not a section.")
    tree[name] = value


def parse(tree: dict[str, Any]) -> Config:
    """The Config of a TOML tree.

    Raises:
        ConfigError: every unknown or wrong setting.
    """
    from noisyssl.methods import METHODS
    from noisyssl.objectives import OBJECTIVES

    tree = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    owners = {
        "pretrain": ("method", {name: method.Config for name, method in METHODS.items()}),
        "train": ("objective", {name: config for name, (_, config) in OBJECTIVES.items()}),
    }
    errors: list[str] = []
    for section, (chooser, kinds) in owners.items():
        given = tree.get(section, {})
        if not isinstance(given, dict):
            continue  # reported by build
        chosen = given.get(chooser, "simclr" if section == "pretrain" else "ce")
        try:
            pick(kinds, chosen, chooser)
        except ConfigError as error:
            errors.append(str(error))
            continue
        tables = {name: given.pop(name) for name in list(given) if name in kinds}
        built = {
            name: build(kinds[name], table, f"{section}.{name}", errors) for name, table in tables.items()
        }
        given["options"] = built.get(chosen) or kinds[chosen]()
        tree[section] = given
    config = build(Config, tree, "", errors)
    if errors:
        raise ConfigError(" ".join(errors))
    assert config is not None
    return config


def build(kind: Any, tree: Any, where: str, errors: list[str]) -> Any:
    """`kind(**tree)` with every name and type checked; problems go to `errors`."""
    if not isinstance(tree, dict):
        errors.append(f"{where} is {tree!r}; it must be a section with settings.")
        return None
    known = {f.name: f for f in fields(kind)}
    types = get_type_hints(kind)
    values: dict[str, Any] = {}
    before = len(errors)
    for name, value in tree.items():
        dotted = f"{where}.{name}" if where else name
        if name not in known or (name == "options" and isinstance(value, dict)):
            choices = [n for n in known if n != "options"]
            hint = near_miss(name, choices) or f" Known: {', '.join(choices)}."
            errors.append(f"setting {dotted} is unknown.{hint}")
        elif is_dataclass(types[name]):
            values[name] = build(types[name], value, dotted, errors)
        else:
            values[name] = coerce(types[name], value, dotted, errors)
    if len(errors) > before:
        return None
    try:
        return kind(**values)
    except ConfigError as error:
        errors.append(str(error))
        return None


def coerce(kind: Any, value: Any, where: str, errors: list[str]) -> Any:
    """`value` as `kind`; a whole number serves as float, a list or comma-separated text as tuple."""
    if kind is Any or (get_origin(kind) is UnionType and value is None):
        return value
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if isinstance(value, str):
            value = [literal(part.strip()) for part in value.split(",") if part.strip()]
        if isinstance(value, list | tuple):
            return tuple(coerce(inner, item, where, errors) for item in value)
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
        return value
    elif kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    name = (
        "a list"
        if get_origin(kind) is tuple
        else {int: "a whole number", float: "a number", bool: "true or false"}
    )
    wanted = name if isinstance(name, str) else name.get(kind, "text")
    errors.append(f"{where} is {value!r}; it must be {wanted}.")
    return value


def tree_of(config: Config) -> dict[str, Any]:
    """The TOML tree that `parse` turns back into `config`."""
    tree = asdict(config)
    for section, chooser in (("pretrain", "method"), ("train", "objective")):
        options = tree[section].pop("options")
        if options:
            tree[section][tree[section][chooser]] = options
    tree["export"] = {k: list(v) if isinstance(v, tuple) else v for k, v in tree["export"].items()}
    return tree


def differences(saved: Config, asked: Config) -> list[str]:
    """`section.name: saved -> asked` of each setting that differs."""
    return [
        f"{name}: {old} -> {new}"
        for (name, old), (_, new) in zip(_flat(tree_of(saved)), _flat(tree_of(asked)), strict=False)
        if old != new
    ]


def _flat(tree: Mapping[str, Any], where: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for name, value in sorted(tree.items()):
        out += _flat(value, f"{where}{name}.") if isinstance(value, dict) else [(where + name, value)]
    return out
