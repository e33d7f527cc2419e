"""Collectives with gradients, for tensors of equal shape on all ranks of a group.

Two conventions, told apart by name. Where ranks hold different parts of one sample's tokens (sequence
parallelism), the loss is the sum of what all ranks compute, and the backward pass of each collective is its
adjoint. Where ranks hold copies of one computation (tensor parallelism), the loss is what each of them
computes, and gradients of copies are copies: those collectives end in `_copies`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

Group = dist.ProcessGroup

# torch 2.13 calls them differently, and warns of the old names.
GATHER, SUM_PARTS = "all_gather_single", "reduce_scatter_single"
if not hasattr(dist, GATHER):
    GATHER, SUM_PARTS = "all_gather_into_tensor", "reduce_scatter_tensor"


def exchange(x: Tensor, *, split: int, join: int, group: Group) -> Tensor:
    """Cut x along `split`, send part i to rank i, join what comes along `join`. Backward: the other way."""
    return _Exchange.apply(x, split, join, group)  # type: ignore[return-value]


def gather(x: Tensor, *, dim: int, group: Group) -> Tensor:
    """The parts of all ranks, joined along `dim`. Backward: the sum of all ranks' gradients, cut again."""
    return _Gather.apply(x, dim, group)  # type: ignore[return-value]


def sum_parts(x: Tensor, *, dim: int, group: Group) -> Tensor:
    """The sum over all ranks, of which each keeps its part along `dim`. Backward: gather."""
    return _SumParts.apply(x, dim, group)  # type: ignore[return-value]


def part_of(x: Tensor, *, dim: int, group: Group) -> Tensor:
    """This rank's part along `dim` of what all ranks have."""
    return x.chunk(group.size(), dim)[group.rank()]


def part_of_copies(x: Tensor, *, dim: int, group: Group) -> Tensor:
    """As `part_of`, of copies. Backward: the gradients of all parts, joined."""
    return _PartOfCopies.apply(x, dim, group)  # type: ignore[return-value]


def gather_copies(x: Tensor, *, dim: int, group: Group) -> Tensor:
    """As `gather`; the results are copies. Backward: this rank's part of the gradient."""
    return _GatherCopies.apply(x, dim, group)  # type: ignore[return-value]


def sum_to_copies(x: Tensor, *, group: Group) -> Tensor:
    """The sum over all ranks, a copy on each. Backward: the gradient as it is."""
    return _SumToCopies.apply(x, group)  # type: ignore[return-value]


def use_copies(x: Tensor, *, group: Group) -> Tensor:
    """x as it is, a copy on each rank, which then go different ways. Backward: the sum of their gradients."""
    return _UseCopies.apply(x, group)  # type: ignore[return-value]


def _exchanged(x: Tensor, split: int, join: int, group: Group) -> Tensor:
    parts = torch.stack(x.chunk(group.size(), split))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return torch.cat(received.unbind(0), dim=join)


def _gathered(x: Tensor, dim: int, group: Group) -> Tensor:
    parts = x.new_empty(group.size(), *x.shape)
    getattr(dist, GATHER)(parts.flatten(0, 1), x.contiguous(), group=group)
    return torch.cat(parts.unbind(0), dim=dim)


def _summed_part(x: Tensor, dim: int, group: Group) -> Tensor:
    parts = torch.stack(x.chunk(group.size(), dim))
    out = torch.empty_like(parts[0])
    getattr(dist, SUM_PARTS)(out, parts.flatten(0, 1), group=group)
    return out


def _summed(x: Tensor, group: Group) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: int, join: int, group: Group) -> Tensor:  # noqa: ANN401
        ctx.split, ctx.join, ctx.group = split, join, group
        return _exchanged(x, split, join, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        return _exchanged(grad, ctx.join, ctx.split, ctx.group), None, None, None


class _AlongDim(Function):
    """What the collectives along a dimension keep for backward."""

    @staticmethod
    def keep(ctx: Any, dim: int, group: Group) -> None:  # noqa: ANN401
        ctx.dim, ctx.group = dim, group


class _Gather(_AlongDim):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:  # noqa: ANN401
        _AlongDim.keep(ctx, dim, group)
        return _gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return _summed_part(grad, ctx.dim, ctx.group), None, None


class _SumParts(_AlongDim):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:  # noqa: ANN401
        _AlongDim.keep(ctx, dim, group)
        return _summed_part(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return _gathered(grad, ctx.dim, ctx.group), None, None


class _PartOfCopies(_AlongDim):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:  # noqa: ANN401
        _AlongDim.keep(ctx, dim, group)
        return part_of(x, dim=dim, group=group).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return _gathered(grad, ctx.dim, ctx.group), None, None


class _GatherCopies(_AlongDim):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:  # noqa: ANN401
        _AlongDim.keep(ctx, dim, group)
        return _gathered(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return part_of(grad, dim=ctx.dim, group=ctx.group).contiguous(), None, None


class _SumToCopies(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:  # noqa: ANN401, ARG004
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401, ARG004
        return grad, None


class _UseCopies(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:  # noqa: ANN401
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return _summed(grad, ctx.group), None
