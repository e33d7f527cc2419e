"""Adaptive clipping: the original's sequence step by step, outliers, resuming, and the norms themselves."""

import json
import math
from pathlib import Path

import pytest
import torch

from opensoraplan.train.learner.gradient_clip import (
    AdaptiveClip,
    Clipping,
    GradientOutlierError,
    Outlier,
    global_norm,
    scale_,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "adaptive_clip.json").read_text())


def settled(outlier: Outlier = "skip") -> AdaptiveClip:
    """After 50 norms around 0.2: the outlier limit is 5, the threshold is below 2."""
    clip = AdaptiveClip(outlier=outlier)
    for step in range(50):
        clip.decide(0.2 + 0.05 * (step % 3))
    return clip


def check(decision: Clipping, expected: dict[str, float]) -> None:
    assert decision.threshold == pytest.approx(expected["threshold"], rel=1e-14, abs=1e-15)
    assert decision.mean == pytest.approx(expected["mean"], rel=1e-14, abs=1e-15)
    assert decision.std == pytest.approx(expected["var"] ** 0.5, rel=1e-14, abs=1e-15)
    assert decision.scale * expected["norm"] == pytest.approx(expected["clipped_norm"], rel=1e-14, abs=1e-15)


def test_the_originals_sequence() -> None:
    clip = AdaptiveClip()
    actions = []
    for expected in GOLDEN:
        decision = clip.decide(expected["norm"])
        check(decision, expected)
        assert (decision.action == "skip") == expected["stop"]
        actions.append(decision.action)
    assert [index for index, action in enumerate(actions) if action == "clipped"] == [20]
    assert [index for index, action in enumerate(actions) if action == "skip"] == [55]


def test_the_originals_sequence_with_stop() -> None:
    clip = AdaptiveClip(outlier="stop")
    for expected in GOLDEN:
        if expected["stop"]:
            with pytest.raises(GradientOutlierError, match=r"norm is 7\.5; up to 5 is allowed.*1\.65963"):
                clip.decide(expected["norm"])
        else:
            check(clip.decide(expected["norm"]), expected)


@pytest.mark.parametrize("split", [0, 1, 21, 56])
def test_resumed_in_the_middle(split: int) -> None:
    first = AdaptiveClip()
    for expected in GOLDEN[:split]:
        first.decide(expected["norm"])
    second = AdaptiveClip()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for expected in GOLDEN[split:]:
        assert second.decide(expected["norm"]) == first.decide(expected["norm"])


@pytest.mark.parametrize("norm", [6.0, math.inf, math.nan])
def test_a_skipped_outlier_leaves_no_trace(norm: float) -> None:
    clip = settled()
    before = clip.state_dict()
    decision = clip.decide(norm)
    assert (decision.action, decision.scale) == ("skip", 1.0)
    assert clip.state_dict() == before
    assert clip.decide(0.2).action == "step"


def test_a_clipped_outlier() -> None:
    clip = settled("clip")
    before = clip.state_dict()
    decision = clip.decide(600.0)
    assert decision.action == "clipped"
    assert decision.scale * 600.0 == pytest.approx(decision.threshold)
    assert clip.state_dict() == before


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_what_cannot_be_clipped_is_skipped(norm: float) -> None:
    assert settled("clip").decide(norm).action == "skip"


@pytest.mark.parametrize("norm", [5.001, math.inf, math.nan])
def test_stop_says_the_numbers(norm: float) -> None:
    with pytest.raises(GradientOutlierError, match=rf"{norm:.6g}; up to 5 .*mean 0\.\d+, sigma 0\.\d+"):
        settled("stop").decide(norm)


def test_the_limit_grows_beyond_five_with_the_spread() -> None:
    clip = AdaptiveClip()
    clip.load_state_dict({"mean": 3.0, "variance": 1.0})
    assert clip.decide(7.9).action == "clipped"
    assert clip.decide(8.1).action == "skip"
    assert clip.decide(6.0).action == "step"


def test_the_first_norm_is_taken_as_it_is() -> None:
    large = AdaptiveClip(outlier="stop").decide(40.0)
    assert (large.action, large.scale, large.threshold, large.mean) == ("step", 1.0, 1.0, 1.0)
    assert AdaptiveClip().decide(0.1).mean == pytest.approx(0.3)


def test_gradients_of_nothing_begin_nothing() -> None:
    clip = AdaptiveClip()
    assert clip.decide(0.0).action == "step"
    assert clip.decide(0.1).mean == pytest.approx(0.3)


def test_a_first_norm_that_is_not_finite_begins_nothing() -> None:
    clip = AdaptiveClip()
    assert clip.decide(math.nan).action == "skip"
    assert clip.decide(0.1).mean == pytest.approx(0.3)
    with pytest.raises(GradientOutlierError, match="norm is nan"):
        AdaptiveClip(outlier="stop").decide(math.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_norm_and_scale(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), ()]
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    whole = torch.cat([gradient.flatten() for gradient in gradients]).float()
    norm = global_norm(gradients)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, whole.norm(), rtol=1e-6, atol=0)
    scale_(gradients, 0.25)
    torch.testing.assert_close(global_norm(gradients), whole.norm() / 4, rtol=1e-6, atol=0)


def test_small_parts_of_a_bf16_gradient_count() -> None:
    # In bf16, adding 1 to 256 gives 256: a sum of 4096 squares of 1 would end there.
    assert global_norm([torch.ones(4096, dtype=torch.bfloat16)]).item() == 64.0


def test_no_gradients() -> None:
    assert global_norm([]).item() == 0.0
    scale_([], 0.5)
