"""AdamW with moments in 8 bits: bitsandbytes' own, in runs that resume."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from opensoraplan.train.config import OptimizerSettings, TrainSettings
from opensoraplan.train.learner.learner import Learner
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")
MakeRun = Callable[..., TrainSettings]
EIGHT = {"bits": 8, "eps": 1e-8}


def parts_of(run: TrainSettings, step: int) -> Mapping[str, Mapping[str, Tensor]]:
    return checkpoint.load(run.output, step).parts


def test_matrices_are_those_of_bitsandbytes_and_vectors_those_of_torch() -> None:
    settings = OptimizerSettings(lr=1e-2, weight_decay=0.1, bits=8, eps=1e-8)
    layers = [nn.Linear(100, 70) for _ in range(2)]  # the last block of numbers is not full
    layers[1].load_state_dict(layers[0].state_dict())
    learner = Learner.from_settings(layers[0], settings)
    options = {"lr": 1e-2, "betas": settings.betas, "eps": 1e-8}
    theirs = bitsandbytes.optim.AdamW8bit([layers[1].weight], weight_decay=0.1, **options)
    torchs = torch.optim.AdamW([layers[1].bias], weight_decay=0.0, fused=True, **options)
    for step in range(1, 6):
        x = torch.randn(8, 100)
        learner.begin_step(step)
        learner.backward(layers[0](x).pow(2).mean())
        learner.finish_step(step)
        layers[1].zero_grad()
        layers[1](x).pow(2).mean().backward()
        theirs.step()
        torchs.step()
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(layers[0].bias, layers[1].bias)
    tensors = learner.parts()["optimizer"]
    assert {name: tensors[name].nbytes for name in tensors if "weight" in name} == {
        "step.weight": 4,
        **{f"{moment}.weight": 7000 for moment in ("exp_avg", "exp_avg_sq")},
        **{f"{moment}_scale.weight": 28 * 4 for moment in ("exp_avg", "exp_avg_sq")},
    }


@pytest.mark.parametrize("adapter", [{}, {"kind": "lora", "rank": 4}], ids=["all weights", "LoRA"])
def test_a_run_learns_and_resumes(tiny_run: MakeRun, adapter: dict[str, object]) -> None:
    def run_of(name: str, **optimizer: object) -> TrainSettings:
        return tiny_run(name, adapter=adapter, optimizer={**EIGHT, **optimizer})

    whole, exact = run_of("whole", steps=4), run_of("exact", steps=4, bits=32)
    train(whole)
    train(exact)
    train(run_of("broken", steps=2))
    resumed = run_of("broken", steps=4)
    train(resumed, resume="latest")
    one, two, three = (parts_of(run, 4) for run in (whole, resumed, exact))
    for part, tensors in one.items():
        assert all(torch.equal(tensor, two[part][name]) for name, tensor in tensors.items()), part
    off = torch.cat([(one["model"][name] - tensor).flatten() for name, tensor in three["model"].items()])
    assert 0 < off.abs().mean() < 4e-3 / 20  # of four steps of 1e-3
    with pytest.raises(ValueError, match=r"optimizer\.bits: 8 -> 32"):
        train(run_of("broken", steps=6, bits=32), resume="latest")


def test_what_it_needs_is_told_before_anything_is_read(
    tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"eps 1e-15 is too small for bits = 8, .* use 1e-8"):
        tiny_run(optimizer={"bits": 8})
    run = tiny_run(optimizer=EIGHT, vae={"pretrained": Path("nowhere")})
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match=r"optimizer\.bits = 8 works in one process only, got 2"):
            train(run)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"optimizer\.bits = 8 needs the package bitsandbytes"):
        train(run)
    assert not run.output.exists()
