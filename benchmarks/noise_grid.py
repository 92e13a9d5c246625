"""The grid of `noisyssl bench noise`: a TOML file that says which cells to train.

recipe = "small"                          # where settings start; may be left out
data = "manifest.csv"                     # or --data
seeds = [0, 1, 2]
[settings]                                # over the recipe, as in any recipe
[variants.patient]                        # an objective's name of your own: settings of [train]
objective = "elr"
[[grid]]                                  # every combination is a cell; as many grids as you like
pretraining = ["random", "simclr"]
objective = ["ce", "gce", "frozen", "patient"]
noise = ["symmetric", "pair"]
rate = [0.2, 0.4]
[export]                                  # these cells also become bundles that are measured
objective = ["ce"]
precision = ["fp32", "int8"]
"""

import copy
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from noisyssl import noise as noises
from noisyssl.config import Config
from noisyssl.errors import ConfigError, near_miss, pick
from noisyssl.methods import METHODS
from noisyssl.objectives import OBJECTIVES
from noisyssl.recipe import assign, merge, parse, read_recipe

RANDOM = "random"
"""The pretraining that is none."""
GRIDS = Path(__file__).with_name("grids")
VARIANTS: dict[str, dict[str, Any]] = {"frozen": {"objective": "ce", "tune": "head", "lr": 1e-2}}
"""Objectives that are settings of `train`: the backbone stays, cross-entropy fits the head."""
KEYS: dict[str, tuple[type, str]] = {
    "recipe": (str, 'recipe = "small"'),
    "data": (str, 'data = "manifest.csv"'),
    "seeds": (object, "seeds = [0, 1]"),
    "settings": (dict, "[settings]"),
    "variants": (dict, "[variants.NAME]"),
    "grid": (list, "[[grid]]"),
    "export": (dict, "[export]"),
}
"""What stands at the top of a grid: its type, and how it is written."""
AXES = ("pretraining", "objective", "noise", "rate", "seeds")
EXPORT = ("pretraining", "objective", "noise", "seeds", "precision")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Cell:
    """One training."""

    noise: str
    objective: str
    pretraining: str
    seed: int

    @property
    def name(self) -> str:
        """What its folder is called."""
        noise = re.sub(r"[^A-Za-z0-9.]+", "-", self.noise).strip("-.")
        return f"{self.pretraining}-{self.objective}-{noise}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All cells, and what their configurations are made of."""

    name: str
    tree: dict[str, Any]
    """Settings that all cells share."""
    variants: dict[str, dict[str, Any]]
    cells: tuple[Cell, ...]
    exported: tuple[Cell, ...]
    precisions: tuple[str, ...]

    def config(self, cell: Cell, init: Path | None = None) -> Config:
        """The configuration of a cell; `init` is its pretraining run."""
        tree = copy.deepcopy(self.tree)
        merge(tree.setdefault("train", {}), self.variants.get(cell.objective, {"objective": cell.objective}))
        tree["train"] |= {"noise": cell.noise, "noise_seed": cell.seed, "init": str(init or "")}
        tree["seed"] = cell.seed
        if cell.pretraining != RANDOM:
            assign(tree, "pretrain.method", cell.pretraining)
        return parse(tree)


def read_grid(source: str, data: Path | None = None, threads: int | None = None) -> Grid:
    """The grid of a TOML file, or one that comes with noisyssl.

    Raises:
        ConfigError: no such file, a typo in it, an unknown name, or two cells with the same folder.
    """
    shipped = {path.stem: path for path in sorted(GRIDS.glob("*.toml"))}
    path = Path(source)
    if not path.is_file():
        if path.suffix == ".toml":
            raise ConfigError(
                f"grid {source} does not exist; give a TOML file or one of {', '.join(shipped)}."
            )
        path = pick(shipped, source, "grid")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"grid {path.name} is not TOML: {error}. Correct that line.") from None
    known(given, tuple(KEYS), path.name)
    for key, value in given.items():
        if not isinstance(value, KEYS[key][0]):
            raise ConfigError(f"{path.name}: {key} is {value!r}; write it as {KEYS[key][1]}.")
    variants = VARIANTS | given.get("variants", {})
    for name, table in [*variants.items(), *(("[[grid]]", table) for table in given.get("grid", []))]:
        if not isinstance(table, dict):
            raise ConfigError(f"{path.name}: {name} is {table!r}; write it as a table of settings.")
    tree = read_recipe(given["recipe"]) if "recipe" in given else {}
    merge(tree, given.get("settings", {}))
    for name in ("data", "pretrain", "train"):
        if not isinstance(tree.get(name, {}), dict):
            raise ConfigError(f"{path.name}: {name} is {tree[name]!r}; write it as [settings.{name}].")
    if place := data or (Path(given["data"]) if given.get("data") else None):
        assign(tree, "data.path", str(place.absolute()))
    if threads:
        tree["threads"] = threads
    seeds = listed(given.get("seeds", [0]), "seeds", path.name, object)
    tables = given.get("grid")
    if not isinstance(tables, list) or not tables:
        raise ConfigError(f"{path.name} has no [[grid]]; add one with objective = [...] and noise = [...].")
    cells = tuple(
        dict.fromkeys(cell for table in tables for cell in expand(table, variants, seeds, path.name))
    )
    if len({cell.name for cell in cells}) < len(cells):
        raise ConfigError(
            f"{path.name} has two noises whose folders would have one name; rename a file of them."
        )
    exported, precisions = chosen(given.get("export"), cells, path.name)
    grid = Grid(
        name=path.stem, tree=tree, variants=variants, cells=cells, exported=exported, precisions=precisions
    )
    for cell in cells:
        grid.config(cell)  # a wrong setting is said now
    return grid


