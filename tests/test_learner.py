"""A learner: what it trains, what it leaves alone, and what a checkpoint has of it."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from opensoraplan.train.config import OptimizerSettings
from opensoraplan.train.learner.gradient_clip import AdaptiveClip, FixedClip
from opensoraplan.train.learner.learner import Learner
from opensoraplan.train.learner.master import MasterWeights
from opensoraplan.train.learner.optimizer import make_optimizer
from opensoraplan.train.run import checkpoint

SETTINGS = OptimizerSettings(lr=0.1, warmup_steps=2, ema_decay=0.9, weight_decay=0.01)
INPUTS = torch.linspace(-1, 1, 12).reshape(4, 3)


class Small(nn.Module):
    """A base that may be frozen, a norm with running statistics, and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5, affine=False)
        self.head = nn.Linear(5, 2)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.base(x)))


def small(seed: int = 0, *, frozen: bool = True) -> Small:
    module = Small(seed)
    module.base.requires_grad_(not frozen)
    return module


def take_step(learner: Learner, step: int) -> None:
    learner.begin_step(step)
    for inputs in INPUTS.chunk(2):
        inputs = inputs.to(learner.module.head.weight.dtype)
        learner.backward(learner.module(inputs).float().square().mean())
    learner.clip_gradients()
    learner.finish_step(step)


def in_bf16(seed: int = 0) -> Learner:
    return Learner.from_settings(
        small(seed), SETTINGS, clip=AdaptiveClip(), master=torch.float32, compute=torch.bfloat16
    )


def test_frozen_parameters_have_no_master_copy_no_optimizer_state_no_ema_and_are_not_saved() -> None:
    learner = in_bf16()
    take_step(learner, 1)
    trained = {"head.weight", "head.bias"}
    assert set(learner.parameters) == trained
    assert {p.dtype for p in learner.parameters.values()} == {torch.float32}
    assert {p.dtype for p in learner.module.parameters()} == {torch.bfloat16}
    assert len(learner.optimizer.state) == len(trained)
    assert learner.ema is not None
    assert set(learner.ema.values) == trained
    parts = learner.parts()
    assert set(parts) == {"model", "optimizer", "ema"}
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert set(parts["model"]) == trained | buffers
    assert set(parts["optimizer"]) == {f"{k}.{n}" for k in ("step", "exp_avg", "exp_avg_sq") for n in trained}


def test_a_frozen_base_stays_bit_for_bit() -> None:
    module = small().bfloat16()
    before = module.base.weight.clone()
    module.head.float()
    learner = Learner.from_settings(module, SETTINGS, clip=AdaptiveClip(), compute=torch.bfloat16)
    head = learner.parameters["head.weight"].detach().clone()
    take_step(learner, 1)
    assert torch.equal(module.base.weight, before)
    assert module.base.weight.grad is None
    assert not torch.equal(learner.parameters["head.weight"], head)


def test_where_both_precisions_are_the_same_nothing_is_copied() -> None:
    module = small()
    learner = Learner.from_settings(module, SETTINGS)
    assert learner.parameters["head.weight"] is module.head.weight


def test_frozen_weights_are_saved_on_request() -> None:
    module = small()
    learner = Learner.from_settings(module, SETTINGS, save_frozen=True)
    assert set(learner.parts()["model"]) == set(module.state_dict())
    assert not any("base" in name for name in learner.parts()["optimizer"])


def test_steps_are_those_of_the_parts_by_hand() -> None:
    module, by_hand = small(frozen=False), small(frozen=False)
    learner = Learner.from_settings(module, SETTINGS, clip=FixedClip(1e6))
    optimizer = make_optimizer(dict(by_hand.named_parameters()), SETTINGS)
    for step, rate in ((1, 0.05), (2, 0.1), (3, 0.1)):
        take_step(learner, step)
        assert learner.rate == rate
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        for inputs in INPUTS.chunk(2):
            by_hand(inputs).square().mean().backward()
        optimizer.step()
    for name, weight in by_hand.named_parameters():
        assert torch.equal(learner.parameters[name], weight), name


def test_a_gradient_that_is_not_finite_is_skipped() -> None:
    learner = Learner.from_settings(small(), SETTINGS, clip=FixedClip(1.0))
    learner.begin_step(1)
    learner.backward(learner.module(INPUTS).square().mean() * torch.inf)
    norm, clipping = learner.clip_gradients()
    assert not math.isfinite(norm)
    assert clipping.action == "skip"


def test_loaded_from_a_checkpoint_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    first, second = in_bf16(), in_bf16(seed=1)
    second.module.base.load_state_dict(first.module.base.state_dict())  # from what the run was begun with
    for step in (1, 2):
        take_step(first, step)
    checkpoint.save(tmp_path, 2, parts=first.parts(), state=first.state_dict())
    saved = checkpoint.load(tmp_path, 2)
    assert not any("base" in name for part in saved.parts.values() for name in part)
    checkpoint.read_into(tmp_path, 2, second.parts())
    second.load_state_dict(saved.state)
    for name, weight in first.module.state_dict().items():
        assert torch.equal(weight, second.module.state_dict()[name]), name
    for step in (3, 4):
        take_step(first, step)
        take_step(second, step)
    assert first.state_dict() == second.state_dict()
    for part, tensors in first.parts().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second.parts()[part][name]), f"{part} {name}"


def test_averaged_gives_the_module_the_ema_and_then_its_own_weights() -> None:
    learner = in_bf16()
    for step in (1, 2, 3):
        take_step(learner, step)
    assert learner.ema is not None
    own = {name: p.detach().clone() for name, p in learner.module.named_parameters()}
    average = learner.ema.values["head.weight"].bfloat16()
    with learner.use_ema():
        assert torch.equal(learner.module.head.weight, average)
        assert torch.equal(learner.module.base.weight, own["base.weight"])
        assert not torch.equal(average, own["head.weight"])
    for name, p in learner.module.named_parameters():
        assert torch.equal(p, own[name]), name


def test_parts_of_another_learner_of_the_run_have_its_name() -> None:
    weights = MasterWeights(small(), master=torch.float32, compute=torch.float32)
    learner = Learner(weights, make_optimizer(weights.parameters, SETTINGS), name="discriminator")
    assert list(learner.parts()) == ["discriminator", "discriminator_optimizer"]
    assert learner.state_dict() == {}


@pytest.mark.parametrize("norm", [0.5, 2.0])
def test_fixed_clip_scales_down_to_its_bound(norm: float) -> None:
    clipping = FixedClip(1.0).decide(norm)
    assert clipping.action == ("clipped" if norm > 1 else "step")
    assert norm * clipping.scale == min(norm, 1.0)
