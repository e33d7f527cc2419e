"""Operations that cards have kernels of their own for: convolutions, and attention that stores no scores."""

from typing import Any

import torch
from torch import Tensor

from simulated import rules
from simulated.device import CARD, CardError, begin, is_there, on_host, run_on_host, to_card

aten = torch.ops.aten


def register(library: torch.library.Library) -> None:
    library.impl("convolution_overrideable", _convolution, "PrivateUse1")
    library.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        library.impl("scaled_dot_product_attention", _attention, key)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:  # noqa: ANN401
    if CARD.ascend and (wrong := rules.of_convolution(x, rest[-1])):
        raise CARD.fail(CardError, wrong)
    return run_on_host(_convolve, "aten::convolution", x, weight, bias, *rest)


def _convolve(*given: Any) -> Tensor:  # noqa: ANN401
    return aten.convolution(*given).contiguous()  # the host's may have its channels last


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:  # noqa: ANN401
    transposed, groups = rest[3], rest[5]
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    return run_on_host(
        aten.convolution_backward, "aten::convolution_backward", gradient, x, weight, [outputs], *rest
    )


class _Attention(torch.autograd.Function):
    """Attention in pieces, of which the output and a number for each query are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: Any) -> Tensor:  # noqa: ANN401
        out, sums = _forward(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.mask, ctx.scale = mask, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: ANN401
        q, k, v, out, sums = ctx.saved_tensors
        given = [gradients[0], q, k, v, out, sums]
        begin("aten::attention_backward", given)
        made = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(on_host, given), 0.0, False, attn_mask=_added(ctx.mask, q.dtype), scale=ctx.scale
        )
        return (*map(to_card, made), None, None)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or is_causal or enable_gqa:
        raise CARD.fail(
            CardError, "attention with dropout, grouped queries or a causal mask is not simulated"
        )
    if CARD.ascend and (wrong := rules.of_attention(q, k, attn_mask)):
        raise CARD.fail(CardError, wrong)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return _Attention.apply(q, k, v, attn_mask, scale)
    return _forward(q, k, v, attn_mask, scale)[0]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """The output and the logarithms of the sums of exponentials, as torch's kernel for CPUs computes them."""
    given = [q, k, v] if mask is None else [q, k, v, mask]
    begin("aten::attention", given)
    out, sums = aten._scaled_dot_product_flash_attention_for_cpu(
        *map(on_host, given[:3]), attn_mask=_added(mask, q.dtype), scale=scale
    )
    return to_card(out), to_card(sums)


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as torch's kernel for CPUs takes it."""
    if mask is None:
        return None
    mask = on_host(mask) if is_there(mask) else mask
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
