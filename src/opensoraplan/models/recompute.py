"""Blocks whose activations are dropped, and computed again in the backward pass: all of them, or all but what
attention gives, which takes much of the time of long clips and little memory (selective recompute,
Korthikanti et al., arXiv 2205.05198).
"""

from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)


def recomputed(
    block: nn.Module,
    *inputs: Any,  # noqa: ANN401
    keep_attention: bool,
    on_host: bool = False,
) -> tuple[Tensor, Tensor]:
    """What the block makes of these inputs, compiled or not. Of `keep_attention`, outputs of attention and
    what its backward pass needs of them are kept, if it is one operation: not on short sequences in bf16
    on CPUs (attention.py). `on_host`: tensors among the inputs wait for the backward pass on the host.
    """
    context = partial(create_selective_checkpoint_contexts, _policy) if keep_attention else noop_context_fn
    with saved_tensors_hooks(_to_host, _from_host) if on_host else nullcontext():
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=context)


def _to_host(x: Tensor) -> tuple[torch.device, Tensor]:
    """The device of a tensor, and a copy of it in pinned host memory."""
    if x.device.type == "cpu":
        return x.device, x
    return x.device, torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)


def _from_host(waiting: tuple[torch.device, Tensor]) -> Tensor:
    device, x = waiting
    return x.to(device)


def _policy(_context: object, operation: OpOverload, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_attention(operation) else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _is_attention(operation: OpOverload) -> bool:
    """By the names that torch, its backends and the flash-attention libraries give it."""
    return "attention" in operation.name() or "attn" in operation.name()
