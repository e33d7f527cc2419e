"""Quantises a denoiser's matrices to 8 bits, for generating and as the frozen base of a LoRA, and for the
latter to 4 (nf4.py). Not exact.

"int8" stores the matrices of all blocks in int8 and casts each to the model's precision when it is used, on
any device. "fp8" stores the feed-forwards' matrices, two thirds of the FLOPs of linear layers, in fp8 and
multiplies in fp8, at twice the rate of bf16 on cards with fp8 instructions. Gradients of inputs are those of
the dequantised matrices; the matrices themselves have none.

Both in plain torch, so that it works on every device: torchao has no kernels for NPUs.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensoraplan.defaults import BasePrecision
from opensoraplan.device import dtype_name
from opensoraplan.models.sparse_ummdit import SparseUMMDiT, SparseUMMDiTBlock
from opensoraplan.runtime.nf4 import Nf4Linear, check_nf4

LARGEST_INT8 = 127
FP8 = torch.float8_e4m3fn
LARGEST_FP8 = torch.finfo(FP8).max
# Lowest compute capability with fp8 products: Ada; Hopper and later cards have them, too.
_FP8_CAPABILITY = (8, 9)


class Int8Linear(nn.Module):
    """A linear layer whose weight is `integers` int8 [out, in] times `scale` [out, 1], one for each output.

    Rounding to an integer loses half of a 127th of the largest weight of the same output at most, and the
    product, which is in the layer's precision, as much again. The scale is rounded before the weight is
    divided by it.
    """

    integers: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        integers, scale = _round_to_int8(linear.weight.detach())
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def take(self, weight: Tensor) -> None:
        """Have another weight [out, in] from now on, of any precision and device."""
        integers, scale = _round_to_int8(weight.to(self.scale))
        self.integers.copy_(integers)
        self.scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Int8Product.apply(x, self.integers, self.scale, self.bias))
        return F.linear(x, self.integers * self.scale, self.bias)


class _Int8Product(torch.autograd.Function):
    """What Int8Linear computes, keeping the integers for backward instead of the weight made of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, integers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(integers, scale)
        return F.linear(x, integers * scale, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        integers, scale = ctx.saved_tensors
        return grad @ (integers * scale), None, None, None


class Fp8Linear(nn.Module):
    """A linear layer without bias, x [..., in] -> [..., out] in bf16, that multiplies in fp8: `rounded`
    [out, in] times `scale` [1, out], one for each output, by x with a scale for each token.
    """

    rounded: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        rounded, scale = _round_to_fp8(linear.weight.detach())
        self.register_buffer("rounded", rounded)
        self.register_buffer("scale", scale.t().contiguous())

    def take(self, weight: Tensor) -> None:
        """Have another weight [out, in] from now on, of any precision and device."""
        rounded, scale = _round_to_fp8(weight.to(self.rounded.device, torch.bfloat16))
        self.rounded.copy_(rounded)
        self.scale.copy_(scale.t())

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Fp8Product.apply(x, self.rounded, self.scale))
        return _fp8_linear(x, self.rounded, self.scale)


# Linear layers that keep their weight in fewer bits.
QuantisedLinear = Int8Linear | Fp8Linear | Nf4Linear
QUANTISED = (Int8Linear, Fp8Linear, Nf4Linear)


class _Fp8Product(torch.autograd.Function):
    """What Fp8Linear computes; the gradient of its input is a product in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, scale: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(rounded, scale)
        return _fp8_linear(x, rounded, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        rounded, scale = ctx.saved_tensors
        return grad @ (rounded.to(grad.dtype) * scale.t().to(grad.dtype)), None, None


def _fp8_linear(x: Tensor, rounded: Tensor, scale: Tensor) -> Tensor:
    tokens, token_scale = _round_to_fp8(x.flatten(0, -2))
    y = _scaled_product(tokens, rounded.t(), token_scale, scale)
    return y.unflatten(0, x.shape[:-1])


def _scaled_product(tokens: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor) -> Tensor:
    """bf16 [R, out] of fp8 [R, in] and [in, out], with a scale for each row and each column."""
    if not hasattr(F, "scaled_mm"):  # before torch 2.10
        if tokens.device.type == "cpu":  # which then knows one scale for all only
            return (tokens.float() @ weight.float() * scale * weight_scale).to(torch.bfloat16)
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            tokens, weight, scale, weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(
        tokens, weight, scale, by_row, weight_scale, by_row, output_dtype=torch.bfloat16, use_fast_accum=True
    )


def _round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [out, in] -> its integers [out, in] and scale [out, 1]."""
    largest = weight.float().abs().amax(1, keepdim=True)
    scale = (largest / LARGEST_INT8).to(weight.dtype)
    scale = scale.where(scale > 0, torch.ones_like(scale))
    integers = (weight.float() / scale.float()).round().clamp(-LARGEST_INT8, LARGEST_INT8)
    return integers.to(torch.int8), scale


def _round_to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, C] in bf16 -> [R, C] in fp8, as large as it goes, and what to
    multiply them by, fp32 [R, 1].
    """
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True).float()
    inverse = (LARGEST_FP8 / largest.clamp(min=1e-12)).to(rows.dtype)
    # In bf16 the product may lie a 256th above the largest; fp8 rounds it down to that again.
    return (rows * inverse).to(FP8), 1 / inverse.float()


def quantise_weights(model: SparseUMMDiT, kind: BasePrecision) -> None:
    """Quantise the denoiser's matrices in place, which have no gradients then; layers of LoRAs stay as they
    are. Bytes of the release's: `DenoiserSizes.stored`. Raises ValueError as `check_weight_precision` does.
    """
    check_weight_precision(kind, model.device, model.dtype)
    if kind == "int8":
        _replace_linears(model.transformer_blocks, Int8Linear)
    elif kind == "nf4":
        _replace_linears(model.transformer_blocks, Nf4Linear)
    elif kind == "fp8":
        for block in model.transformer_blocks:
            block = cast(SparseUMMDiTBlock, block)
            for feed_forward in (block.ff, block.ff_enc):
                if feed_forward is not None:
                    _replace_linears(feed_forward, Fp8Linear)


def weight_precision_of(model: nn.Module) -> BasePrecision:
    """The precision that `quantise_weights` gave the model's weights."""
    kinds: dict[type, BasePrecision] = {Int8Linear: "int8", Fp8Linear: "fp8", Nf4Linear: "nf4"}
    found: list[BasePrecision] = [kinds[type(layer)] for layer in model.modules() if type(layer) in kinds]
    return found[0] if found else "whole"


def check_weight_precision(kind: BasePrecision, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError if the device, or a model of this dtype, does not support weights of this precision,
    or a package that they need is missing. CPUs support all, but are slow in fp8.
    """
    if kind == "nf4":
        check_nf4(device)
    if kind != "fp8":
        return
    if dtype != torch.bfloat16:
        name = dtype_name(dtype)
        raise ValueError(f"fp8 weights need dtype bf16, got {name}: use bf16, or int8 weights")
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
    if device.type not in ("cpu", "meta") and not capable:
        raise ValueError(
            f"{device} does not support fp8 products, which need compute capability "
            f"{'.'.join(map(str, _FP8_CAPABILITY))} or more; int8 weights work on all devices"
        )


def _replace_linears(module: nn.Module, kind: Callable[[nn.Linear], nn.Module]) -> None:
    """Make all linear layers inside the module such ones, but for LoRAs'."""
    for name, child in module.named_children():
        if name.startswith("lora_"):
            continue
        if isinstance(child, nn.Linear):
            setattr(module, name, kind(child))
        else:
            _replace_linears(child, kind)
