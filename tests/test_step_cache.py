"""The step cache: what calibrating measures, what is left out, and what the command says of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from opensoraplan.pipeline import OpenSoraPlanPipeline, VideoOutput
from opensoraplan.runtime.step_cache import Calibration, measure_ratios, skip_steps

STEPS = 10


def latents_of(pipeline: OpenSoraPlanPipeline, *, guidance: float = 4.0, batched: bool = False) -> Tensor:
    output = pipeline(
        "a red ball",
        num_frames=9,
        height=32,
        width=32,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        batched_guidance=batched,
        seed=0,
        output_type="latent",
    )
    assert isinstance(output, VideoOutput)
    assert isinstance(output.frames, Tensor)
    return output.frames


def count_calls(pipeline: OpenSoraPlanPipeline) -> list[int]:
    """Grows whenever a feed-forward of the middle block is computed."""
    calls: list[int] = []
    block = pipeline.transformer.transformer_blocks[2]
    assert isinstance(block, nn.Module)
    block.ff.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_calibrating_measures_a_ratio_for_each_step_and_changes_nothing(
    pipeline: OpenSoraPlanPipeline, tmp_path: Path
) -> None:
    expected = latents_of(pipeline, batched=True)
    with measure_ratios(pipeline.transformer) as ratios:
        assert torch.equal(latents_of(pipeline, batched=True), expected)
    assert len(ratios) == STEPS
    assert ratios[0] == 1.0
    assert len({round(ratio, 6) for ratio in ratios[1:]}) > 1
    Calibration(ratios=tuple(ratios)).write(tmp_path / "step_cache.json")
    assert Calibration.of(tmp_path).ratios == tuple(ratios)
    with pytest.raises(FileNotFoundError, match="osp calibrate --model"):
        Calibration.of(tmp_path / "elsewhere")


def test_ratios_of_other_weights_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Calibration(ratios=(1.0, 0.9)).warn_of_other_weights("a", tmp_path)  # of a file that does not tell
    Calibration(ratios=(1.0, 0.9), transformer="a").warn_of_other_weights("a", tmp_path)
    assert not caplog.messages
    Calibration(ratios=(1.0, 0.9), transformer="a").warn_of_other_weights("b", tmp_path)
    assert "step_cache.json was measured on other files than those in " in caplog.text
    assert "delete it and run `osp calibrate --model " in caplog.text


def test_without_an_error_allowed_nothing_is_left_out(pipeline: OpenSoraPlanPipeline) -> None:
    expected = latents_of(pipeline)
    with skip_steps(pipeline.transformer, [1.0, *[0.9] * (STEPS - 1)], threshold=0.01, steps=STEPS):
        assert torch.equal(latents_of(pipeline), expected)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_steps_that_hardly_change_are_left_out_in_each_branch(
    pipeline: OpenSoraPlanPipeline, guidance: float
) -> None:
    expected, calls = latents_of(pipeline, guidance=guidance), count_calls(pipeline)
    with skip_steps(pipeline.transformer, [1.0] * STEPS, threshold=0.05, steps=STEPS):
        first = latents_of(pipeline, guidance=guidance)
        computed = len(calls)
        again = latents_of(pipeline, guidance=guidance)
    # The first two of ten, then every fourth; video and text share the feed-forward's module or not.
    per_pass = 1 if pipeline.transformer.config["double_ff"] else 2
    branches = 2 if guidance > 1 else 1
    assert computed == per_pass * branches * len([0, 1, 5, 9])
    assert len(calls) == 2 * computed
    assert torch.equal(first, again)
    assert not torch.equal(first, expected)
    assert torch.equal(latents_of(pipeline, guidance=guidance), expected)


def test_sparse_ends_are_refused(pipeline: OpenSoraPlanPipeline) -> None:
    stages = len(pipeline.transformer.config["num_layers"])
    pipeline.transformer.set_sparsity([2] * stages)
    refused = skip_steps(pipeline.transformer, [1.0] * STEPS, threshold=0.05, steps=STEPS)
    with pytest.raises(ValueError, match="dense first and last stages"), refused:
        pass
