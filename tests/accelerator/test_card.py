"""The simulated card itself: it computes as the CPU does, and finds each kind of fault, made on purpose."""

import gc

import pytest
import torch
from simulated.device import Card, CardError
from simulated.streams import OrderError
from torch import nn
from torch.nn import functional as F


def test_operations_views_and_gradients_are_those_of_the_cpu() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    expected = model(x).square().sum()
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.to("npu")
    loss = model(x.to("npu")).square().sum()
    loss.backward()
    assert loss.device.type == "npu"
    torch.testing.assert_close(loss.cpu(), expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.cpu(), gradient)


def test_views_share_memory_with_what_they_are_views_of(card: Card) -> None:
    x = torch.zeros(4, 6, device="npu")
    before = card.memory.now
    row = x[1].view(2, 3).t()
    row += 1
    x[:, 0].fill_(7)
    assert card.memory.now == before
    assert x.cpu()[1].tolist() == [7, 1, 1, 1, 1, 1]


def test_memory_is_counted_while_it_lives(card: Card) -> None:
    gc.collect()
    before = card.memory.now
    x = torch.zeros(1000, device="npu")
    view = x[:10]
    assert card.memory.now - before == 4096
    del x
    assert card.memory.now - before == 4096
    del view
    assert card.memory.now == before
    assert card.memory.peak >= before + 4096


def test_a_leak_of_one_block_is_found(card: Card) -> None:
    gc.collect()
    before = card.memory.now
    kept = []
    for _ in range(3):
        x = torch.ones(256, device="npu")
        kept.append(x if not kept else None)
    del x
    assert card.memory.now - before == 1024


def test_beyond_the_cap_torchs_own_error_comes_and_nothing_is_lost(card: Card) -> None:
    card.memory.capacity = card.memory.now + 2048
    x = torch.ones(256, device="npu")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2048 bytes"):
        torch.ones(512, device="npu")
    assert torch.npu.mem_get_info()[0] == 1024
    assert x.add_(1).sum().item() == 512


def test_a_missing_wait_is_an_error(card: Card) -> None:
    host = torch.full((4,), 3.0).pin_memory()
    target = torch.zeros(4, device="npu")
    copies = torch.npu.Stream()
    copies.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(copies):
        target.copy_(host, non_blocking=True)
    with pytest.raises(OrderError, match="does not wait for stream"):
        target + 1
    torch.npu.current_stream().wait_stream(copies)
    assert (target + 1).cpu().tolist() == [4.0] * 4
    assert "does not wait" in card.faults.pop()


def test_memory_that_another_stream_reads_is_not_written_before_it_is_waited_for(card: Card) -> None:
    x = torch.ones(4, device="npu")
    other = torch.npu.Stream()
    other.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(other):
        y = x * 2
        done = other.record_event()
    with pytest.raises(OrderError, match="which reads the same memory"):
        x.zero_()
    done.wait()
    x.zero_()
    assert (x + y).cpu().tolist() == [2.0] * 4
    card.faults.clear()


def test_a_copy_without_blocking_arrives_when_it_is_waited_for() -> None:
    x = torch.ones(4, device="npu")
    there = torch.zeros(4).pin_memory()
    there.copy_(x, non_blocking=True)
    assert there.tolist() == [0.0] * 4
    torch.npu.synchronize()
    assert there.tolist() == [1.0] * 4


def test_memory_of_the_host_is_not_written_while_a_copy_of_it_is_under_way(card: Card) -> None:
    host = torch.ones(4).pin_memory()
    x = torch.zeros(4, device="npu").copy_(host, non_blocking=True)
    host.zero_()
    x.cpu()
    assert "written while a copy" in card.faults.pop()


def test_freed_memory_is_not_taken_while_another_stream_may_use_it(card: Card) -> None:
    x, recorded = torch.ones(4, device="npu"), torch.ones(4, device="npu")
    other = torch.npu.Stream()
    other.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(other):
        made = x + recorded
    recorded.record_stream(other)
    del recorded
    torch.ones(4, device="npu")
    assert not card.faults
    del x
    torch.ones(4, device="npu")
    assert "takes freed memory that stream" in card.faults.pop()
    del made
    torch.npu.current_stream().wait_stream(other)
    torch.ones(4, device="npu")
    assert not card.faults


def test_a_storage_gives_its_memory_back_and_takes_it_again(card: Card) -> None:
    gc.collect()
    before = card.memory.now
    x = torch.ones(1024, device="npu")
    storage = x.untyped_storage()
    storage.resize_(0)
    assert storage.size() == card.memory.now - before == 0
    storage.resize_(4096)
    assert storage.size() == card.memory.now - before == 4096
    assert x.fill_(2).sum().item() == 2048


def test_a_copy_from_memory_that_is_not_pinned_does_not_run_beside(card: Card) -> None:
    with pytest.raises(CardError, match="not pinned"):
        torch.zeros(4, device="npu").copy_(torch.ones(4), non_blocking=True)
    card.faults.clear()


def test_a_tensor_of_the_host_among_the_cards_is_an_error(card: Card) -> None:
    x = torch.ones(4, 4, device="npu")
    for wrong in (lambda: x + torch.ones(4), lambda: x[torch.tensor([1, 2])]):
        with pytest.raises((CardError, RuntimeError), match=r"host tensor|same device|indices"):
            wrong()
    assert (x + torch.tensor(1.0)).sum().item() == 32
    card.faults.clear()


def test_random_numbers_are_the_cards_own() -> None:
    torch.manual_seed(3)
    first = torch.rand(4, device="npu").cpu()
    state = torch.npu.get_rng_state()
    second = torch.rand(4, device="npu").cpu()
    torch.npu.set_rng_state(state)
    assert torch.rand(4, device="npu").cpu().equal(second)
    torch.manual_seed(3)
    assert torch.rand(4, device="npu").cpu().equal(first)
    generator = torch.Generator("npu").manual_seed(1)
    assert torch.randn(2, device="npu", generator=generator).device.type == "npu"


def test_autocast_computes_products_in_the_lower_precision() -> None:
    layer = nn.Linear(4, 4).to("npu")
    with torch.autocast("npu", dtype=torch.bfloat16):
        y = layer(torch.ones(2, 4, device="npu"))
        assert y.dtype == torch.bfloat16
        assert F.layer_norm(y, (4,)).dtype == torch.float32
    assert layer(torch.ones(2, 4, device="npu")).dtype == torch.float32
