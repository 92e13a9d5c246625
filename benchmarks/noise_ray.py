"""A noise grid on a Ray cluster: each pretraining and each cell is one task.

The runs lie where `--work` says, which every node must see under the same path, as the data. Ray sends tasks
between its processes with pickle: connect to clusters you trust only.
"""

import os
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from noisyssl.benchmarks import noise
from noisyssl.benchmarks.noise import Place
from noisyssl.benchmarks.noise_grid import Cell, Grid
from noisyssl.errors import ConfigError, MachineError, NoisySSLError
from noisyssl.pipelines import pretrain
from noisyssl.pipelines.setup import device_of

WAIT = 5
"""Seconds that a cluster has to answer."""


def connect(on: str) -> None:
    """Start a cluster on this machine ("ray") or join one ("ray://HOST:PORT").

    Raises:
        ConfigError: `on` is neither.
        MachineError: Ray is not installed, or nobody answers.
    """
    if on != "ray" and not on.startswith("ray://"):
        raise ConfigError(f"--on is {on!r}; choose local, ray or ray://HOST:PORT.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the house
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise MachineError("package 'ray' is missing; run `pip install 'noisyssl[ray]'`.") from None
    try:
        if on != "ray":  # Ray itself would try for half a minute
            at = urlsplit(on)
            socket.create_connection((at.hostname or "127.0.0.1", at.port or 10001), WAIT).close()
        if on == "ray":
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        else:
            ray.init(address=on, log_to_driver=False)
    except Exception as error:  # Ray has many kinds of it
        raise MachineError(
            f"no Ray cluster answers at {on} ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "start one with `ray start --head`, or use --on ray."
        ) from None


def run_all(grid: Grid, place: Place, say: Callable[[str], None]) -> None:
    """Train every cell that is not finished, as many at a time as the cluster's CPUs and GPUs allow.

    Raises:
        MachineError: what would fail every cell; the tasks that still wait are cancelled.
    """
    import ray

    config = noise.settled(grid.config(grid.cells[0]))
    share: dict[str, Any] = {
        "num_cpus": config.threads,
        "num_gpus": 1 if device_of(config.device).type == "cuda" else 0,
    }
    start_task = ray.remote(**share, max_retries=0)(_pretrain)
    cell_task = ray.remote(**share, max_retries=0)(_cell)
    starts: dict[Any, Any] = {}
    waiting: dict[Any, Cell] = {}
    must_hold(share)
    shared = ray.put((grid, place))
    for cell in grid.cells:
        if (place.cell(cell) / "metrics.json").is_file():
            continue
        folder = place.start(cell)
        if folder is not None and folder not in starts:
            starts[folder] = start_task.remote(shared, cell)
        waiting[cell_task.remote(shared, cell, starts.get(folder))] = cell
    count, total = 0, len(waiting)
    while waiting:
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        cell, count = waiting.pop(done), count + 1
        try:
            told = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            for task in waiting:
                ray.cancel(task)
            raise error.cause if isinstance(error.cause, MachineError) else error from None
        except ray.exceptions.RayError as error:  # a worker that died takes its cell along, not the others
            told = noise.failed(place, cell, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        say(f"[{count}/{total}] {cell.name}: {told}")


def must_hold(share: dict[str, Any]) -> None:
    """Raises MachineError if no node of the cluster can ever take one task: it would wait without a word."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node.get("Alive")]
    if not any(
        node.get("CPU", 0) >= share["num_cpus"] and node.get("GPU", 0) >= share["num_gpus"] for node in nodes
    ):
        raise MachineError(
            f"no node of the Ray cluster has {share['num_cpus']} CPUs and {share['num_gpus']} GPUs, "
            "which one training asks for; lower --threads, set device = 'cpu' in the grid, or add a node."
        )


def _pretrain(shared: tuple[Grid, Place], cell: Cell) -> str | None:
    """Train what a cell starts from; what went wrong, which all cells that need it then say."""
    grid, place = shared
    config = noise.settled(grid.config(cell, folder := place.start(cell)))
    assert folder is not None
    try:
        noise.stage(pretrain, config, noise.opened(config).unlabelled(), folder)
    except MachineError:
        raise
    except Exception as error:
        return f"its pretraining failed: {error}"
    return None


def _cell(shared: tuple[Grid, Place], cell: Cell, unbegun: str | None) -> str:
    grid, place = shared
    if unbegun:
        return noise.failed(place, cell, unbegun)
    try:
        samples = noise.opened(noise.settled(grid.config(cell, place.start(cell))))
    except NoisySSLError as error:  # a node that does not see the data
        return noise.failed(place, cell, str(error))
    return noise.run_cell(grid, place, cell, samples)
