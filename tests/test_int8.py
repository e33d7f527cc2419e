"""int8 weights: what they lose, and what they take."""

import pytest
import torch
from torch import nn

from opensoraplan.memory import needs_of
from opensoraplan.models.int8 import Int8Linear, is_int8, keep_as_int8
from opensoraplan.parallel.estimate import Model
from opensoraplan.pipeline import OpenSoraPlanPipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_is_off_by_half_a_step_at_most(dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(64, 32, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight[3] *= 100  # large in one output, which the others do not see
        linear.weight[5] = 0
    small = Int8Linear(linear)
    assert (small.integers.dtype, small.scale.dtype) == (torch.int8, dtype)
    off = (small.integers.float() * small.scale.float() - linear.weight.float()).abs()
    # The largest weight of a row may lie above 127 steps, by the rounding of the scale.
    slack = linear.weight.float().abs().amax(1) * torch.finfo(dtype).eps
    assert (off.amax(1) <= small.scale.float()[:, 0] / 2 + slack).all()
    x = torch.randn(4, 64, dtype=dtype)
    assert (small(x) - linear(x)).float().norm() < 0.02 * linear(x).float().norm()
    assert small(x).dtype == dtype


def test_the_blocks_take_what_is_predicted(pipeline: OpenSoraPlanPipeline) -> None:
    before = needs_of(pipeline, frames=9, height=32, width=32)
    assert not is_int8(pipeline.transformer)
    keep_as_int8(pipeline.transformer.transformer_blocks)
    assert is_int8(pipeline.transformer)
    after = needs_of(pipeline, frames=9, height=32, width=32)
    config = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
    model = Model(config)
    units = range(len(model.blocks))
    for needs, int8 in ((before, False), (after, True)):
        assert needs.denoiser == model.stored("fp32", int8=int8)
        assert needs.adaln == model.stored("fp32", int8=int8, adaln=True)
        assert needs.block == max(model.stored("fp32", unit=unit, int8=int8, adaln=False) for unit in units)
    assert after.block < before.block / 3
    assert (after.vae, after.encoders) == (before.vae, before.encoders)
