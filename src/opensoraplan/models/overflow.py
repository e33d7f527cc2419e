"""Values beyond the range of fp16 in a denoiser's streams: set to its largest number in inference, as in the
original, and counted, so that a run can say so.
"""

from collections.abc import Iterable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

LARGEST = torch.finfo(torch.float16).max  # 65504
ROUNDS_TO_INFINITY = 65520.0  # the least fp32 number that does, in fp16


def saturate(stream: Tensor, overflows: list[Tensor] | None) -> Tensor:
    """An fp16 stream with infinities at +-65504 and NaN at 0. `overflows` gets whether there were any: bool
    [] on the stream's device. If it is None, the stream is returned as it is.
    """
    if overflows is None:
        return stream
    # The norm is one pass that writes nothing. Compiled code leaves out the rounding to fp16 between two
    # operations: what overflows there is still a finite fp32 number, which only the clamp holds back.
    largest = torch.linalg.vector_norm(stream, torch.inf).float()
    overflows.append(~(largest < ROUNDS_TO_INFINITY))  # so that NaN counts
    return torch.nan_to_num(stream).clamp(-LARGEST, LARGEST)


def merge_overflows(before: Tensor | None, new: Tensor) -> Tensor:
    """Whether there was an overflow before or now: bool [], in memory of its own, since a CUDA graph writes
    into what it returned before.
    """
    return new.clone() if before is None else before | new


class Saturating(Protocol):
    """A block that says whether it saturated a stream since this was set to None."""

    overflowed: Tensor | None


def take_overflows(blocks: Iterable[nn.Module]) -> list[int]:
    """The numbers, from 0, of the blocks that saturated a stream since the last call. Waits for the device
    once, and not at all where nothing was computed in fp16.
    """
    flags: dict[int, Tensor] = {}
    for index, block in enumerate(cast(Iterable[Saturating], blocks)):
        if (flag := block.overflowed) is not None:
            flags[index], block.overflowed = flag, None
    device = next((flag.device for flag in flags.values()), None)
    found = torch.stack([flag.to(device) for flag in flags.values()]).tolist() if flags else []
    return [index for index, overflowed in zip(flags, found, strict=True) if overflowed]
