"""Videos by sessions and commands on the simulated card, in each placement and with little memory: they are
those of the CPU.
"""

import gc
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cards
import pytest
import torch
from command import Command, Running
from PIL import Image
from simulated.device import Card
from tiny_models import LORA_LAYERS, lora_of
from torch import Tensor

from opensoraplan.data.video import read_frames
from opensoraplan.defaults import WeightPrecision
from opensoraplan.formats.lora import write_lora
from opensoraplan.generate.planning import needs_of
from opensoraplan.generate.saved import SUFFIX
from opensoraplan.generate.session import Session, SessionOptions
from opensoraplan.requests import Request
from opensoraplan.runtime.placement import MARGIN, PLACEMENTS, Placement, plans_for

REQUEST = Request(prompt="a red star", frames=9, height=32, width=32, steps=3, seed=1)


def options_of(model: Path, device: str, **changes: Any) -> SessionOptions:  # noqa: ANN401
    return SessionOptions(model, device=device, dtype="fp32", progress=False, **changes)


def frames_of(options: SessionOptions, request: Request = REQUEST) -> Tensor:
    """int16 frames by a session of its own."""
    with Session.open(options, request) as session:
        frames = session.run(request).frames
    assert frames is not None
    return frames.short()


def assert_alike(made: Tensor, expected: Tensor) -> None:
    """Frames that differ by rounding to one of 256 levels, and seldom."""
    off = (made - expected).abs()
    assert off.max() <= 1
    assert off.float().mean() < 1e-2


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> Tensor:
    return frames_of(options_of(tiny_model, "cpu"))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_each_placement_gives_the_frames_of_the_cpu(
    card: Card, tiny_model: Path, expected: Tensor, placement: Placement
) -> None:
    made = frames_of(options_of(tiny_model, "npu", memory=placement))
    assert_alike(made, expected)
    gc.collect()
    assert card.memory.now == 0


