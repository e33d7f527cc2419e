"""The denoiser against tensors measured on the original: outputs, loss, gradient norm and
every stored gradient.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opensoraplan import flow
from opensoraplan.models.sparse_ummdit import SparseUMMDiT

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["suv_sparse", "suv_dense_image", "suv_padded_batch"]
TOLERANCE = 1e-5


class Case(NamedTuple):
    model: SparseUMMDiT
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    conditions: dict[str, Tensor]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    folder = GOLDEN / request.param
    config = json.loads((folder / "config.json").read_text())
    weights, inputs, outputs = (
        load_file(folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs")
    )
    conditions = {
        "timestep": inputs["timestep"],
        "encoder_hidden_states": inputs["encoder_hidden_states"][:, 0],
        "pooled_projections": inputs["pooled_projections"][:, 0],
        "encoder_attention_mask": inputs["encoder_attention_mask"][:, 0],
        "attention_mask": inputs["attention_mask"],
    }
    return Case(SparseUMMDiT.from_original(config, weights), inputs, outputs, conditions)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@torch.no_grad()
def test_output(case: Case) -> None:
    valid = case.inputs["attention_mask"].unsqueeze(1)
    output = case.model.eval()(case.inputs["hidden_states"], **case.conditions).sample
    assert relative(output * valid, case.outputs["output"] * valid) < TOLERANCE


@pytest.mark.parametrize("recompute", [{}, {"feed_forwards": 2}, {"blocks": 4}])
def test_training_step(case: Case, recompute: dict[str, Any]) -> None:
    model, inputs, outputs, conditions = case
    model.train().set_recompute(**recompute)
    output = model(outputs["train.noised"], **conditions).sample
    target = flow.velocity_target(inputs["hidden_states"], inputs["noise"])
    valid = inputs["attention_mask"].unsqueeze(1)
    loss = (output - target).square()[valid.expand_as(target) != 0].mean()
    loss.backward()

    assert relative(output * valid, outputs["train.output"] * valid) < TOLERANCE
    assert relative(loss, outputs["train.loss"][0]) < TOLERANCE
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert relative(norm, outputs["train.grad_norm"][0]) < TOLERANCE

    rename = model.original_format().rename
    gradients = {rename(name): p.grad for name, p in model.named_parameters()}
    stored = {name.removeprefix("grad."): g for name, g in outputs.items() if name.startswith("grad.")}
    assert len(stored) > 10
    for name, expected in stored.items():
        gradient = gradients[name]
        assert gradient is not None, name
        if expected.norm() == 0:
            assert gradient.norm() == 0, name
        else:
            assert relative(gradient, expected) < TOLERANCE, name


def test_noise_is_added_as_the_original_adds_it(case: Case) -> None:
    sigma = case.inputs["timestep"] / flow.TIMESTEP_SCALE
    noised = flow.add_noise(case.inputs["hidden_states"], case.inputs["noise"], sigma)
    assert relative(noised, case.outputs["train.noised"]) < TOLERANCE
