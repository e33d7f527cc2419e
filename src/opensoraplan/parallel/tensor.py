"""Tensor parallelism of the denoiser's blocks, with Megatron-style sequence parallelism of their
norms (arXiv 2205.05198).

Weights become DTensors on the tp mesh, split as models/sizes.py says. Between attention and feed-forward
each rank has a part of the video tokens (from `sequence.share_tokens`) and a copy of the text. Layers compute
with the local shards; what crosses ranks is written out here: video tokens are gathered before attention and
feed-forward and reduce-scattered after it, the text is summed. Weights that are whole but see a part of the
tokens or heads have gradients that are summed over ranks.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.func import functional_call
from torch.nn import functional as F

from opensoraplan.models.adaln import AdaNormZero
from opensoraplan.models.sizes import split_dimension
from opensoraplan.models.sparse_ummdit import FeedForward, JointAttention, SparseUMMDiT, SparseUMMDiTBlock
from opensoraplan.parallel.collectives import (
    Group,
    all_gather,
    all_gather_copies,
    all_reduce,
    all_reduce_gradient,
    reduce_scatter,
)

TOKENS = 2  # of the video [n, B, s, D]; the text is [B, L, D]
VIDEO_DIMS = 4


def shard_blocks(model: SparseUMMDiT, mesh: DeviceMesh) -> None:
    """Split the weights of all blocks, and of the last modulation, over the ranks of `mesh`.

    All ranks must have the same weights. Tokens have to be shared out by `share_tokens`, too.
    """
    group = mesh.get_group()
    for name, module in list(model.named_modules()):
        match split_dimension(f"{name}.weight"):
            case 0:
                _split_outputs(cast(nn.Linear, module), mesh)
            case 1:
                _split_inputs(cast(nn.Linear, module), mesh, group)
        if isinstance(module, JointAttention):
            _share_attention(module, mesh, group)
        elif isinstance(module, FeedForward):
            module.register_forward_pre_hook(lambda _module, args: (_enter(args[0], group),))
        elif isinstance(module, AdaNormZero):
            _join_modulation(module.linear, group, video_share=0.5)
            _see_a_part(module.norm, mesh)
    for block in cast(Iterable[SparseUMMDiTBlock], model.transformer_blocks):
        if block.skip is not None:
            _see_a_part(block.skip.linear, mesh)
            if block.skip.norm is not None:
                _see_a_part(block.skip.norm, mesh)
    _join_modulation(model.norm_out.linear, group, video_share=1.0)
    for module in (model.norm_final, model.norm_out.norm, model.proj_out):
        _see_a_part(module, mesh)


def _share_attention(attention: JointAttention, mesh: DeviceMesh, group: Group) -> None:
    """Give attention whole inputs; its q/k norms see the heads of this rank alone."""
    for norm in (attention.norm_q, attention.norm_k, attention.norm_added_q, attention.norm_added_k):
        _see_a_part(norm, mesh)

    def enter(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        video, text, layout = args
        return _enter(video, group), _enter(text, group), layout

    attention.register_forward_pre_hook(enter)


def _join_modulation(linear: nn.Linear, group: Group, *, video_share: float) -> None:
    """Join the outputs again, which are split; the first `video_share` modulate a part of the tokens."""
    video_width = int(linear.out_features * video_share)

    def leave(_module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor:
        out = all_gather_copies(out, dim=-1, group=group)
        if video_width == out.shape[-1]:
            return all_reduce_gradient(out, group=group)
        video, text = out[..., :video_width], out[..., video_width:]
        return torch.cat([all_reduce_gradient(video, group=group), text], dim=-1)

    linear.register_forward_pre_hook(lambda _module, args: (all_reduce_gradient(args[0], group=group),))
    linear.register_forward_hook(leave)


def _enter(x: Tensor, group: Group) -> Tensor:
    """Whole input for layers whose outputs are split: all tokens of the video, the copy of the text."""
    if x.ndim == VIDEO_DIMS:
        return all_gather(x, dim=TOKENS, group=group)
    return all_reduce_gradient(x, group=group)


def _split_outputs(linear: nn.Linear, mesh: DeviceMesh) -> None:
    """Each rank computes a part of the outputs."""
    _distribute(linear, mesh, {"weight": Shard(0), "bias": Shard(0)})

    def forward(x: Tensor) -> Tensor:
        bias = None if linear.bias is None else _local(linear.bias)
        return F.linear(x, _local(linear.weight), bias)

    _run_as(linear, forward)


def _split_inputs(linear: nn.Linear, mesh: DeviceMesh, group: Group) -> None:
    """Each rank has a part of the inputs: a sum over ranks, of which video tokens are shared out again."""
    _distribute(linear, mesh, {"weight": Shard(1), "bias": Replicate()})

    def forward(x: Tensor) -> Tensor:
        product = F.linear(x, _local(linear.weight))
        of_a_part = x.ndim == VIDEO_DIMS
        if of_a_part:
            out = reduce_scatter(product, dim=TOKENS, group=group)
        else:
            out = all_reduce(product, group=group)
        return out if linear.bias is None else out + _local(linear.bias, of_a_part=of_a_part)

    _run_as(linear, forward)


def _see_a_part(module: nn.Module, mesh: DeviceMesh) -> None:
    """The module's own weights are whole, but this rank's gradients of them are of a part of its inputs."""
    _distribute(module, mesh, {name: Replicate() for name, _ in module.named_parameters(recurse=False)})
    plain = copy.copy(module)  # shares the weights, without the new forward
    plain._forward_hooks, plain._forward_pre_hooks = OrderedDict(), OrderedDict()

    def forward(x: Tensor) -> Tensor:
        weights = {
            name: _local(weight, of_a_part=True) for name, weight in plain.named_parameters(recurse=False)
        }
        return functional_call(plain, weights, (x,))

    _run_as(module, forward)


def _run_as(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    """Hooks, names and weights stay. Not for a functools.partial: torch.compile knows one by its identity, a
    nested function by its code, which lets blocks share graphs.
    """
    module.forward = forward


def _distribute(module: nn.Module, mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
    for name, weight in list(module.named_parameters(recurse=False)):
        value = distribute_tensor(weight.detach(), mesh, [placements[name]], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(value, requires_grad=weight.requires_grad))


def _local(weight: Tensor, *, of_a_part: bool = False) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local(grad_placements=[Partial()] if of_a_part else None)
