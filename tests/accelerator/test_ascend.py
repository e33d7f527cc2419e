"""What Ascend's NPUs refuse, each done on purpose."""

from collections.abc import Callable

import pytest
import torch
from simulated.device import Card, CardError
from torch.nn import functional as F


def keys(mask: torch.Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """Attention of 4 queries and 4 keys under a mask."""
    q = torch.randn(2, 3, 4, 8, device="npu", dtype=dtype)
    return lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, device="npu", dtype=dtype)


VIOLATIONS: dict[str, tuple[Callable[[], object], str]] = {
    "fp64": (lambda: torch.arange(4, dtype=torch.float64, device="npu"), "torch.float64 on an NPU"),
    "fp64 from the host": (lambda: torch.ones(4, dtype=torch.float64).to("npu"), "torch.float64"),
    "complex": (lambda: torch.polar(ones(4), ones(4)), "torch.complex64 on an NPU"),
    "added mask": (lambda: keys(ones(2, 1, 4, 4, dtype=torch.bfloat16))(), "mask that is added"),
    "mask of another dtype": (lambda: keys(ones(2, 1, 4, 4))(), "mask of torch.float32 for a query of"),
    "mask without rows": (lambda: keys(ones(2, 1, 1, 4) > 0)(), "has a row for each of 4 queries"),
    "quadratic mask": (lambda: keys(ones(4, 4) > 0)(), "quadratic in the number of tokens"),
    "grouped": (
        lambda: F.conv3d(ones(1, 4, 3, 3, 3), ones(4, 2, 1, 1, 1), groups=2),
        "3-D convolution of 2 groups",
    ),
    "channels last": (
        lambda: ones(1, 2, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d),
        "channels_last_3d, a layout",
    ),
    "bf16 resizing": (
        lambda: F.interpolate(ones(1, 1, 4, 4, dtype=torch.bfloat16), scale_factor=2, mode="bilinear"),
        "not in bf16",
    ),
    "bf16 logsumexp": (lambda: ones(4, dtype=torch.bfloat16).logsumexp(0), "not in bf16"),
    "strided heads": (
        lambda: F.scaled_dot_product_attention(*[ones(1, 2, 8, 4).transpose(2, 3)] * 3),
        "last dimension is not contiguous",
    ),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_an_error(card: Card, name: str) -> None:
    violate, message = VIOLATIONS[name]
    with pytest.raises(CardError, match=message):
        violate()
    assert card.faults
    card.faults.clear()


def test_depthwise_convolutions_are_allowed() -> None:
    F.conv3d(ones(1, 4, 3, 3, 3), ones(4, 1, 1, 1, 1), groups=4)
    F.conv2d(ones(1, 4, 3, 3), ones(4, 2, 1, 1), groups=2)


def test_other_cards_have_fp64(card: Card) -> None:
    card.ascend = False
    assert torch.ones(2, dtype=torch.float64, device="npu").sum().item() == 2
