"""Every command of the README runs, with a data set in place of DATA; its tables come from the records."""

import re
import shlex
from pathlib import Path

import pytest

from noisyssl.benchmarks.tables import main as tables
from noisyssl.cli import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
QUICK = {  # what makes a command short enough for a test; the command itself stays as it is printed
    "pretrain": ["--set", "pretrain.epochs=1", "--set", "pretrain.batch=64"],
    "train": ["--epochs", "1"],
    "build": ["--set", "pretrain.epochs=1", "--set", "pretrain.batch=64", "--set", "train.epochs=1"],
}


def commands() -> list[str]:
    """Lines of the shell blocks and inline code that start with `noisyssl`, in the order of the page."""
    found = []
    for block, inline in re.findall(r"```bash\n(.*?)```|`(noisyssl [^`]+)`", README, re.DOTALL):
        found += [line.partition("#")[0].strip() for line in (block or inline).splitlines()]
    return [line for line in dict.fromkeys(found) if line.startswith("noisyssl ") and "COMMAND" not in line]


def test_the_readme_has_commands():
    assert len(commands()) >= 10
    assert {line.split()[1] for line in commands()} >= {
        "data",
        "build",
        "pretrain",
        "train",
        "export",
        "predict",
    }


def test_every_command_of_the_readme_runs(tissue, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "DATA": str(tissue), "EXTERNAL": str(tissue), "IMAGES": str(tissue.parent / "images" / "adipose"),
        "RUN": "runs/gce", "BUNDLE": "bundles/gce", "NEW.csv": str(tissue.parent / "audited.csv"),
    }  # fmt: skip
    done = 0
    for line in sorted(commands(), key=lambda line: "evaluate BUNDLE" in line):
        arguments = [names.get(word, word) for word in shlex.split(line)[1:]]
        if arguments[:1] in (["build"], ["evaluate"]) and len(arguments) == 1:
            continue  # named in a sentence, not given as a command
        assert run([*arguments, *QUICK.get(arguments[0], [])]) == 0, line
        done += 1
    assert done >= 10
    assert (tmp_path / "OUT" / "report.html").is_file()
    assert (tmp_path / "bundles" / "gce" / "manifest.json").is_file()


def test_the_demonstration_in_miniature(tmp_path, capsys):
    small = ("data.size=32", "pretrain.epochs=1", "pretrain.batch=64", "train.epochs=2")
    settings = [part for setting in small for part in ("--set", setting)]
    assert run(["demo", str(tmp_path / "demo"), "--count", "270", *settings]) == 0
    shown = capsys.readouterr().out
    for word in ("self-supervised", "random", "BEST", "LAST", "colour histogram", "bundle", "report"):
        assert word in shown
    assert list((tmp_path / "demo" / "bundle" / "engines").glob("*.plan"))
    assert run(["demo", str(tmp_path / "demo")]) == 2


def test_the_tables_are_those_of_the_records():
    with pytest.raises(SystemExit) as exit_:
        raise SystemExit(tables(["--check"]))
    assert not exit_.value.code


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\]\(([^)#:]+)\)|`((?:docs|benchmarks|examples)/[^`]*)`", README)))
)
def test_paths_named_in_the_readme_exist(target):
    name = "".join(target)
    assert (ROOT / name).exists(), name
