"""Schedules, shifts, loss weights, guidance and the Euler step against `scheduler.json`, measured
on the original.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensoraplan import flow

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden/scheduler.json").read_text())


def close(a: Tensor, b: list) -> bool:
    return torch.allclose(a, torch.tensor(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", GOLDEN["sigmas"], ids=lambda case: str(case["config"]))
def test_sampling_sigmas(case: dict[str, Any]) -> None:
    config = case["config"]
    steps = config["num_inference_steps"]
    if config.get("use_linear_quadratic_schedule"):
        sigmas = flow.linear_quadratic_sigmas(steps)
    else:
        dynamic = config.get("use_dynamic_shifting")
        shift = flow.dynamic_shift(*case["latent_hw"]) if dynamic else config["shift"]
        sigmas = flow.sampling_sigmas(steps, shift)
    assert close(sigmas, case["sigmas"])


@pytest.mark.parametrize("case", GOLDEN["train_sigma_shift"], ids=lambda case: str(case["latent_hw"]))
def test_training_shift(case: dict[str, Any]) -> None:
    shifted = flow.shift_sigmas(torch.tensor(case["sigma"]), flow.dynamic_shift(*case["latent_hw"]))
    assert close(shifted, case["shifted"])


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap", "logit_normal"])
def test_loss_weights(weighting: flow.Weighting) -> None:
    table = GOLDEN["loss_weights"]
    assert close(flow.loss_weight(torch.tensor(table["sigma"]), weighting), table[weighting])


def test_mode_density() -> None:
    table = GOLDEN["mode_density"]
    assert close(flow.sigmas_from_uniform_mode(torch.tensor(table["u"]), table["mode_scale"]), table["sigma"])


@pytest.mark.parametrize("case", GOLDEN["guidance"], ids=lambda case: str(case["guidance_scale"]))
def test_guidance(case: dict[str, Any]) -> None:
    guided = flow.guide(
        torch.tensor(case["uncond"]),
        torch.tensor(case["cond"]),
        case["guidance_scale"],
        case["guidance_rescale"],
    )
    assert close(guided, case["guided"])


def test_euler_step() -> None:
    case = GOLDEN["euler_step"]
    sigmas = flow.sampling_sigmas(case["num_inference_steps"], case["shift"])
    step = case["step"]
    stepped = flow.euler_step(
        torch.tensor(case["sample"]), torch.tensor(case["model_output"]), sigmas[step], sigmas[step + 1]
    )
    assert close(stepped, case["next"])
