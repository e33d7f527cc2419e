"""The pipeline on the simulated card, wherever its weights are kept, gives what it gives on the CPU."""

import pytest
import torch
from simulated.device import Card
from torch import Tensor

from opensoraplan.generate.planning import needs_of
from opensoraplan.pipeline import OpenSoraPlanPipeline, VideoOutput
from opensoraplan.requests import Request
from opensoraplan.runtime.placement import PLACEMENTS, Arrangement, Placement, plans_for

REQUEST = Request(prompt="a red star", frames=9, height=64, width=64, steps=2, seed=1)


def make(pipeline: OpenSoraPlanPipeline) -> Tensor:
    """A guided video of 9 x 64 x 64."""
    output = pipeline(
        "a red star", num_frames=9, height=64, width=64, num_inference_steps=2, output_type="pt", seed=1
    )
    assert isinstance(output, VideoOutput)
    assert isinstance(output.frames, Tensor)
    return output.frames


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_video_is_that_of_the_cpu(card: Card, pipeline: OpenSoraPlanPipeline, placement: Placement) -> None:
    pipeline.to(torch.float32)
    expected = make(pipeline)
    needs = needs_of(pipeline, REQUEST)
    arrangement = Arrangement(pipeline, plans_for([needs], [placement]), torch.device("npu"))
    made = arrangement.run(lambda _: make(pipeline))
    torch.testing.assert_close(made, expected, atol=2e-5, rtol=0)
    assert card.calls["aten::attention"] > 0
