"""From a recipe (TOML) and the command line to a `Config`, and back into a run's `config.toml`."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from noisyssl.config import AutoBatch, Config
from noisyssl.errors import ConfigError, near_miss, pick


def load(
    recipe: str | None = None,
    settings: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | None = None,
) -> Config:
    """Defaults, `start`, then the recipe, `section.name=value` settings, and flags that are not None.

    Args:
        start: dotted setting -> value, for what follows from another run.
        recipe: a TOML file, or the name of a recipe that comes with noisyssl.
        flags: dotted setting -> value, for the command line's own options.

    Raises:
        ConfigError: unknown or wrong settings, all of them in one message.
    """
    tree: dict[str, Any] = {}
    for name, value in (start or {}).items():
        assign(tree, name, value)
    override(tree, recipe, settings, flags or {})
    return parse(tree)


def override(
    tree: dict[str, Any], recipe: str | None, settings: Iterable[str], flags: Mapping[str, Any]
) -> None:
    """Put what a command line says over `tree`: the recipe, the settings, the flags that are not None."""
    merge(tree, read_recipe(recipe) if recipe else {})
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting!r} has no '='; write --set section.name=value.")
        assign(tree, name.strip(), literal(text.strip()))
    for name, value in flags.items():
        if value is not None:
            assign(tree, name, value)


def read_recipe(recipe: str) -> dict[str, Any]:
    """The TOML tree of a file, or of a recipe that comes with noisyssl."""
    path = Path(recipe)
    shipped = {f.name.removesuffix(".toml"): f for f in (resources.files("noisyssl") / "recipes").iterdir()}
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"recipe {recipe} is no text in UTF-8; give a TOML file.") from None
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


def merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Put what `other` sets over what `tree` sets."""
    for name, value in other.items():
        if isinstance(value, dict) and isinstance(tree.setdefault(name, {}), dict):
            merge(tree[name], value)
        else:
            tree[name] = value


def assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set it; a batch of auto keeps the number it takes the place of, which the learning rate belongs to."""
    *sections, name = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {dotted} goes below {section!r}, which is a value and not a section.")
    if name == "batch" and value == "auto" and isinstance(number := tree.get(name), int):
        value = AutoBatch(number)
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
        if given.get("batch") == "auto":
            given["batch"] = AutoBatch(getattr(Config(), section).batch)
        chosen = given.get(chooser, "simclr" if section == "pretrain" else "ce")
        tables = {name: given.pop(name) for name in list(given) if name in kinds}
        try:
            pick(kinds, str(chosen), chooser)
        except ConfigError as error:
            errors.append(str(error))
            continue
        built = {
            name: build(kinds[name], table, f"{section}.{name}", errors) for name, table in tables.items()
        }
        given["options"] = built.get(str(chosen)) or kinds[str(chosen)]()
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
            shown = (f"{n}.NAME" if is_dataclass(types[n]) else n for n in choices)
            hint = near_miss(name, choices) or f" Known: {', '.join(shown)}."
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
    if kind is Any:
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
        if isinstance(value, str) and value.encode(errors="replace").decode() != value:
            errors.append(f"{where} is {value!r}; it must be valid UTF-8. Rename that file or folder.")
        return value
    elif kind is str and isinstance(value, bool):
        return "on" if value else "off"
    elif kind is str and isinstance(value, int | float):
        return str(value)
    name = (
        "a list"
        if get_origin(kind) is tuple
        else {
            int: "a whole number",
            int | AutoBatch: "a whole number or auto",
            float: "a number",
            bool: "true or false",
        }
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
    old, new = dict(_flat(tree_of(saved))), dict(_flat(tree_of(asked)))
    return [
        f"{name}: {old.get(name, 'unset')} -> {new.get(name, 'unset')}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]


def _flat(tree: Mapping[str, Any], where: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for name, value in sorted(tree.items()):
        out += _flat(value, f"{where}{name}.") if isinstance(value, dict) else [(where + name, value)]
    return out