def expand(table: Mapping[str, Any], variants: Mapping[str, Any], seeds: list[Any], where: str) -> list[Cell]:
    """The cells of one [[grid]]."""
    known(table, AXES, f"{where}, [[grid]]")
    pretraining = listed(table.get("pretraining", [RANDOM]), "pretraining", where)
    objectives = listed(table.get("objective", ["ce"]), "objective", where)
    for name in pretraining:
        pick({RANDOM: None, **METHODS}, name, f"{where}: pretraining")
    for name in objectives:
        pick({**OBJECTIVES, **variants}, name, f"{where}: objective")
    own = listed(table.get("seeds", seeds), "seeds", where, object)
    if wrong := [seed for seed in own if not isinstance(seed, int) or seed < 0]:
        raise ConfigError(
            f"{where}: seed {wrong[0]!r} is no whole number of 0 or above; write seeds = [0, 1]."
        )
    specs = [
        spec_of(kind, rate, where)
        for kind in listed(table.get("noise", ["none"]), "noise", where)
        for rate in listed(table.get("rate", [None]), "rate", where, object)
    ]
    return [
        Cell(pretraining=start, objective=objective, noise=spec, seed=seed)
        for seed, spec, objective, start in product(own, dict.fromkeys(specs), objectives, pretraining)
    ]


def spec_of(kind: str, rate: float | None, where: str) -> str:
    """KIND:RATE as `--noise` takes it; `none` at rate 0, whatever the kind."""
    if rate is not None and (
        isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1
    ):
        raise ConfigError(f"{where}: rate {rate!r} is not in 0 to 1; write rate = [0, 0.4].")
    if rate == 0:
        return "none"
    head, colon, rest = str(kind).partition(":")
    if rate is None:
        spec = str(kind)
    elif head == "instance" and colon:  # instance:RATE:RUN
        spec = f"{head}:{rate}:{rest}"
    else:
        spec = f"{kind}:{rate}"
    try:
        noises.parse(spec)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return spec


def chosen(
    table: Mapping[str, Any] | None, cells: tuple[Cell, ...], where: str
) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
    """The cells that [export] names, those of the first seed without `seeds`, and the precisions."""
    if table is None:
        return (), ()
    known(table, EXPORT, f"{where}, [export]")
    wanted = {name: set(listed(table[name], name, where)) for name in EXPORT[:3] if name in table}
    seeds = set(listed(table.get("seeds", [min(cell.seed for cell in cells)]), "seeds", where, int))
    for name, allowed in wanted.items():
        if strange := allowed - {getattr(cell, name) for cell in cells}:
            there = sorted({getattr(cell, name) for cell in cells})
            raise ConfigError(
                f"{where}: [export] names {name} {sorted(map(str, strange))[0]!r}, but no cell has it; "
                f"those are {', '.join(there)}."
            )
    precisions = listed(table.get("precision", ["fp32"]), "precision", where)
    for name in precisions:
        pick(dict.fromkeys(("fp32", "fp16", "int8")), name, f"{where}: precision")
    found = tuple(
        cell
        for cell in cells
        if cell.seed in seeds and all(getattr(cell, name) in allowed for name, allowed in wanted.items())
    )
    if not found:
        raise ConfigError(
            f"{where}: [export] names no cell of the grid; leave an axis out to take all of it."
        )
    return found, tuple(precisions)


def listed(value: Any, name: str, where: str, kind: type = str) -> list[Any]:
    """A list, of one value if it is none; all of one kind."""
    values = value if isinstance(value, list) else [value]
    if strange := [one for one in values if not isinstance(one, kind)]:
        raise ConfigError(f'{where}: {name} holds {strange[0]!r}; write {name} = ["...", "..."].')
    if not values:
        raise ConfigError(f"{where}: {name} is an empty list; name at least one, or leave it out.")
    return values


def known(table: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Raises ConfigError naming the near miss of a key that is none of `keys`."""
    for key in table:
        if key not in keys:
            raise ConfigError(
                f"{where}: {key!r} is unknown; choose one of {', '.join(keys)}.{near_miss(key, keys)}"
            )
