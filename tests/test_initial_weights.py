"""How models that are trained from nothing start."""

import math

import pytest
import torch
from tiny_models import DENOISER
from torch import Tensor, nn

from opensoraplan.models.initial_weights import initial_weights
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.train.config import ModelSettings, TrainSettings
from opensoraplan.train.learner.building import build

SMALL = {**DENOISER, "num_attention_heads": 4}


@pytest.fixture
def model() -> SparseUMMDiT:
    return SparseUMMDiT(**SMALL)


@pytest.mark.parametrize("kind", ["adaln_zero", "original"])
@pytest.mark.parametrize("change", [{}, {"skip_connection_zero_init": False}, {"norm_cls": "rms_norm"}])
def test_every_parameter_gets_a_value_that_the_seed_decides(kind: str, change: dict) -> None:
    model = SparseUMMDiT(**{**SMALL, **change})
    weights = dict(initial_weights(model, seed=0, kind=kind))
    assert {name: x.shape for name, x in weights.items()} == {
        name: x.shape for name, x in model.state_dict().items()
    }
    again = dict(initial_weights(model.to("meta"), seed=0, kind=kind))
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    other = dict(initial_weights(model, seed=1, kind=kind))
    name = "transformer_blocks.1.attn1.to_q.weight"
    assert not torch.equal(weights[name], other[name])


def test_the_originals_start(model: SparseUMMDiT) -> None:
    weights = dict(initial_weights(model, seed=0, kind="original"))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    skips = {name for name in linears if ".skip" in name}
    plain = {name for name in linears if not name.startswith("transformer_blocks")} - {"norm_out.linear"}

    def spread(names: set[str]) -> Tensor:
        return torch.cat([weights[f"{name}.weight"].flatten() for name in sorted(names)])

    parallel = linears - skips - plain
    assert {name.split(".")[-2] for name in parallel} >= {"norm1", "norm2", "norm_out", "net", "attn1"}
    assert spread(parallel).std().item() == pytest.approx(0.02, rel=0.01)
    assert spread(parallel).abs().max() > 0.06  # a normal distribution has tails
    assert all(not weights[f"{name}.bias"].any() for name in parallel if f"{name}.bias" in weights)
    for name in plain:  # as torch makes them: uniform, biases as well
        bound = 1 / math.sqrt(weights[f"{name}.weight"][0].numel())
        assert bound * 0.9 < weights[f"{name}.weight"].abs().max() <= bound
        assert 0 < weights[f"{name}.bias"].abs().max() <= bound
    for name in skips:
        assert torch.equal(weights[f"{name}.weight"], torch.eye(64, 128))
        assert not weights[f"{name}.bias"].any()


def test_a_run_starts_as_its_settings_say(tiny_run) -> None:  # noqa: ANN001
    def built(**change: str) -> SparseUMMDiT:
        settings: TrainSettings = tiny_run(model={"pretrained": None, "config": SMALL, **change})
        return build(settings, device=torch.device("cpu"))

    ours, original = built(), built(init="original")
    name = "transformer_blocks.0.norm1.linear.weight"
    assert not ours.get_parameter(name).any()
    expected = dict(initial_weights(original, seed=0, kind="original"))
    assert all(torch.equal(value, expected[name]) for name, value in original.state_dict().items())


def test_a_start_and_weights_are_too_much() -> None:
    with pytest.raises(ValueError, match=r"init 'original' is for a new model, but `pretrained` has weights"):
        ModelSettings.read({"pretrained": "model", "init": "original"}, where="model")