@pytest.mark.parametrize("weights", ["whole", "int8"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_videos_with_given_frames_are_those_of_the_cpu(
    card: Card, tiny_model: Path, tmp_path: Path, placement: Placement, weights: WeightPrecision
) -> None:
    file = str(tmp_path / "picture.png")
    Image.effect_mandelbrot((60, 40), (-3, -2.5, 2, 2.5), 100).convert("RGB").save(file)
    request = REQUEST.model_copy(update={"frames": 17, "image": file, "last_image": file, "extend": 8})
    wanted = frames_of(options_of(tiny_model, "cpu", weights=weights), request)
    made = frames_of(options_of(tiny_model, "npu", memory=placement, weights=weights), request)
    assert len(made) == 25
    assert_alike(made, wanted)
    gc.collect()
    assert card.memory.now == 0


def test_auto_takes_the_fastest_plan_that_the_memory_has_room_for(card: Card, wide_model: Path) -> None:
    """And what is counted then is no more than there is, without the margin, which is for libraries."""
    request = Request(prompt="a red star", frames=9, height=64, width=64, steps=1, seed=1)
    with Session.open(options_of(wide_model, "cpu"), request) as session:
        needs = needs_of(session.pipeline, request)
        expected = session.run(request).frames
    assert expected is not None
    for placement in PLACEMENTS:
        plan = min((plan for plan in plans_for([needs]) if plan.placement == placement), key=lambda p: p.peak)
        gc.collect()
        assert card.memory.now == 0
        card.memory.capacity = int(plan.peak / (1 - MARGIN)) + 1
        with Session.open(options_of(wide_model, "npu"), request) as session:
            assert session.arrangement is not None
            assert session.arrangement.plan == plan
            card.memory.capacity = plan.peak * 1.02
            frames = session.run(request).frames
            assert session.arrangement.plan == plan
        assert frames is not None
        assert_alike(frames.short(), expected.short())
        del session


def test_full_memory_goes_on_by_a_leaner_plan_and_nothing_is_lost(
    card: Card, tiny_model: Path, expected: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    steps = []

    def on_step(step: int, _latents: Tensor) -> None:
        steps.append(step)
        if step == 2:  # another program takes what was left
            card.memory.capacity = card.memory.now + 1000

    with Session.open(options_of(tiny_model, "npu"), REQUEST) as session:
        assert session.arrangement is not None
        assert session.arrangement.plan.placement == "resident"
        frames = session.run(REQUEST, on_step=on_step).frames
        assert session.arrangement.plan.placement != "resident"
    assert frames is not None
    assert_alike(frames.short(), expected)
    assert steps == [1, 2, 3]
    assert "out of memory while denoising" in caplog.text


def test_int8_weights_and_a_step_cache(card: Card, tiny_model: Path) -> None:
    request = Request(prompt="waves", frames=9, height=32, width=32, steps=4, step_cache=0.5)
    how = {"weights": "int8", "step_ratios": [0.99] * 4, "fingerprints": {}}
    expected = frames_of(options_of(tiny_model, "cpu", **how), request)
    for placement in PLACEMENTS:
        card.calls.clear()
        assert_alike(frames_of(options_of(tiny_model, "npu", memory=placement, **how), request), expected)
        assert 0 < card.calls["aten::attention"] < 40  # without the cache they are 8 each of 8 passes


def test_fp8_is_for_cards_that_multiply_in_it(tiny_model: Path) -> None:
    options = SessionOptions(tiny_model, device="npu", weights="fp8", progress=False)
    with pytest.raises(
        ValueError, match=r"npu does not support fp8 products.* int8 weights work on all devices"
    ):
        Session.open(options, REQUEST)


def test_commands_that_make_and_measure_videos(
    card: Card, osp: Command, tiny_model: Path, tmp_path: Path
) -> None:
    """Generate, calibrate, reconstruct: each on the card, and as on the CPU."""
    size = ["--frames", 9, "--height", 32, "--width", 32, "--steps", 4]
    made = {}
    for device in ("cpu", "npu"):
        same = ("--device", device, "--dtype", "fp32", "--out")
        model = ("--model", tiny_model, *size, *same)
        for words in (
            ("generate", "waves", *model, f"{device}.mp4"),
            ("calibrate", *model, f"{device}_ratios.json"),
            ("reconstruct", f"{device}.mp4", "--vae", tiny_model, *same, f"{device}_again.mp4"),
        ):
            outcome = osp(*words)
            assert outcome.code == 0, outcome
        videos = [read_frames(tmp_path / f"{device}{end}.mp4") for end in ("", "_again")]
        made[device] = videos, json.loads((tmp_path / f"{device}_ratios.json").read_text())["ratios"]
    for on_cpu, on_card in zip(made["cpu"][0], made["npu"][0], strict=True):
        assert (on_cpu.float() - on_card.float()).abs().mean() < 1
    assert made["npu"][1] == pytest.approx(made["cpu"][1], rel=1e-3)
    assert card.calls["aten::convolution"] > 0


def test_latents_of_a_stopped_video_are_decoded(
    card: Card, osp: Command, start: Callable[..., Running], tiny_model: Path, tmp_path: Path
) -> None:
    size = ["--frames", 9, "--height", 32, "--width", 32, "--steps", 400, "--save-every", 1]
    words = ["generate", "waves", "--model", tiny_model, *size, "--device", "npu", "--dtype", "fp32"]
    job = start(*words, "--out", "video.mp4", program=cards.command)
    latents = tmp_path / f"video{SUFFIX}"
    job.wait_until(latents.exists)
    job.send(signal.SIGINT)
    assert job.wait() == 130, job.said()
    assert not (tmp_path / "video.mp4").exists()
    for device in ("cpu", "npu"):
        outcome = osp("decode", latents, "--device", device, "--out", f"{device}.mp4")
        assert outcome.code == 0, outcome
        assert "of 400 steps are done" in outcome.log
    expected, made = (read_frames(tmp_path / f"{device}.mp4").float() for device in ("cpu", "npu"))
    assert (made - expected).abs().mean() < 0.5
    assert card.calls["aten::convolution"] > 0


@pytest.mark.parametrize(
    ("placement", "weights"), [("resident", "whole"), ("in-turn", "int8"), ("streamed", "whole")]
)
def test_loras_in_each_placement(
    card: Card, tiny_model: Path, tmp_path: Path, placement: Placement, weights: WeightPrecision
) -> None:
    """Of attention, of feed-forwards, and of AdaLN's layers, which may stay on the host."""
    layers = (*LORA_LAYERS, "transformer_blocks.0.norm1.linear", "norm_out.linear")
    file = tmp_path / "a.safetensors"
    write_lora(lora_of(tiny_model, seed=1, layers=layers), file, kind="diffusers")
    loras = ((f"{file}:0.5",), (f"{file}:0",), ())
    requests = [REQUEST.model_copy(update={"lora": lora}) for lora in loras]
    made = {}
    for device, memory in (("cpu", "auto"), ("npu", placement)):
        with Session.open(
            options_of(tiny_model, device, memory=memory, weights=weights), requests
        ) as session:
            made[device] = [session.run(request).frames for request in requests]
    for expected, frames in zip(made["cpu"], made["npu"], strict=True):
        assert_alike(frames.short(), expected.short())
    assert torch.equal(made["npu"][1], made["npu"][2])
    assert (made["cpu"][0].short() - made["cpu"][1].short()).abs().float().mean() > 1
    del session
    gc.collect()
    assert card.memory.now == 0
