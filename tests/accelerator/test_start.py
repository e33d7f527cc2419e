"""How a device is found, and what it is told at the start."""

import os

import pytest
import torch
from simulated.device import Card

from opensoraplan.device import available, free_memory, prepare, resolve_device, total_memory


def test_a_card_that_torch_has_loaded_is_found(card: Card) -> None:
    assert resolve_device(None) == resolve_device("npu") == torch.device("npu")
    assert available() == "npu or cpu"
    with pytest.raises(ValueError, match=r"'npu:1': there are 1, the last is npu:0"):
        resolve_device("npu:1")
    card.memory.capacity = card.memory.now + 100
    assert free_memory(torch.device("npu")) == 100
    assert total_memory(torch.device("npu")) == card.memory.capacity


def test_an_npu_is_told_what_video_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HCCL_EXEC_TIMEOUT", "PYTORCH_NPU_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "60")
    monkeypatch.setattr(torch.npu.config, "allow_internal_format", True)
    monkeypatch.setattr(torch.npu, "jit_compile", True)
    prepare(torch.device("npu"))
    assert not torch.npu.config.allow_internal_format
    assert not torch.npu.jit_compile
    assert os.environ["HCCL_CONNECT_TIMEOUT"] == "60"  # which the user has set
    assert os.environ["HCCL_EXEC_TIMEOUT"] == "7200"
    assert os.environ["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
