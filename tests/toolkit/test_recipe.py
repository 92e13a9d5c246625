import tomllib

import pytest
import tomli_w

from noisyssl.config import AutoBatch, Config, TrainConfig
from noisyssl.errors import ConfigError
from noisyssl.losses import LOSSES
from noisyssl.recipe import coerce, differences, load, parse, tree_of


def test_order_is_defaults_recipe_settings_flags(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("seed = 1\n[train]\nepochs = 2\nbatch = 3\nlr = 1\n[train.gce]\nq = 0.5\n")
    config = load(
        str(recipe), ["train.batch=4", "train.objective=gce"], {"train.epochs": 5, "data.size": None}
    )
    assert (config.seed, config.train.epochs, config.train.batch) == (1, 5, 4)
    assert config.train.lr == 1.0
    assert isinstance(config.train.lr, float)
    assert config.train.options == LOSSES["gce"].Config(q=0.5)
    assert config.data.size == Config().data.size


def test_what_follows_from_another_run_is_weaker_than_anything_that_was_said(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[data]\nsize = 48\n")
    start = {"backbone": "resnet34", "stem": "small", "data.size": 32}
    config = load(str(recipe), ["backbone=resnet50"], {}, start)
    assert (config.backbone, config.stem, config.data.size) == ("resnet50", "small", 48)
    assert load(None, [], {"data.size": 64}, start).data.size == 64
    assert load(None, [], {"data.size": None}, start).data.size == 32


def test_a_recipe_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"r\.toml is no text in UTF-8"):
        load(str(tmp_path / "r.toml"))


def test_settings_need_no_quotes():
    config = load(None, ["train.noise=symmetric:0.4", "data.quarantine=true", "export.tensorrt=SM86, SM120"])
    assert config.train.noise == "symmetric:0.4"
    assert config.data.quarantine is True
    assert config.export.tensorrt == ("SM86", "SM120")
    assert load(None, ["export.tensorrt="]).export.tensorrt == ()


def test_a_config_survives_its_file():
    config = load(None, ["train.objective=gce", "train.gce.q=0.3", "pretrain.method=rotation", "seed=7"])
    again = parse(tomllib.loads(tomli_w.dumps(tree_of(config))))
    assert again == config
    assert differences(config, again) == []
    assert "seed: 7 -> 8" in differences(config, load(None, ["seed=8"]))


def test_differences_sees_settings_of_another_objective():
    ce, gce = load(None, []), load(None, ["train.objective=gce"])
    assert "train.objective: ce -> gce" in differences(ce, gce)
    assert "train.gce.q: unset -> 0.7" in differences(ce, gce)


def test_a_batch_of_auto_keeps_the_number_that_the_learning_rate_belongs_to(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[train]\nbatch = 512\nlr = 0.4\n")
    for config in (load(str(recipe), ["train.batch=auto"]), load(str(recipe), [], {"train.batch": "auto"})):
        assert isinstance(config.train.batch, AutoBatch)
        assert config.train.batch == 512
    recipe.write_text('[train]\nbatch = "auto"\n')
    config = load(str(recipe), ["pretrain.batch=auto"])
    assert (config.train.batch, config.pretrain.batch) == (Config().train.batch, Config().pretrain.batch)
    assert isinstance(config.train.batch, AutoBatch)
    assert isinstance(config.pretrain.batch, AutoBatch)
    assert isinstance(parse(tree_of(config)).train.batch, AutoBatch)
    config = load(str(recipe), ["train.batch=64"])  # a number that comes later is a number again
    assert type(config.train.batch) is int


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.epoch=3"], r"train\.epoch is unknown\. Did you mean 'epochs'\?"),
        (["trian.epochs=3"], r"setting trian is unknown\. Did you mean 'train'\?"),
        (["train.epochs=three"], r"train\.epochs is 'three'; it must be a whole number"),
        (["train.batch=none"], r"train\.batch is 'none'; it must be a whole number or auto"),
        (["train.batch=1.5"], r"train\.batch is 1\.5; it must be a whole number or auto"),
        (["train.batch=true"], r"train\.batch is True; it must be a whole number or auto"),
        (["pretrain.batch=0"], r"pretrain\.batch is 0; it must be at least 1, or auto"),
        (["train.epochs=0"], r"train\.epochs is 0; it must be at least 1"),
        (["train.objective=gcee"], r"objective 'gcee' is unknown.*Did you mean 'gce'\?"),
        (["pretrain.method=simlcr"], r"method 'simlcr' is unknown.*Did you mean 'simclr'\?"),
        (["pretrain.simclr.temperature=0"], r"pretrain\.simclr\.temperature is 0\.0"),
        (["train.gce.q=2"], r"train\.gce\.q is 2\.0"),
        (["data.fit=corp"], r"data\.fit is 'corp'; choose one of .* Did you mean 'crop'\?"),
        (["export.profile=8,1,64"], r"export\.profile is \[8, 1, 64\]"),
        (["export.profile=a"], r"export\.profile is 'a'; it must be a whole number"),
        (["seed=-1"], r"seed is -1"),
        (["seed=true"], r"seed is True; it must be a whole number"),
        (["seed.x=1"], r"seed is \{'x': 1\}; it must be a whole number"),
        (["seed"], r"has no '='"),
        (["train.lr=inf"], r"train\.lr is inf; it must be a number above 0"),
        (["train.weight_decay=inf"], r"train\.weight_decay is inf"),
        (["train=1"], r"train is 1; it must be a section"),
        (["size=32"], r"setting size is unknown\. Known: seed, .*, data\.NAME, "),
    ],
)
def test_a_wrong_setting_names_itself_and_what_is_allowed(settings, message):
    with pytest.raises(ConfigError, match=message):
        load(None, settings)


def test_all_errors_come_at_once():
    with pytest.raises(ConfigError) as caught:
        load(None, ["train.epochs=0", "data.fit=x", "seed=y"])
    assert all(name in str(caught.value) for name in ("train.epochs", "data.fit", "seed"))


def test_a_wrong_method_does_not_make_the_tables_of_the_others_wrong():
    with pytest.raises(ConfigError) as caught:
        load("small", ["pretrain.method=simlcr"])
    assert str(caught.value).endswith("Did you mean 'simclr'?")


def test_recipes_that_come_with_the_package_are_valid():
    for name in ("demo", "small"):
        assert isinstance(load(name).train, TrainConfig)
    with pytest.raises(ConfigError, match=r"recipe 'dmo' is unknown.*Did you mean 'demo'"):
        load("dmo")
    with pytest.raises(ConfigError, match=r"recipe nowhere\.toml does not exist"):
        load("nowhere.toml")


def test_a_broken_recipe_names_the_line(tmp_path):
    (tmp_path / "r.toml").write_text("seed = 1\nseed = = 2\n")
    with pytest.raises(ConfigError, match=r"is not TOML.*line 2"):
        load(str(tmp_path / "r.toml"))


def test_true_is_no_number():
    errors: list[str] = []
    coerce(int, True, "x", errors)
    coerce(float, True, "y", errors)
    assert len(errors) == 2


def test_the_example_recipe_is_valid():
    from pathlib import Path

    config = load(str(Path(__file__).parents[2] / "examples" / "recipe.toml"))
    assert config.train.options == LOSSES["gce"].Config(q=0.7)
    assert config.pretrain.optimizer == "lars"
