"""Question "scaling": images a second of a pretraining step by one process and by several.

Weak scaling: each process has the same batch, so several do as many times the work, and what they lose is the
price of averaging gradients, joining BatchNorms and gathering embeddings. The step is that of question
"step": nothing is loaded. Both sides are up all the time and take turns; between turns they sleep.

    python -m noisyssl.benchmarks.scaling FOLDER PROCESSES      # one side, started by `measure`
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from noisyssl.benchmarks.measure import Spread, rate, ratio
from noisyssl.benchmarks.records import Record, record
from noisyssl.errors import ConfigError, MachineError
from noisyssl.pipelines import launch

POLL = 0.01
"""Seconds between two looks for a turn."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What each process does in a turn."""

    method: str = "simclr"
    recipe: str = "small"
    """Backbone, size, optimizer and the method's widths."""
    batch: int = 32
    """Images of one process in one step."""
    threads: int = 1
    """CPU threads of each process."""
    steps: int = 5
    """Steps of a turn."""


def measure(work: Work, processes: int = 0, runs: int = 5) -> Record:
    """Images/s of one and of `processes` processes, and the share of a perfect speed-up that these reach.

    Args:
        work: what each process does.
        processes: how many; 0 is one per GPU where there are several, else 2.
        runs: counted turns of each side, after one that is not.

    Raises:
        ConfigError: `processes` is 1.
        MachineError: a side ended before its turns did.
    """
    processes = processes or max(2, gpus())
    if processes < 2:
        raise ConfigError(f"--processes is {processes}; several are compared with one. Give 2 or more, or 0.")
    seconds: dict[int, list[float]] = {1: [], processes: []}
    with tempfile.TemporaryDirectory(prefix="noisyssl-") as name:
        folder = Path(name)
        (folder / "work.json").write_text(json.dumps(dataclasses.asdict(work)))
        sides = {count: start(folder, count) for count in seconds}
        try:
            for turn in range(-1, runs):
                for count in sorted(sides, reverse=turn % 2 == 1):
                    took = take_turn(folder, count, turn, sides[count])
                    if turn >= 0:
                        seconds[count].append(took.pop("seconds"))
                    if count == processes:
                        where = took
        finally:
            (folder / "end").touch()
            for side in sides.values():
                side.wait()
    images = work.steps * work.batch
    efficiency = ratio(seconds[1], seconds[processes])  # the same steps with the same batch in each process
    spread: dict[str, Spread] = {
        "1 process images/s": rate(images, seconds[1]),
        f"{processes} processes images/s": rate(images * processes, seconds[processes]),
        "efficiency": efficiency,
    }
    return record(
        "scaling",
        settings=dataclasses.asdict(work) | {"processes": processes} | where,
        figures={key: value.median for key, value in spread.items()},
        n=runs,
        spread=spread,
    )


def gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def start(folder: Path, count: int) -> "subprocess.Popen[bytes]":
    """One side; it waits for its turns."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(folder), str(count)], stdin=subprocess.DEVNULL
    )


def take_turn(folder: Path, count: int, turn: int, side: "subprocess.Popen[bytes]") -> dict[str, Any]:
    """Let a side take a turn; what its first process says of it."""
    (folder / f"{count}.{turn}.go").touch()
    answer = folder / f"{count}.{turn}.json"
    while not answer.exists():
        if side.poll() is not None:
            raise MachineError(
                f"the side of {count} processes ended with code {side.returncode}; see its error above."
            )
        time.sleep(POLL)
    return json.loads(answer.read_text())


def serve(folder: Path, count: int) -> None:
    """One process of a side: takes turns until told to end."""
    from noisyssl.distributed import rank, wait_for_all

    with launch.joined():
        number = -1
        turn: Callable[[], None] | None = None
        while not (folder / "end").exists():
            if not (folder / f"{count}.{number}.go").exists():
                time.sleep(POLL)
                continue
            if turn is None:
                turn, facts = prepared(Work(**json.loads((folder / "work.json").read_text())))
            wait_for_all()
            began = time.perf_counter()
            turn()
            wait_for_all()
            if rank() == 0:
                done = folder / f"{count}.{number}.tmp"
                done.write_text(json.dumps(facts | {"seconds": time.perf_counter() - began}))
                done.rename(folder / f"{count}.{number}.json")
            number += 1


def prepared(work: Work) -> tuple[Callable[[], None], dict[str, Any]]:
    """The steps of a turn, done when the device has done them, and where they are computed."""
    import torch

    from noisyssl.benchmarks.step import config_of, method_step
    from noisyssl.distributed import world
    from noisyssl.pipelines.setup import device_of

    torch.set_num_threads(work.threads)
    gpu = device_of("auto").type == "cuda"
    config = config_of(work.method, work.recipe, work.batch)
    step = method_step(config)

    def turn() -> None:
        for _ in range(work.steps):
            step()
        if gpu:
            torch.cuda.synchronize()

    backend = ("nccl" if gpu else "gloo") if world() > 1 else "none"
    where = {"device": device_of("auto").type, "backend": backend}
    return turn, where | {"backbone": config.backbone, "size": config.data.size}


def main(arguments: list[str]) -> int:
    """One side: alone, or as the launcher of its processes, or as one of them."""
    folder, count = Path(arguments[0]), int(arguments[1])
    if count > 1 and not launch.started():
        return launch.run_processes(["-m", "noisyssl.benchmarks.scaling", *arguments], count)
    serve(folder, count)
    return 0


if __name__ == "__main__":
    launch.leave(main(sys.argv[1:]))
