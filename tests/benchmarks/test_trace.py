import json

import pytest
import torch

from noisyssl.benchmarks.trace import traced
from noisyssl.cli import run
from noisyssl.errors import MachineError


def test_the_trace_is_chromes_and_the_table_names_what_took_longest(tmp_path):
    left, right = torch.randn(600, 600), torch.randn(600, 600)
    table = traced(lambda: left @ right + 1, tmp_path / "new" / "trace.json", steps=2)
    assert json.loads((tmp_path / "new" / "trace.json").read_text())["traceEvents"]
    first = table.splitlines()[1].split()
    assert first[0] in ("aten::mm", "aten::addmm", "aten::matmul")
    assert float(first[-1]) == 1.0  # calls a step


def test_a_trace_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"trace\.json cannot be written.*Name another file"):
        traced(lambda: torch.ones(2), tmp_path / "file" / "trace.json")


def test_the_command_writes_it(tmp_path, capsys):
    path = tmp_path / "trace.json"
    assert not run(
        ["bench", "step", "--method", "simclr", "--batch", "8", "--runs", "1", "--profile", str(path)]
    )
    assert path.exists()
    assert "operator" in capsys.readouterr().err
