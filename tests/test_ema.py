"""The moving average of the weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from opensoraplan.train.config import OptimizerSettings
from opensoraplan.train.learner.ema import Ema, make_ema


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_value_after_each_step_is_the_formula() -> None:
    model = linear()
    ema = Ema(dict(model.named_parameters()), decay=0.5)
    expected = model.weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            model.weight.add_(1.0)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        ema.update(step)
    torch.testing.assert_close(ema.values["weight"], expected)


def test_average_of_bf16_weights_is_fp32() -> None:
    model = linear().bfloat16()
    ema = Ema(dict(model.named_parameters()), decay=0.999)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(1000)
    assert ema.values["weight"].dtype == torch.float32
    # A thousandth of 1.0 is below what bf16 can add to such numbers.
    assert not torch.equal(ema.values["weight"], ema.values["weight"].bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_gives_the_average_and_then_all_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = linear().to(dtype)
    ema = Ema(dict(model.named_parameters()), decay=0.9)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(1)
    own, average = model.weight.detach().clone(), ema.values["weight"].clone()
    with ema.swap_in():
        assert torch.equal(model.weight, average.to(dtype))
        assert not torch.equal(model.weight, own)
    assert torch.equal(model.weight, own)
    assert torch.equal(ema.values["weight"], average)


def test_a_failure_on_the_way_leaves_both_as_they_were() -> None:
    model = nn.ModuleList([linear(), linear()])
    ema = Ema(dict(model.named_parameters()), decay=0.9)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    before = [(weight.clone(), ema.values[name].clone()) for name, weight in model.named_parameters()]
    ema.values["1.weight"] = broken = torch.zeros(7, 7)  # which cannot be copied
    with pytest.raises(RuntimeError), ema.swap_in():
        pass
    for (name, weight), (own, average) in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(weight, own)
        assert ema.values[name] is broken or torch.equal(ema.values[name], average)


def test_weights_are_copied_a_few_at_a_time(watch: Callable[..., Any]) -> None:
    """Were all of them copied to where the average is, they would be in its memory twice."""
    weights = {f"{n}": torch.full((15_000_000,), float(n), dtype=torch.bfloat16) for n in range(5)}
    ema = Ema(weights, decay=0.5)
    for weight in weights.values():
        weight += 1
    of_weights = torch.ops.aten._foreach_lerp_.Scalar, lambda args: sum(weight.nbytes for weight in args[1])
    with watch(*of_weights) as passes:
        ema.update(100)
    assert passes.seen == [120_000_000, 120_000_000, 60_000_000]
    assert [value[0].item() for value in ema.values.values()] == [0.5, 1.5, 2.5, 3.5, 4.5]


def test_settings_say_whether_and_where() -> None:
    weights = dict(linear().named_parameters())
    assert make_ema(weights, OptimizerSettings(ema_decay=None)) is None
    ema = make_ema(weights, OptimizerSettings(ema_decay=0.7, ema_device="cpu"))
    assert ema is not None
    assert ema.decay == 0.7
    assert ema.values["weight"].device == torch.device("cpu")
