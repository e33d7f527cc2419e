"""Key masks on an NPU, whose kernels take none such."""

import pytest
import torch
from simulated.device import Card

from opensoraplan.models.attention import attention, set_backend
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.pipeline import OpenSoraPlanPipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_keys_count_for_nothing(card: Card, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(3, 40, 2, 16).to(dtype).requires_grad_() for _ in range(3))
    mask = (torch.rand(3, 1, 1, 40) < 0.7).index_fill(3, torch.tensor([0]), value=True)
    expected = attention(q, k, v, mask)
    gradients = torch.autograd.grad(expected.float().square().sum(), (q, k, v))
    there = [x.detach().to("npu").requires_grad_() for x in (q, k, v)]
    made = attention(*there, mask.to("npu"))
    off = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(made.cpu(), expected, **off)
    made_gradients = torch.autograd.grad(made.float().square().sum(), there)
    for one, other in zip(made_gradients, gradients, strict=True):
        torch.testing.assert_close(one.cpu(), other, **off)
    hidden = ~mask[:, 0, 0]
    assert not made_gradients[1].cpu()[hidden].any()
    assert not made_gradients[2].cpu()[hidden].any()
    assert card.calls["aten::attention"]


def test_a_backend_is_tried_with_a_mask_as_the_denoiser_has_it(pipeline: OpenSoraPlanPipeline) -> None:
    model: SparseUMMDiT = pipeline.transformer.to("npu")
    set_backend(model, "native", torch.device("npu"), masked="prompts are padded")
