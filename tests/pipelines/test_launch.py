"""A pretraining of two processes as a user starts, stops, kills and resumes it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from noisyssl import checkpoint
from noisyssl.cli import run
from noisyssl.errors import TrainingError
from noisyssl.pipelines import launch

SETTINGS = [
    "--set", "backbone=resnet18-w16", "--set", "threads=1", "--size", "32", "--batch", "32", "--epochs", "4",
    "--set", "pretrain.checkpoint_minutes=0.001", "--set", "pretrain.log_every=1", "--device", "cpu",
]  # fmt: skip
CLI = [sys.executable, "-m", "noisyssl.cli"]


def start(out: Path, *arguments: object) -> "subprocess.Popen[str]":
    command = [*CLI, "pretrain", *map(str, arguments), "--out", str(out), "--nproc", "2"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def processes_of(launcher: "subprocess.Popen[str]") -> list[int]:
    """The process numbers of rank 0 and 1."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(v[5:]): child for v in variables if v.startswith(b"RANK=")}
    return [ranks[0], ranks[1]]


def after_a_checkpoint(launcher: "subprocess.Popen[str]", out: Path) -> list[int]:
    """Wait for the first checkpoint that this start wrote, then the processes of rank 0 and 1."""
    newest = checkpoints(out)[-1:]
    while checkpoints(out)[-1:] == newest:
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.02)
    return processes_of(launcher)


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("step-*.safetensors"))


def ending(launcher: "subprocess.Popen[str]", processes: list[int], out: Path) -> dict:
    """How it ended: code, seconds, error lines, processes still there."""
    began = time.monotonic()
    _, said = launcher.communicate(timeout=100)
    return {
        "code": launcher.returncode,
        "seconds": time.monotonic() - began,
        "errors": [line for line in said.splitlines() if "rror" in line],
        "left": [pid for pid in processes if Path(f"/proc/{pid}").exists()],
        "checkpoints": checkpoints(out),
    }


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def story(tissue, tmp_path_factory) -> dict:
    """One run by plain torchrun; another that SIGTERM and SIGKILL to rank 1 end, and that finishes."""
    folder = tmp_path_factory.mktemp("launch")
    whole, out = folder / "whole", folder / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    plain = ["-m", "noisyssl.cli", "pretrain", str(tissue), "--out", str(whole), *SETTINGS]
    found: dict = {"whole": whole, "run": out, "alone": folder / "alone"}
    first = subprocess.Popen([*torchrun, *plain], stderr=subprocess.DEVNULL)
    launcher = start(out, tissue, *SETTINGS)
    processes = after_a_checkpoint(launcher, out)
    os.kill(processes[1], signal.SIGTERM)
    found["stopped"] = ending(launcher, processes, out)
    shutil.copytree(out, found["alone"])
    launcher = start(out, "--resume")
    processes = after_a_checkpoint(launcher, out)
    os.kill(processes[1], signal.SIGKILL)
    found["killed"] = ending(launcher, processes, out)
    found["finished"] = run(["pretrain", "--out", str(out), "--resume", "--nproc", "2"])
    assert first.wait() == 0
    return found


def test_a_signal_to_one_process_checkpoints_and_ends_all(story):
    end = story["stopped"]
    assert end["code"] == 143
    assert end["errors"] == [
        "error: stopped by signal 15 after a checkpoint; the same command with --resume goes on."
    ]
    assert end["left"] == []
    assert end["checkpoints"]


def test_a_killed_process_ends_all_within_a_minute(story):
    end = story["killed"]
    assert end["code"] == 3
    assert end["errors"] == [
        "error: process 1 of 2 was ended by signal 9 (SIGKILL), and the others with it; "
        "the same command with --resume goes on."
    ]
    assert end["left"] == []
    assert end["seconds"] < 60


