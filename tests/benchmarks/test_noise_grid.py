"""Grids: what they expand to, and what is refused by name."""

import pytest

from noisyssl.benchmarks.noise_grid import GRIDS, Cell, read_grid, spec_of
from noisyssl.errors import ConfigError

PLAIN = """
recipe = "small"
seeds = [0, 1]
[settings.train]
epochs = 3
[[grid]]
pretraining = ["random", "simclr"]
objective = ["ce", "frozen"]
noise = ["symmetric", "pair"]
rate = [0, 0.4]
"""


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "mine.toml").write_text(text)
        return str(tmp_path / "mine.toml")

    return write


def test_every_combination_is_one_cell_and_clean_labels_are_shared_by_the_kinds(written):
    grid = read_grid(written(PLAIN))
    assert len(grid.cells) == 2 * 2 * 2 * 3  # seeds, starts, objectives; none, symmetric:0.4, pair:0.4
    assert len({cell.name for cell in grid.cells}) == len(grid.cells)
    assert {cell.noise for cell in grid.cells} == {"none", "symmetric:0.4", "pair:0.4"}
    assert [cell.seed for cell in grid.cells[:12]] == [0] * 12  # a table over one seed comes first


def test_a_cell_is_its_settings(written, tmp_path):
    grid = read_grid(written(PLAIN), data=tmp_path)
    cell = Cell(pretraining="simclr", objective="frozen", noise="pair:0.4", seed=1)
    config = grid.config(cell, tmp_path / "start")
    assert (config.seed, config.train.noise_seed, config.train.noise) == (1, 1, "pair:0.4")
    assert (config.train.objective, config.train.tune) == ("ce", "head")
    assert config.pretrain.method == "simclr"
    assert config.train.init == str(tmp_path / "start")
    assert config.data.path == str(tmp_path)
    assert config.train.epochs == 3
    plain = grid.config(Cell(pretraining="random", objective="ce", noise="none", seed=0))
    assert (plain.train.tune, plain.train.init) == ("all", "")


def test_an_objective_of_ones_own_is_settings_of_train(written):
    text = PLAIN.replace('"frozen"', '"patient"') + '[variants.patient]\nobjective = "elr"\nlr = 0.5\n'
    grid = read_grid(written(text))
    config = grid.config(Cell(pretraining="random", objective="patient", noise="none", seed=0))
    assert (config.train.objective, config.train.lr) == ("elr", 0.5)


