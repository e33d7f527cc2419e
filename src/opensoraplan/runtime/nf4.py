"""Linear layers whose weight is in four bits, for the frozen base of a LoRA: NF4 of QLoRA (Dettmers et al.,
arXiv 2305.14314), by bitsandbytes. Our own kinds of smaller weights are in quantisation.py.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Numbers that share a scale.
BLOCK = 64


def check_bitsandbytes(what: str) -> None:
    """Raise ValueError without bitsandbytes, which `what` needs."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{what} needs the package bitsandbytes ({error}): pip install 'opensoraplan[bitsandbytes]'"
        ) from None


def check_nf4(device: torch.device) -> None:
    """Raise ValueError if weights cannot be kept in NF4 on this device here."""
    check_bitsandbytes("nf4")
    try:
        layer = Nf4Linear(nn.Linear(BLOCK, BLOCK, device=device))
        layer(torch.zeros(1, BLOCK, device=device))
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"bitsandbytes does not work on {device} here ({reason}): int8 weights work on all devices"
        ) from None


class Nf4Linear(nn.Module):
    """A linear layer whose weight [out, in] is `packed`, uint8 with two numbers of four bits each, of 16
    values that suit normally distributed weights, times `scale`, fp32, one for each 64 numbers.

    Products are in the layer's precision, with the weight made of both.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.shape, self.dtype = weight.shape, weight.dtype
        self.register_buffer("packed", weight.new_empty(math.ceil(weight.numel() / 2), 1, dtype=torch.uint8))
        self.register_buffer(
            "scale", weight.new_empty(math.ceil(weight.numel() / BLOCK), dtype=torch.float32)
        )
        self.bias = linear.bias
        if not weight.is_meta:
            self.take(weight)

    def take(self, weight: Tensor) -> None:
        """Have another weight [out, in] from now on, of any precision and device."""
        from bitsandbytes.functional import quantize_4bit

        weight = weight.to(self.packed.device, self.dtype).contiguous()
        packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        self.packed.copy_(packed)
        self.scale.copy_(state.absmax)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Nf4Product.apply(x, self.packed, self.scale, self.bias, self.shape))
        return F.linear(x, _unpacked(self.packed, self.scale, self.shape, x.dtype), self.bias)


class _Nf4Product(torch.autograd.Function):
    """What Nf4Linear computes, keeping the packed numbers for backward instead of the weight made of them."""

    @staticmethod
    def forward(  # noqa: ANN205
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        shape: torch.Size,
    ):
        ctx.save_for_backward(packed, scale)
        ctx.shape = shape
        return F.linear(x, _unpacked(packed, scale, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN401
        packed, scale = ctx.saved_tensors
        return grad @ _unpacked(packed, scale, ctx.shape, grad.dtype), None, None, None, None


def _unpacked(packed: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in this precision."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(absmax=scale, shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(packed, state)
