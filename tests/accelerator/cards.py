"""What processes that have a simulated card each run."""

from typing import Any

import denoising
import torch
import torch.distributed as dist
from simulated.device import CARD, install

from opensoraplan import cli

BACKEND = "cpu:gloo,npu:hccl"  # as the command has it


def train(sizes: dict[str, int], options: dict[str, Any]) -> tuple[denoising.Result, dict[str, int]]:
    """What training on the card gives, and how often each operation was called."""
    CARD.reset()
    result = denoising.train(sizes, device="npu", **options)
    assert not CARD.faults, CARD.faults[0]
    return result, CARD.calls


def gather_without_waiting() -> None:
    """A collective of what another stream has not come to an end with, which is an error."""
    x = torch.ones(4, device="npu")
    other = torch.npu.Stream()
    other.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(other):
        x += 1
    dist.all_gather_into_tensor(torch.empty(8, device="npu"), x)


def use_without_waiting(fault: str) -> None:
    """An asynchronous collective of which nobody waits for the end, which is an error to read what it
    receives, and to write what it sends. "none": somebody does.
    """
    x, gathered = torch.ones(4, device="npu"), torch.empty(8, device="npu")
    work = dist.all_gather_into_tensor(gathered, x, async_op=True)
    if fault == "none":
        work.wait()
    if fault != "writes":
        assert gathered.sum().item() == 8
    if fault != "reads":
        x += 1


def command() -> None:
    """`osp`, on the card if that is asked for."""
    install()
    cli.main()
    assert not CARD.faults, CARD.faults[0]
