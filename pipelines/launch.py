"""Several processes that train together: started by torchrun, or by ourselves through its agent.

We add no scheduler: torchrun's agent starts the processes, watches them and ends all when one fails. This
file starts that agent, joins the group that its environment describes, and sees to it that an error which
many processes meet is told once.
"""

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from noisyssl.errors import MachineError, TrainingError

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others, such as for the first one's scan of the images.

A process that dies is noticed at once by torchrun's agent and by broken connections; only a machine that
vanishes without a word takes this long.
"""
GRACE = 45
"""Seconds between the agent's SIGTERM and its SIGKILL: a step and a checkpoint."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""What the agent hands on to the processes."""
MEETING = "NOISYSSL_GROUP_FILE"
"""Environment variable: where processes of one machine meet, instead of at a port open to the network."""

LOST = "lost the connection to the others"
"""How the note of a process begins that met a broken connection and nothing else."""

_store: "Store | None" = None


def started() -> bool:
    """Whether torchrun started this process as one of several."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if started() else 0


def local_world() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if started() else 1


def attempt() -> int:
    """How often torchrun has started these processes anew after a failure (its --max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if started() else 0


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that torchrun started are one group; a process that is alone stays alone.

    Tensors on a GPU go through NCCL, all others through gloo. After an error the group is left as it is: the
    others may be gone, and parting from them could wait for ever. End the process by `leave`.

    Raises:
        MachineError: the others cannot be reached.
    """
    global _store
    if not started():
        yield
        return
    import torch
    from torch import distributed as dist

    _end_with_parent()
    cuda = torch.cuda.is_available()
    if cuda and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        _store = _meet(PATIENCE)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=_store, rank=rank, world_size=world, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = os.environ.get(MEETING) or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise MachineError(
            f"process {rank} of {world} cannot join the others at {where} ({_first_line(error)}); "
            "check that the machines reach each other there."
        ) from None
    yield
    dist.destroy_process_group()
    _store = None


@contextmanager
def first_here() -> Iterator[None]:
    """The block runs in one process of each machine before the others: they find in a cache what it did."""
    from noisyssl.distributed import wait_for_all

    if local_rank() > 0:
        wait_for_all()
    yield
    if local_rank() == 0:
        wait_for_all()


def is_first_to_fail() -> bool:
    """Whether this process is the one to tell about an error; a process that is alone always is."""
    if not started():
        return True
    try:
        return (_store or _meet(timedelta(seconds=10))).add(f"noisyssl/failed/{attempt()}", 1) == 1
    except (RuntimeError, ValueError):  # the place where they meet is gone with its machine, or never was
        return True


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another process of the group has ended."""
    if not started() or not isinstance(error, RuntimeError):
        return False
    from torch import distributed as dist

    signs = ("gloo", "NCCL", "onnection closed by peer", "onnection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def note_failure(message: str) -> None:
    """Leave the reason of a failure where torchrun's agent looks for it, in the form that it reads."""
    if started() and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def note_lost_peer(error: BaseException) -> None:
    """Leave what broke the connection, in case no process knows a better reason: NCCL itself failed."""
    if started() and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        told = {"message": f"{LOST}: {_first_line(error)}", "timestamp": int(time.time())}
        Path(path).write_text(json.dumps(told))


def leave(code: int) -> NoReturn:
    """End this process; one of several at once, for whatever waits for the others would wait in vain."""
    if code and started():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_processes(arguments: list[str], processes: int) -> int:
    """Run `python ARGUMENTS` in so many processes on this machine; the exit code of the first that failed.

    SIGTERM and Ctrl-C are handed on, and what the processes made of them is awaited.

    Raises:
        TrainingError: a process died without saying why: killed, or out of memory.
        MachineError: torchrun's agent did not start them.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # all on this machine: nothing listens to the network, and no host name needs to resolve
    own = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    os.environ.update(own | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE)})
    logging.disable(logging.ERROR)  # the agent's own report of a failure, a page long
    try:
        with tempfile.TemporaryDirectory(prefix="noisyssl-") as folder:
            os.environ[MEETING] = f"{folder}/group"
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=processes,
                run_id=str(uuid.uuid4()),
                rdzv_backend="c10d",
                rdzv_endpoint=f"{folder}/agent",
                rdzv_configs={"store_type": "file"},
                local_addr="127.0.0.1",
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            )
            elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as failed:
        return _code_of(failed.failures, processes)
    except SignalException as caught:
        return 128 + caught.sigval
    except (RuntimeError, OSError) as error:
        raise MachineError(
            f"{processes} processes could not be started ({_first_line(error)}); see `noisyssl doctor`."
        ) from None
    finally:
        logging.disable(logging.NOTSET)
        os.environ.clear()
        os.environ.update(before)
        for number, handler in handlers.items():  # the agent leaves its own
            signal.signal(number, handler)
    return 0


def _code_of(failures: dict[int, Any], processes: int) -> int:
    """The exit code of a process that told why it failed.

    Raises:
        TrainingError: none did.
    """
    told = [failure.exitcode for failure in failures.values() if isinstance(failure.message, dict)]
    if told:
        return told[0]
    # in the order in which they were noticed; who only lost another process is not the cause
    causes = [rank for rank, failure in failures.items() if failure.exitcode != TrainingError.code]
    rank = (causes or list(failures))[0]
    code, message = failures[rank].exitcode, failures[rank].message
    how = (
        f"was ended by signal {-code} ({failures[rank].signal_name()})"
        if code < 0
        else f"ended with code {code}"
    )
    if isinstance(message, str) and message.startswith(LOST):
        how = message
    raise TrainingError(
        f"process {rank} of {processes} {how}, and the others with it; "
        "the same command with --resume goes on."
    )


def _meet(patience: timedelta) -> "Store":
    """The store through which the processes find each other."""
    from torch import distributed as dist

    if path := os.environ.get(MEETING):
        return dist.FileStore(path, int(os.environ["WORLD_SIZE"]))
    return next(dist.rendezvous("env://", timeout=patience))[0]


def _end_with_parent() -> None:
    """Have Linux send SIGTERM when the agent dies, however it dies: a training without it is an orphan."""
    if sys.platform == "linux":
        die_with_parent = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(die_with_parent, signal.SIGTERM)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
