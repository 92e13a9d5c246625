"""The worked example of docs/adding_a_method.md is a method: its contract, its formula, and one run of it."""

import importlib.util
import inspect
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from noisyssl.cli import run
from noisyssl.methods import METHODS

ROOT = Path(__file__).parents[1]


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The class of the page's Python block, in the table of methods by the page's line."""
    page = (ROOT / "docs/adding_a_method.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) < 80
    name, kind = re.search(r'"(\w+)": (\w+),', page).groups()
    file = tmp_path / f"{name}.py"
    file.write_text(code)
    monkeypatch.setitem(sys.modules, f"example_{name}", None)
    method = getattr(load(f"example_{name}", file), kind)
    monkeypatch.setitem(METHODS, name, method)
    return name, method


def test_it_keeps_the_contract_of_every_method(example):
    name, _ = example
    contract = load("contract_of_methods", ROOT / "tests/toolkit/test_methods.py")
    tests = [
        test for title, test in vars(contract).items()
        if title.startswith("test_") and list(inspect.signature(test).parameters) == ["name"]
    ]  # fmt: skip
    assert len(tests) >= 8
    for test in tests:
        test(name)


def test_it_is_the_papers_formula(example):
    _, kind = example
    torch.manual_seed(0)
    first, second = torch.randn(5, 4), torch.randn(5, 4)
    method = kind.__new__(kind)
    torch.nn.Module.__init__(method)
    method.temperature, method.projector = 0.3, None
    method.embed = lambda head, views: (first, second)
    loss = method.forward(type("Batch", (), {"views": ()})())["loss"].item()
    z = {0: [row / row.norm() for row in first], 1: [row / row.norm() for row in second]}
    total = 0.0
    for k in (0, 1):
        for i in range(5):
            others = [float(z[k][i] @ z[side][j]) / 0.3 for side in (0, 1) for j in range(5) if j != i]
            total += math.log(sum(map(math.exp, others))) - float(z[k][i] @ z[1 - k][i]) / 0.3
    assert loss == pytest.approx(total / 10, rel=1e-5)


def test_it_pretrains_from_the_command_line(example, tissue, tmp_path):
    name, _ = example
    small = ("data.size=32", "pretrain.epochs=1", "pretrain.batch=64", f"pretrain.{name}.width=16")
    settings = [word for one in small for word in ("--set", one)]
    out = tmp_path / "run"
    assert (
        run(["pretrain", str(tissue), "--method", name, "--out", str(out), "--recipe", "small", *settings])
        == 0
    )
    assert (out / "metrics.json").is_file()
    assert f"[pretrain.{name}]" in (out / "config.toml").read_text()
