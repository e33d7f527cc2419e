"""Blocks whose activations are dropped, and computed again in the backward pass: all of them, or all but what
attention gives, which takes much of the time of long clips and little memory (selective recompute,
Korthikanti et al., arXiv 2205.05198).
"""

from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)


def recomputed(block: nn.Module, *inputs: Any, keep_attention: bool) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """What the block makes of these inputs, compiled or not. Of `keep_attention`, outputs of attention and
    what its backward pass needs of them are kept, if it is one operation: not on short sequences in bf16
    on CPUs (attention.py).
    """
    context = partial(create_selective_checkpoint_contexts, _policy) if keep_attention else noop_context_fn
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=context)


def _policy(_context: object, operation: OpOverload, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_attention(operation) else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _is_attention(operation: OpOverload) -> bool:
    """By the names that torch, its backends and the flash-attention libraries give it."""
    return "attention" in operation.name() or "attn" in operation.name()
