"""Attention proper, and which of its implementations runs where.

Shapes as diffusers' dispatcher has them: B sequences, S tokens, H heads, d head width, all in [B, S, H, d].
"""

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from torch.nn import functional as F

from opensoraplan.names import did_you_mean

# Up to this many tokens, scores are kept for the backward pass on a CPU.
_SHORT = 512
# Channels that a head gets on an NPU for its key mask, as few as kernels there count in; and what they add to
# the scores of masked keys, which fp16 can hold.
_MASK_CHANNELS = 16
_MASKED = -30000.0


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *, backend: object | None = None
) -> Tensor:
    """Attention of q, k, v [B, S, H, d] over all tokens, those where `key_mask` [B, 1, 1, S] is True, or it
    has floats, which are added to the scores (`additive_mask`).

    `backend` is one of diffusers' dispatcher. None: its default, torch's SDPA, but where that trains badly:
    cuDNN's gradients under a mask can be NaN (torch 2.11, S % 128 == 64), and on CPUs those of bf16 take
    several times as long as plain products for short sequences, such as those of small models. Masks never
    reach the kernels of an NPU: they want one with a row for each query, of which memory is quadratic.
    """
    if q.device.type == "npu" and key_mask is not None:
        return _masked_by_channels(q, k, v, key_mask, backend=backend)
    if backend is None and q.requires_grad:
        if q.is_cuda and key_mask is not None:
            backend = "_native_efficient"
        elif q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[1] <= _SHORT:
            return _plain(q, k, v, key_mask)
    return dispatch_attention_fn(q, k, v, attn_mask=key_mask, backend=backend)  # type: ignore[arg-type]


def check_backend(name: str) -> None:
    """Raise ValueError, with the nearest name, for a backend that does not exist."""
    names = [backend.value for backend in AttentionBackendName]
    if name not in names:
        raise ValueError(f"there is no attention {name!r}{did_you_mean(name, names)}: use {', '.join(names)}")


def set_backend(model: ModelMixin, name: str, device: torch.device, *, masked: str | None = None) -> None:
    """Have a model compute attention by the backend of that name. Raises ValueError for one that does not
    exist, or does not work on this device and in the model's precision, which is tried. `masked`: what will
    make it mask keys, for then it has to work with a mask, too.
    """
    check_backend(name)
    q = torch.zeros(1, 128, 2, model.config["attention_head_dim"], dtype=model.dtype, device=device)
    mask = (torch.arange(128, device=device) < 100)[None, None, None]
    if device.type == "cpu":  # as SparseUMMDiT has it there
        mask = additive_mask(mask, q.dtype)
    problem = f"attention {name!r} cannot be had on {device} here"
    try:
        with attention_backend(name), torch.no_grad():
            dispatch_attention_fn(q, q, q)
            if masked is not None:
                problem = f"attention {name!r} cannot mask keys, and {masked}"
                attention(q, q, q, mask)
        model.set_attention_backend(name)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{problem}: {reason}") from None


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores instead of a mask of booleans, of any shape: 0 where it is True, else -inf."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def _masked_by_channels(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, *, backend: object | None
) -> Tensor:
    """Attention without a mask: every head gets channels more, in which the products of queries and masked
    keys are so negative that their softmax is 0. Values get zeros, for kernels want one width.
    """
    one = torch.zeros(_MASK_CHANNELS, dtype=q.dtype, device=q.device)
    one[0] = 1
    masked = (~key_mask[:, 0, 0, :, None, None]).to(k.dtype) * _MASKED * one  # [B, S, 1, channels]
    out = dispatch_attention_fn(
        torch.cat([q, one.expand(*q.shape[:-1], -1)], dim=-1),
        torch.cat([k, masked.expand(*k.shape[:-1], -1)], dim=-1),
        F.pad(v, (0, _MASK_CHANNELS)),
        scale=q.shape[-1] ** -0.5,
        backend=backend,  # type: ignore[arg-type]
    )
    return out[..., : v.shape[-1]]


def _plain(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Products of matrices, with the scores in the tensors' own precision."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if key_mask is not None:
        scores = scores + (
            additive_mask(key_mask, scores.dtype) if key_mask.dtype == torch.bool else key_mask
        )
    return (scores.softmax(-1) @ v).transpose(1, 2)
