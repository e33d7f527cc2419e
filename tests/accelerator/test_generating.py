"""Videos by sessions and commands on the simulated card, in each placement and with little memory: they are
those of the CPU.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
from simulated.device import Card
from torch import Tensor

from opensoraplan import cli
from opensoraplan.data.video import read_frames
from opensoraplan.generate.planning import needs_of
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


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Run a command in this process."""
    monkeypatch.setattr(sys, "argv", ["osp", *map(str, words)])
    cli.main()


def test_commands_that_make_and_measure_videos(
    card: Card, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generate, calibrate, decode what is saved, reconstruct: each on the card, and as on the CPU."""
    size = ["--frames", 9, "--height", 32, "--width", 32, "--steps", 4]
    made = {}
    for device in ("cpu", "npu"):
        folder = tmp_path / device
        same = ("--device", device, "--dtype", "fp32")
        command(
            monkeypatch, "generate", "waves", "--model", tiny_model, *size, *same, "--out", folder / "a.mp4"
        )
        ratios = folder / "step_cache.json"
        command(monkeypatch, "calibrate", "--model", tiny_model, *size, *same, "--out", ratios)
        command(
            monkeypatch,
            "reconstruct",
            folder / "a.mp4",
            "--vae",
            tiny_model,
            *same,
            "--out",
            folder / "b.mp4",
        )
        made[device] = read_frames(folder / "a.mp4"), read_frames(folder / "b.mp4"), ratios.read_text()
    for on_cpu, on_card in zip(made["cpu"][:2], made["npu"][:2], strict=True):
        assert (on_cpu.float() - on_card.float()).abs().mean() < 1
    assert card.calls["aten::convolution"] > 0
