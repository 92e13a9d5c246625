"""What one process needs from the others that train with it; alone, each function gives its input back.

Gradients follow the convention of DistributedDataParallel, which averages them: where every process
returns the loss of its own rows (or the same loss of all rows), the average is the gradient of the loss of
the joined batch.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

Value = TypeVar("Value")

_alone = False


def world() -> int:
    """Number of processes that train together."""
    joined = dist.is_available() and dist.is_initialized() and not _alone
    return dist.get_world_size() if joined else 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process computes as if there were no others; they must not wait for it meanwhile."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def gather(rows: Tensor) -> Tensor:
    """(world * B, ...) the (B, ...) rows of all processes in rank order; B must be the same everywhere.

    The gradient of a row, summed over the processes, goes back to its owner.
    """
    return _Gather.apply(rows) if world() > 1 else rows


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of `value` over the processes, and so for its gradient."""
    return _Sum.apply(value) if world() > 1 else value


@torch.no_grad()
def mean_over_processes(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars as their means over the processes, the same bits everywhere; the host does not wait."""
    if world() == 1:
        return terms
    row = torch.stack([value.float() for value in terms.values()])
    dist.all_reduce(row)
    return dict(zip(terms, (row / world()).unbind(), strict=True))


def exchange(value: Value) -> list[Value]:
    """Every process's JSON-able value in rank order; every process must call it, and waits for the others.

    Between hosts: no GPU is waited for.
    """
    if world() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor([len(text)])
    lengths = [torch.zeros_like(length) for _ in range(world())]
    dist.all_gather(lengths, length)
    longest = max(int(one) for one in lengths)
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world())]
    dist.all_gather(texts, torch.cat([text, text.new_zeros(longest - len(text))]))
    return [json.loads(bytes(t[: int(n)].numpy())) for t, n in zip(texts, lengths, strict=True)]


def wait_for_all() -> None:
    """Return when every process has called this."""
    exchange(None)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        out = rows.new_empty(world() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(out, rows.contiguous())
        return out

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        whole = gradient.contiguous()
        dist.all_reduce(whole)  # gloo has no reduce_scatter; embeddings are small
        return whole.chunk(world())[rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        out = value.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)
