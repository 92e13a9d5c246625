"""What a loss needs from the other processes of a training; alone, each function gives its input back.

Gradients follow the convention of DistributedDataParallel, which averages them: where every process
returns the loss of its own rows (or the same loss of all rows), the average is the gradient of the loss of
the joined batch.
"""

import torch
from torch import Tensor
from torch import distributed as dist


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, rows: Tensor) -> Tensor:
        out = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(out, rows.contiguous())
        return torch.cat(out)

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