def test_what_was_stopped_and_killed_ends_with_the_same_bits(story):
    assert story["finished"] == 0
    names = [*checkpoints(story["whole"]), "last.safetensors"]
    assert checkpoints(story["run"])[-1] == names[-2]
    for name in names[-2:]:
        ours, theirs = (checkpoint.load(story[k] / "checkpoints" / name)[0] for k in ("run", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_one_process_writes_one_log(story):
    starts = [entry for entry in log(story["run"]) if entry["kind"] == "start"]
    assert [entry["processes"] for entry in starts] == [2, 2, 2]
    assert [bool(entry["resumed"]) for entry in starts] == [False, True, True]
    figures = [
        [(e["step"], e["loss"], e["agreement"]) for e in log(story[k]) if e["kind"] == "step"]
        for k in ("run", "whole")
    ]
    assert figures[0] == figures[1]
    assert [step for step, _, _ in figures[0]] == list(range(1, len(figures[0]) + 1))
    assert json.loads((story["run"] / "metrics.json").read_text())["processes"] == 2


def test_one_process_goes_on_with_what_two_began(story):
    """The same images in the same order: the loss goes on as it would have, but not to the last bit."""
    assert run(["pretrain", "--out", str(story["alone"]), "--resume"]) == 0
    entries = log(story["alone"])
    (warning,) = [entry["message"] for entry in entries if entry["kind"] == "warning"]
    assert warning.startswith("2 processes trained this run and 1 go on")
    ours, theirs = ([e for e in log(story[k]) if e["kind"] == "step"] for k in ("alone", "whole"))
    assert [e["step"] for e in ours] == [e["step"] for e in theirs]
    differ = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(ours, theirs, strict=True)]
    assert 0 < max(differ) < 0.01


@pytest.mark.parametrize("processes", [3])
def test_another_number_that_does_not_divide_the_batch_is_refused(story, processes, monkeypatch):
    from noisyssl.errors import ConfigError
    from noisyssl.pipelines import pretrain
    from noisyssl.pipelines.run import Run

    monkeypatch.setattr(pretrain, "world", lambda: processes)
    with pytest.raises(ConfigError, match=r"pretrain.batch is 32 over 3 processes.*to 30 or 33"):
        pretrain.must_divide(Run.open(story["run"]).config())


def test_a_number_of_processes_that_the_method_refuses_is_refused_on_resume_too(
    tissue, tmp_path, monkeypatch
):
    from noisyssl.errors import ConfigError
    from noisyssl.pipelines import pretrain
    from noisyssl.pipelines.run import Run
    from noisyssl.pipelines.scan import open_samples
    from noisyssl.recipe import load

    moco2 = ["pretrain.method=moco2", "pretrain.batch=4"]
    moco2 += ["pretrain.moco2.splits=2", "pretrain.moco2.queue=64"]
    config = load(None, [*moco2, "backbone=resnet18-w16", "data.size=32", "threads=1"])
    pretrain.must_make_sense(config)  # alone
    samples = open_samples(tissue).unlabelled()
    begun = Run.create(tmp_path / "run", config, "pretrain", samples)
    monkeypatch.setattr("noisyssl.methods.moco2.world", lambda: 2)
    with pytest.raises(ConfigError, match=r"batch is 4, but BatchNorm sees it in 4 parts"):
        pretrain.pretrain(config, samples, begun)


def test_an_error_in_one_process_is_told_once_and_ends_all(tmp_path, capfd):
    code = (
        "from noisyssl.cli import main, training\n"
        "from noisyssl.distributed import rank, wait_for_all\n"
        "from noisyssl.errors import DataError\n"
        "def stage(*_, **__):\n"
        "    if rank() == 1: raise DataError('x.png is broken; restore it.')\n"
        "    wait_for_all()\n"
        "training.run_stage = stage\n"
        f"main(['pretrain', 'data', '--out', {str(tmp_path / 'run')!r}])\n"
    )
    assert launch.run_processes(["-c", code], 2) == 5
    assert capfd.readouterr().err.splitlines() == ["error: x.png is broken; restore it."]


def test_who_only_lost_the_others_says_what_broke_where_nobody_knows_better(tmp_path, monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "",
        "MASTER_PORT": "",
    }.items():
        monkeypatch.setenv(name, value)
    failures = {}
    for rank in (0, 1):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
        launch.note_lost_peer(RuntimeError("NCCL error: unhandled system error\nmore"))
        failures[rank] = ProcessFailure(rank, 1, TrainingError.code, str(tmp_path / f"{rank}.json"))
    with pytest.raises(
        TrainingError, match=r"process 0 of 2 lost the .*\(?NCCL error: unhandled system error, and"
    ):
        launch._code_of(failures, 2)
    failures[1] = ProcessFailure(1, 2, -9, "")
    with pytest.raises(TrainingError, match="process 1 of 2 was ended by signal 9"):
        launch._code_of(failures, 2)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "told.json"))
    launch.note_failure("the disk is full")
    failures[1] = ProcessFailure(1, 3, 7, str(tmp_path / "told.json"))
    assert launch._code_of(failures, 2) == 7


def test_what_works_in_one_process_refuses_several(tmp_path, capsys, monkeypatch):
    several = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in several.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv(launch.MEETING, str(tmp_path / "group"))
    assert run(["train", "data", "--out", str(tmp_path / "run")]) == 2
    assert "`noisyssl train` works in one; only pretrain uses several" in capsys.readouterr().err
    assert run(["train", "data", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "", "a second process told the same error again"


def test_threads_are_shared_among_the_processes_of_a_machine(monkeypatch):
    from noisyssl.pipelines.setup import threads_of

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    assert threads_of(0) == 6
    for name, value in {
        "WORLD_SIZE": 8,
        "RANK": 5,
        "LOCAL_RANK": 1,
        "LOCAL_WORLD_SIZE": 4,
        "MASTER_ADDR": "x",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", "1")
    assert threads_of(0) == 1
    assert threads_of(3) == 3


def test_the_slurm_example_starts_torchrun_and_resumes_what_is_there(tmp_path):
    """With stand-ins for Slurm's commands: `srun` prints what it would run on each machine."""
    for name, body in {"scontrol": "printf 'gpu07\\ngpu08\\n'", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_ID": "9",
    }
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = Path(__file__).parents[2] / "examples" / "slurm.sh"
    for resume in ([], ["--resume"]):
        command = ["bash", str(script), "my data", str(tmp_path / "run"), "--method", "simclr"]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert said.splitlines() == [
            "torchrun", "--nnodes", "2", "--nproc-per-node", "4", "--rdzv-backend", "c10d", "--rdzv-id", "9",
            "--rdzv-endpoint", "gpu07:29500", "-m", "noisyssl.cli", "pretrain", "my data", "--out",
            str(tmp_path / "run"), *resume, "--method", "simclr",
        ]  # fmt: skip
        (tmp_path / "run").mkdir(exist_ok=True)
