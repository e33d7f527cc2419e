"""Collectives with gradients, for tensors of equal shape on all ranks of a group.

Where ranks hold different parts of one sample's tokens, the loss is the sum of what all ranks compute, and
the backward pass of a collective is its adjoint. Where ranks hold copies of one computation (tensor
parallelism), the loss is what each of them computes, and gradients of copies are copies.

    forward          backward         of parts         of copies
    all-to-all       all-to-all       all_to_all
    all-gather       reduce-scatter   all_gather
    reduce-scatter   all-gather       reduce_scatter
    split            all-gather                        split_copies
    all-gather       split                             all_gather_copies
    all-reduce       identity                          all_reduce            (Megatron's g)
    identity         all-reduce                        all_reduce_gradient   (Megatron's f)
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

Group = dist.ProcessGroup

# torch 2.13 calls them differently, and warns of the old names.
ALL_GATHER, REDUCE_SCATTER = "all_gather_single", "reduce_scatter_single"
if not hasattr(dist, ALL_GATHER):
    ALL_GATHER, REDUCE_SCATTER = "all_gather_into_tensor", "reduce_scatter_tensor"


def all_to_all(x: Tensor, *, split: int, join: int, group: Group) -> Tensor:
    """Cut x along `split`, send part i to rank i, join what comes along `join`. Backward: the other way."""
    return _AllToAll.apply(x, split, join, group)  # type: ignore[return-value]


def all_gather(x: Tensor, *, dim: int, group: Group) -> Tensor:
    """The parts of all ranks, joined along `dim`. Backward: reduce_scatter."""
    return _AllGather.apply(x, dim, group)  # type: ignore[return-value]


def reduce_scatter(x: Tensor, *, dim: int, group: Group) -> Tensor:
    """The sum over all ranks, of which each keeps its part along `dim`. Backward: all_gather."""
    return _ReduceScatter.apply(x, dim, group)  # type: ignore[return-value]


def part_of(x: Tensor, *, dim: int, group: Group) -> Tensor:
    """This rank's part along `dim` of what all ranks have. No collective, forward or backward."""
    return x.chunk(group.size(), dim)[group.rank()]


def split_copies(x: Tensor, *, dim: int, group: Group) -> Tensor:
    """As `part_of`, of copies. Backward: the gradients of all parts, joined."""
    return _SplitCopies.apply(x, dim, group)  # type: ignore[return-value]


def all_gather_copies(x: Tensor, *, dim: int, group: Group) -> Tensor:
    """As `all_gather`; the results are copies. Backward: this rank's part of the gradient."""
    return _AllGatherCopies.apply(x, dim, group)  # type: ignore[return-value]


def all_reduce(x: Tensor, *, group: Group) -> Tensor:
    """The sum over all ranks, a copy on each. Backward: the gradient as it is."""
    return _AllReduce.apply(x, group)  # type: ignore[return-value]


def all_reduce_gradient(x: Tensor, *, group: Group) -> Tensor:
    """x as it is, a copy on each rank, which then go different ways. Backward: the sum of their gradients."""
    return _AllReduceGradient.apply(x, group)  # type: ignore[return-value]


def _all_to_all(x: Tensor, split: int, join: int, group: Group) -> Tensor:
    parts = torch.stack(x.chunk(group.size(), split))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return torch.cat(received.unbind(0), dim=join)


def _all_gather(x: Tensor, dim: int, group: Group) -> Tensor:
    parts = x.new_empty(group.size(), *x.shape)
    getattr(dist, ALL_GATHER)(parts.flatten(0, 1), x.contiguous(), group=group)
    return torch.cat(parts.unbind(0), dim=dim)


def _reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    parts = torch.stack(x.chunk(group.size(), dim))
    out = torch.empty_like(parts[0])
    getattr(dist, REDUCE_SCATTER)(out, parts.flatten(0, 1), group=group)
    return out


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: int, join: int, group: Group) -> Tensor:  # noqa: ANN401
        ctx.split, ctx.join, ctx.group = split, join, group
        return _all_to_all(x, split, join, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        return _all_to_all(grad, ctx.join, ctx.split, ctx.group), None, None, None


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:  # noqa: ANN401
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return _reduce_scatter(grad, ctx.dim, ctx.group), None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:  # noqa: ANN401
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return _all_gather(grad, ctx.dim, ctx.group), None, None


class _SplitCopies(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:  # noqa: ANN401
        ctx.dim, ctx.group = dim, group
        return part_of(x, dim=dim, group=group).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return _all_gather(grad, ctx.dim, ctx.group), None, None


class _AllGatherCopies(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:  # noqa: ANN401
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return part_of(grad, dim=ctx.dim, group=ctx.group).contiguous(), None, None


class _AllReduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:  # noqa: ANN401, ARG004
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401, ARG004
        return grad, None


class _AllReduceGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:  # noqa: ANN401
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return _all_reduce(grad, ctx.group), None
