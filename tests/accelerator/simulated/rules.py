"""What a card refuses. For every card: tensors of the host among its own. For Ascend's: float64, complex
numbers and what else its libraries compute wrong, or not at all; each rule says where it comes from.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NAME = "npu"
# diffusers PR 10123, sglang 29011: no tables of positions in them.
_NO_DTYPES = (torch.float64, torch.complex32, torch.complex64, torch.complex128)
# verl 198 for the sum of exponentials; MindSpeed-MM for resizing.
_NOT_IN_BF16 = ("aten::logsumexp", "aten::upsample_", "aten::_upsample_")


def mixed(name: str, tensors: Sequence[Tensor]) -> str | None:
    """What is wrong about the devices of an operation's tensors."""
    hosts = [x for x in tensors if x.device.type != NAME and x.dim()]
    if hosts and any(x.device.type == NAME for x in tensors):
        return f"{name}: a host tensor {list(hosts[0].shape)} among the card's"
    return None


def of_operation(name: str, tensors: Sequence[Tensor]) -> str | None:
    """What an Ascend NPU refuses about an operation's arguments."""
    for x in tensors:
        if wrong := of_dtype(name, x.dtype):
            return wrong
    if name.startswith(_NOT_IN_BF16) and any(x.dtype == torch.bfloat16 for x in tensors):
        return f"{name}: not in bf16 on an NPU"
    return None


def of_dtype(name: str, dtype: torch.dtype) -> str | None:
    """What an Ascend NPU refuses about a tensor."""
    if dtype in _NO_DTYPES:
        return f"{name}: {dtype} on an NPU"
    return None


def of_layout(name: str, layout: object) -> str | None:
    """Of a `memory_format` that is asked for: sglang 27853."""
    if layout in (torch.channels_last, torch.channels_last_3d):
        return f"{name}: {layout}, a layout that an NPU does not have"
    return None


def of_convolution(x: Tensor, groups: int) -> str | None:
    """Of convolutions in three dimensions: Open-Sora 884."""
    if x.dim() == 5 and groups not in (1, x.shape[1]):
        return f"a 3-D convolution of {groups} groups: an NPU's has 1 or as many as input channels"
    return None


def of_attention(q: Tensor, k: Tensor, mask: Tensor | None) -> str | None:
    """Of scaled_dot_product_attention, q [B, N, S, d]: sglang PR 24798 for the mask's dtype, diffusers 14380
    and 14397 for its shapes and for those that are added.
    """
    if q.stride(-1) != 1 or k.stride(-1) != 1:
        return "attention of tensors whose last dimension is not contiguous"
    if mask is None:
        return None
    if mask.dtype not in (torch.bool, q.dtype):
        return f"an attention mask of {mask.dtype} for a query of {q.dtype}"
    if mask.dtype != torch.bool:
        return "an attention mask that is added: an NPU's is of booleans"
    batch, heads, rows, columns = *q.shape[:3], k.shape[2]
    known = [(batch, heads), (batch, 1), (1, 1), ()]
    if tuple(mask.shape) not in [(*front, rows, columns) for front in known]:
        return f"an attention mask {list(mask.shape)}: an NPU's has a row for each of {rows} queries"
    if mask.numel() >= rows * columns and rows > 1:
        return f"an attention mask {list(mask.shape)}, quadratic in the number of tokens"
    return None
