"""Attention proper: what trains short sequences on a CPU is SDPA up to the precision of bf16."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from opensoraplan.models.attention import additive_mask, attention, set_backend
from opensoraplan.pipeline import OpenSoraPlanPipeline


def with_gradients(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, ours: bool) -> list[Tensor]:
    """The output and the gradients of its sum of squares."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    if ours:
        out = attention(*inputs, mask)
    else:
        heads_first = (x.transpose(1, 2) for x in inputs)
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


@pytest.mark.parametrize("masked", ["not", "by booleans", "by what is added"])
@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
def test_training_gives_the_outputs_and_gradients_of_sdpa(
    masked: str, dtype: torch.dtype, off: float
) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 40, 2, 16).to(dtype).float() for _ in range(3))
    mask = torch.arange(40)[None, None, None] < torch.tensor([40, 25, 7])[:, None, None, None]
    key_mask = None if masked == "not" else mask
    expected = with_gradients(q, k, v, key_mask, ours=False)
    if masked == "by what is added":
        key_mask = additive_mask(mask, dtype)
    got = with_gradients(*(x.to(dtype) for x in (q, k, v)), key_mask, ours=True)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        assert ((one.float() - other).norm() / other.norm()) < off


def test_a_backend_that_does_not_work_here_is_refused(pipeline: OpenSoraPlanPipeline) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="attention '_native_cudnn' cannot be had on cpu here: "):
        set_backend(pipeline.transformer, "_native_cudnn", cpu)
    q = torch.zeros(1, 4, 2, 16)
    mask = additive_mask(torch.arange(4) < 3, q.dtype)[None, None, None]
    with pytest.raises(ValueError, match="'_native_flash' cannot mask keys, and prompts are padded: "):
        set_backend(pipeline.transformer, "_native_flash", cpu, masked="prompts are padded")
    attention(q, q, q, mask)  # what is refused was not set
    set_backend(pipeline.transformer, "_native_flash", cpu)
    with pytest.raises(ValueError, match="not supported"):
        attention(q, q, q, mask)
    # The last, for diffusers takes it for all models from now on.
    set_backend(pipeline.transformer, "native", cpu, masked="prompts are padded")
