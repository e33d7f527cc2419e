"""Everything that is done to a denoiser to run it on a mesh, in the one order that works.

Tensor parallelism splits weights first; then tokens are shared out; FSDP comes last, for it moves what the
others leave. Blocks may be compiled before or between, since torch compiles them when they first run.
Every micro-batch reduces its gradients: to reduce those of the last one only would keep them whole on
every rank until then.
"""

import warnings
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.parallel.mesh import SEQUENCE, TENSOR, Mesh
from opensoraplan.parallel.sequence import share_tokens
from opensoraplan.parallel.tensor import shard_blocks
from opensoraplan.runtime.compiling import compile_blocks

_CAST = ("hidden_states", "encoder_hidden_states", "pooled_projections")


def parallelize(
    model: SparseUMMDiT,
    mesh: Mesh,
    *,
    compute: torch.dtype,
    compiled: bool = False,
    backend: str = "inductor",
    cpu_offload: bool = False,
) -> None:
    """Share a denoiser out over `mesh`, for training. All ranks must have the same weights, in the precision
    of the optimizer; blocks compute in `compute`, gradients are reduced in fp32. With `compiled`, blocks are
    compiled by `backend` of torch.compile. With `cpu_offload`, shards, gradients and the optimizer's state
    are in host memory.

    Raises ValueError for a mesh that does not fit the model.
    """
    mesh.settings.check_model(model.config["num_attention_heads"])
    share_sample(model, mesh)
    if compiled:
        compile_blocks(model, backend=backend)
    # In each forward pass: what a block returns may be a view of its padded tokens. Nothing writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Not all inputs are to be cast: timesteps, rotary tables and the condition stay in fp32.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model.register_forward_pre_hook(partial(_cast_inputs, dtype=compute), with_kwargs=True)
    pinned = mesh.for_weights.device_type != "cpu"
    offload = CPUOffloadPolicy(pin_memory=pinned) if cpu_offload else OffloadPolicy()
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh.for_weights, mp_policy=policy, offload_policy=offload)
    fully_shard(model, mesh=mesh.for_weights, mp_policy=policy, offload_policy=offload)


def _cast_inputs(
    _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Who asks a sharded model for its dtype is told that of the optimizer."""
    return args, {
        name: value.to(dtype) if name in _CAST and value is not None else value
        for name, value in kwargs.items()
    }


def forget_gathered(model: nn.Module) -> None:
    """Have FSDP gather all weights anew: of what is outside of blocks it keeps what a forward pass without
    gradients has gathered, whatever happens to the shards.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def share_sample(model: SparseUMMDiT, mesh: Mesh) -> None:
    """Let the ranks of one sample share its work (tp, sp): all that generating needs."""
    tp = mesh.group(TENSOR) if mesh.size(TENSOR) > 1 else None
    sp = mesh.group(SEQUENCE) if mesh.size(SEQUENCE) > 1 else None
    if tp is not None:
        shard_blocks(model, mesh.devices[TENSOR])
    if tp is not None or sp is not None:
        share_tokens(model, sp=sp, tp=tp)
