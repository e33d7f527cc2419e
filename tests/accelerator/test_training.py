"""Training runs on the simulated card learn what they learn on the CPU."""

import gc
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated.device import Card
from tiny_models import SHALLOW_VAE

from opensoraplan.models.sizes import BatchShape
from opensoraplan.train.config import TrainSettings, VAETrainSettings
from opensoraplan.train.inputs.cache import write_cache
from opensoraplan.train.inputs.encoders import load_encoders
from opensoraplan.train.learner.fitting import possible_fits
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.planning import training_step
from opensoraplan.train.run.trainer import train

MakeRun = Callable[..., TrainSettings]


def logged(run: TrainSettings | VAETrainSettings, name: str) -> list[float]:
    """The values of that name in metrics.jsonl, in order."""
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def on(device: str, run: TrainSettings) -> TrainSettings:
    return run.model_copy(update={"device": device, "output": run.output.with_name(device)})


def weights(run: TrainSettings | VAETrainSettings, part: str) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(run.output, checkpoint.find(run.output, "latest")).parts[part])


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {},
    "recompute, EMA on the host": {
        "memory": {"recompute_blocks": 4},
        "optimizer": {"steps": 3, "lr": 1e-3, "ema_decay": 0.9, "ema_device": "cpu"},
    },
    "bf16, feed-forwards again": {
        "model": {"compute": "bf16"},
        "memory": {"recompute_feed_forwards": 8},
    },
    "LoRA": {"adapter": {"kind": "lora", "rank": 4}},
    "LoRA, int8, streamed": {
        "adapter": {"kind": "lora", "rank": 4, "base": "int8"},
        "memory": {"placement": "streamed"},
    },
    "DoRA, AdaLN's layers, too, bf16": {
        "adapter": {"kind": "dora", "rank": 2, "targets": [r"attn1\.to_q$", r"norm1\.linear$"]},
        "model": {"compute": "bf16"},
        "memory": {"recompute_blocks": 4},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_those_of_the_cpu(card: Card, tiny_run: MakeRun, case: str) -> None:
    changes = dict(CASES[case])
    optimizer = {"steps": 3, "lr": 1e-3, "ema_decay": 0.9}
    run = tiny_run(**{"optimizer": optimizer, "checkpoint": {"every": 3}, **changes})
    runs = {device: on(device, run) for device in ("cpu", "npu")}
    for one in runs.values():
        train(one)
    off = 2e-3 if run.model.compute == "bf16" else 2e-5
    assert logged(runs["npu"], "loss") == pytest.approx(logged(runs["cpu"], "loss"), rel=off)
    assert logged(runs["npu"], "grad_norm") == pytest.approx(logged(runs["cpu"], "grad_norm"), rel=10 * off)
    expected, made = (weights(one, "ema") for one in runs.values())
    for name, average in expected.items():
        # In its first steps Adam goes by signs: a gradient of rounding alone may go either way.
        assert (made[name] - average).abs().median() < 1e-4, name
    gc.collect()
    assert card.memory.now == 0


def test_streamed_training_equals_resident_training(tiny_run: MakeRun) -> None:
    """Bit for bit; that no copy overtakes what still computes with its place is watched by the card."""
    adapter = {"kind": "lora", "rank": 4}
    memories: dict[str, dict[str, Any]] = {
        "resident": {"recompute_blocks": 4},
        "streamed": {"placement": "streamed", "inputs_on_host": True},
    }
    optimizer = {"steps": 2, "lr": 1e-3, "ema_decay": 0.9}
    runs = [
        tiny_run(name, adapter=adapter, memory=memory, optimizer=optimizer).model_copy(
            update={"device": "npu"}
        )
        for name, memory in memories.items()
    ]
    for run in runs:
        train(run)
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    for part in ("model", "ema", "optimizer"):
        one, two = (weights(run, part) for run in runs)
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_run_with_a_cache_validates_stops_and_goes_on(
    card: Card, tiny_run: MakeRun, tiny_clips: Path
) -> None:
    held_out = {"every": 3, "manifest": tiny_clips, "samples": 2, "sigmas": (0.5,)}
    held_out |= {"prompts": ("a star",), "frames": 9, "height": 32, "width": 32, "sampling_steps": 1}
    changes: dict[str, Any] = {"validation": held_out, "checkpoint": {"every": 3}}
    run = tiny_run(optimizer={"steps": 6, "lr": 1e-3, "ema_decay": 0.9}, **changes)
    runs = {}
    for device in ("cpu", "npu"):
        clips = on(device, run)
        write_cache(clips, folder := clips.output.with_name(f"{device}_features"))
        data = clips.data.model_copy(update={"features": folder})
        runs[device] = clips.model_copy(update={"data": data})
    stopped = runs["npu"].model_copy(
        update={"optimizer": runs["npu"].optimizer.model_copy(update={"steps": 3})}
    )
    train(runs["cpu"])
    train(stopped)
    train(runs["npu"], resume="latest")
    for name in ("loss", "validation/loss"):
        assert logged(runs["npu"], name) == pytest.approx(logged(runs["cpu"], name), rel=2e-5)
    assert card.calls["aten::attention_backward"]


def test_a_vae_learns_as_on_the_cpu(card: Card, tiny_clips: Path, tmp_path: Path) -> None:
    size = {"num_frames": 9, "min_num_frames": 9, "train_fps": 12, "max_height": 64, "max_width": 64}
    losses = {}
    for device, compute in (("cpu", "fp32"), ("npu", "fp32"), ("npu", "bf16")):
        values: dict[str, Any] = {
            "output": tmp_path / f"{device}-{compute}",
            "device": device,
            "model": {"config": SHALLOW_VAE, "compute": compute},
            "data": {
                "manifest": tiny_clips,
                "frames": 9,
                "height": 32,
                "width": 32,
                "workers": 0,
                "selection": size,
            },
            "optimizer": {"steps": 2, "lr": 1e-3, "eps": 1e-8, "ema_decay": 0.9},
            "loss": {"adversarial_start": 2},
            "log": {"every": 1},
            "checkpoint": {"every": 2},
        }
        run = VAETrainSettings.read(values, where="the test's run")
        train(run)
        losses[device, compute] = logged(run, "loss")
    assert losses["npu", "fp32"] == pytest.approx(losses["cpu", "fp32"], rel=1e-4)
    assert losses["npu", "bf16"] == pytest.approx(losses["cpu", "fp32"], rel=2e-2)
    assert card.calls["aten::convolution_backward"]


class StepsOf(logging.Handler):
    """Notes what is allocated after the first step of each run."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        self.between: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("step 1 of "):
            gc.collect()
            self.between.append(self.card.memory.now)


class Squeeze(logging.Handler):
    """Another program takes what is left of the card's memory, but for a MiB, after a run's first step."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("step 1 of "):
            gc.collect()
            self.card.memory.capacity = self.card.memory.now + 2**20


def test_a_run_goes_leaner_when_memory_is_full(
    card: Card, tiny_run: MakeRun, wide_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It repeats the step, and learns what a run learns that is streamed from the start."""
    caplog.set_level(logging.INFO)
    changes: dict[str, Any] = {
        "model": {"pretrained": wide_model},
        "adapter": {"kind": "lora", "rank": 4, "dropout": 0.2},
        "optimizer": {"steps": 2, "lr": 1e-3, "ema_decay": 0.9, "accumulate": 2},
    }
    auto, streamed = (
        tiny_run(name, **changes, memory={"placement": name}).model_copy(update={"device": "npu"})
        for name in ("auto", "streamed")
    )
    train(streamed)
    most = card.memory.peak
    step = training_step(auto, BatchShape((2, 8, 8), 512, 2))
    *_, resident, leanest, _ = possible_fits(auto, step, device=torch.device("npu"))
    assert leanest.device < 0.8 * resident.device
    card.memory.capacity = int(1.4 * resident.device)  # with the encoders, and 8% in reserve
    logger, squeeze = logging.getLogger("opensoraplan.train.log.metrics"), Squeeze(card)
    logger.addHandler(squeeze)
    try:
        train(auto)
    finally:
        logger.removeHandler(squeeze)
    said = [text for text in caplog.messages if "frozen weights" in text]
    assert "memory.placement auto: frozen weights whole, resident" in said[0]
    assert all("memory is full: the step is repeated with frozen weights whole" in text for text in said[1:])
    assert "blocks recomputed; encoders in turn" in said[1]
    assert "streamed" in said[-1]
    assert most < card.memory.capacity
    for name in ("loss", "grad_norm"):
        assert logged(auto, name) == logged(streamed, name)
    for part in ("model", "ema", "optimizer"):
        one, two = weights(auto, part), weights(streamed, part)
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_encoders_in_turn_leave_room_for_the_step(
    card: Card,
    tiny_run: MakeRun,
    wide_model: Path,
    tiny_clips: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is learned, validated and made is the same."""
    caplog.set_level(logging.INFO)
    held_out: dict[str, Any] = {"every": 2, "manifest": tiny_clips, "samples": 2, "sigmas": (0.5,)}
    held_out |= {"prompts": ("a star",), "frames": 9, "height": 32, "width": 32, "sampling_steps": 2}
    runs, steps = {}, StepsOf(card)
    logging.getLogger("opensoraplan.train.log.metrics").addHandler(steps)
    for encoders in ("resident", "in-turn"):
        changes: dict[str, Any] = {"model": {"pretrained": wide_model}, "optimizer": {"steps": 2}}
        run = tiny_run(encoders, **changes, validation=held_out, memory={"encoders": encoders})
        runs[encoders] = run.model_copy(update={"device": "npu"})
        train(runs[encoders])
        gc.collect()
    logging.getLogger("opensoraplan.train.log.metrics").removeHandler(steps)
    for name in ("loss", "validation_loss"):
        assert logged(runs["resident"], name) == logged(runs["in-turn"], name)
    made = [(run.output / "samples" / "step-00000002-0.mp4").read_bytes() for run in runs.values()]
    assert made[0] == made[1]
    loaded = load_encoders(runs["in-turn"].vae, runs["in-turn"].text, device="cpu")
    gone = sum(p.nbytes for model in loaded.models for p in model.parameters())
    assert steps.between[0] - steps.between[1] == pytest.approx(gone, rel=0.05)


def test_a_run_that_cannot_fit_is_refused(card: Card, tiny_run: MakeRun, wide_model: Path) -> None:
    changes: dict[str, Any] = {"adapter": {"kind": "lora", "rank": 4}, "model": {"pretrained": wide_model}}
    run = tiny_run(**changes, memory={"placement": "auto"}).model_copy(update={"device": "npu"})
    card.memory.capacity = 6 * 10**7
    with pytest.raises(MemoryError, match=r"even the leanest way \(frozen weights whole, streamed"):
        train(run)
    assert not run.output.exists()