@pytest.mark.parametrize(
    ("kind", "rate", "spec"),
    [
        ("symmetric", 0.2, "symmetric:0.2"),
        ("symmetric:0.3", None, "symmetric:0.3"),
        ("pair", 0, "none"),
        ("instance:runs/a", 0.3, "instance:0.3:runs/a"),
        ("none", None, "none"),
    ],
)
def test_noise_and_rate_make_what_the_command_line_takes(kind, rate, spec):
    assert spec_of(kind, rate, "g") == spec


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("objective =", "objectiv =", r"'objectiv' is unknown; .*Did you mean 'objective'\?"),
        ("[[grid]]", "[[gird]]", r"'gird' is unknown; .*Did you mean 'grid'\?"),
        ('"frozen"', '"frozne"', r"objective 'frozne' is unknown; .*Did you mean 'frozen'\?"),
        ('"simclr"', '"simlcr"', r"pretraining 'simlcr' is unknown; .*Did you mean 'simclr'\?"),
        ('"pair"', '"pairs"', r"pairs"),
        ("0.4]", "1.4]", r"rate 1\.4 is not in 0 to 1"),
        ("[0, 1]", "[0, -1]", r"seed -1 is no whole number"),
        ("[0, 1]", "[]", r"seeds is an empty list"),
        ("epochs = 3", "epochz = 3", r"epochz.*Did you mean"),
        (
            "rate = [0, 0.4]",
            'rate = [0, 0.4]\n[export]\nobjective = ["gce"]',
            r"names objective 'gce', but no",
        ),
        ("rate = [0, 0.4]", "rate = [0, 0.4", r"is not TOML"),
    ],
)
def test_a_typo_is_named_with_its_near_miss(written, old, new, message):
    with pytest.raises(ConfigError, match=message):
        read_grid(written(PLAIN.replace(old, new)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("recipe = 3", r"recipe is 3; write it as recipe = \"small\"\."),
        ("settings = 3", r"settings is 3; write it as \[settings\]\."),
        ("variants = []", r"variants is \[\]; write it as \[variants\.NAME\]\."),
        ("variants = { own = 3 }", r"own is 3; write it as a table of settings\."),
        ("export = 'ce'", r"export is 'ce'; write it as \[export\]\."),
        ("grid = [3]", r"\[\[grid\]\] is 3; write it as a table of settings\."),
        ("seeds = 'one'", r"seed 'one' is no whole number"),
        ("settings = { train = 3 }", r"train is 3; write it as \[settings\.train\]\."),
        ("grid = [{ objective = 3 }]", r"objective holds 3; write objective ="),
        ("grid = [{ objective = [['ce']] }]", r"objective holds \['ce'\]; write"),
        ("grid = [{ pretraining = [1] }]", r"pretraining holds 1; write"),
        ("export = { precision = 3 }", r"precision holds 3; write"),
    ],
)
def test_a_value_of_another_type_is_one_line(written, line, message):
    grid = "" if line.startswith("grid") else "[[grid]]\nobjective = ['ce']\nnoise = ['none']\n"
    with pytest.raises(ConfigError, match=message):
        read_grid(written(f"{line}\n{grid}"))


def test_a_grid_without_cells_and_a_missing_file_say_what_to_do(written):
    with pytest.raises(ConfigError, match=r"has no \[\[grid\]\]; add one"):
        read_grid(written('recipe = "small"\n'))
    with pytest.raises(
        ConfigError, match=r"missing\.toml does not exist; give a TOML file or one of .*small"
    ):
        read_grid("missing.toml")
    with pytest.raises(ConfigError, match=r"grid 'smal-xray' is unknown; .*Did you mean 'small-xray'\?"):
        read_grid("smal-xray")


def test_exported_are_the_named_cells_of_the_first_seed(written):
    grid = read_grid(written(PLAIN + '[export]\nobjective = ["ce"]\nprecision = ["fp32", "int8"]\n'))
    assert {(cell.objective, cell.seed) for cell in grid.exported} == {("ce", 0)}
    assert len(grid.exported) == 6
    assert grid.precisions == ("fp32", "int8")


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_grid_is_valid(path):
    grid = read_grid(path.stem)
    assert grid.cells
    assert path.read_text().startswith("# ")


def test_a_variant_changes_no_other_cell(written):
    text = PLAIN.replace('"frozen"', '"elr", "strong"')
    text = text.replace("[[grid]]", "[settings.train.elr]\nstrength = 3.0\n[[grid]]")
    grid = read_grid(written(text + '[variants.strong]\nobjective = "elr"\nelr = { strength = 9.0 }\n'))

    def strength(objective: str) -> float:
        cell = Cell(pretraining="random", objective=objective, noise="none", seed=0)
        return grid.config(cell).train.options.strength

    assert (strength("strong"), strength("elr"), strength("strong")) == (9.0, 3.0, 9.0)


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ('precision = ["int9"]', r"precision 'int9' is unknown; .*Did you mean 'int8'\?"),
        ('noise = ["symmetric"]', r"names noise 'symmetric', but no cell has it; those are .*symmetric:0\.4"),
        ("seeds = [7]", r"names no cell"),
    ],
)
def test_an_export_that_cannot_be_is_refused_before_anything_trains(written, export, message):
    with pytest.raises(ConfigError, match=message):
        read_grid(written(PLAIN + f"[export]\n{export}\n"))
