"""Weights in 8 bits: what they lose, what they take, and where they are refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opensoraplan.defaults import WeightPrecision
from opensoraplan.generate.planning import needs_of
from opensoraplan.models.sizes import DenoiserSizes
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.requests import Request
from opensoraplan.runtime.quantisation import (
    FP8,
    LARGEST_FP8,
    Fp8Linear,
    Int8Linear,
    check_weight_precision,
    quantise_weights,
    weight_precision_of,
)

SMALL = Request(prompt="a", frames=9, height=32, width=32)


def uneven(*, bias: bool, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(64, 32, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight[3] *= 100  # large in one output, which the others do not see
        linear.weight[4] *= 0.005  # whose scale is no normal number in fp16
        linear.weight[5] = 0
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_is_off_by_half_a_step_at_most(dtype: torch.dtype, bias: bool) -> None:
    linear = uneven(bias=bias, dtype=dtype)
    small = Int8Linear(linear)
    assert (small.integers.dtype, small.scale.dtype) == (torch.int8, dtype)
    off = (small.integers.float() * small.scale.float() - linear.weight.float()).abs()
    # The largest weight of a row may lie above 127 steps, by the rounding of the scale.
    slack = linear.weight.float().abs().amax(1) * torch.finfo(dtype).eps
    assert (off.amax(1) <= small.scale.float()[:, 0] / 2 + slack).all()
    x = torch.randn(4, 64, dtype=dtype)
    y = small(x)
    assert y.dtype == dtype
    linear.float()
    off = (y - linear(x.float())).abs()
    assert (off <= 0.02 * F.linear(x.float().abs(), linear.weight.abs(), y.float().abs().amax(0))).all()


def test_fp8_is_off_by_a_sixteenth_of_each_factor_at_most() -> None:
    linear = uneven(bias=False, dtype=torch.bfloat16)
    small = Fp8Linear(linear)
    weight = linear.weight.float()
    off = (small.rounded.float() * small.scale.t() - weight).abs()
    # Three bits behind the leading one, those of bf16, and what is too small beside the row's largest.
    smallest = weight.abs().amax(1, keepdim=True) * torch.finfo(FP8).smallest_normal / LARGEST_FP8
    assert (off <= (2**-4 + 2**-7) * weight.abs() + smallest).all()
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    x[0, 1] *= 1000  # one token, which the others do not see
    x[1, 2] = 0
    y = small(x)
    assert (y.dtype, y.shape) == (torch.bfloat16, (2, 5, 32))
    off = (y - F.linear(x.float(), weight)).abs()
    assert (off <= 0.14 * F.linear(x.float().abs(), weight.abs())).all()


@pytest.mark.parametrize("kind", ["whole", "int8", "fp8"])
def test_the_blocks_take_what_is_predicted(pipeline: OpenSoraPlanPipeline, kind: WeightPrecision) -> None:
    transformer = pipeline.transformer.to(torch.bfloat16)
    before = needs_of(pipeline, SMALL)
    quantise_weights(transformer, kind)
    assert weight_precision_of(transformer) == kind
    needs = needs_of(pipeline, SMALL)
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    model = DenoiserSizes(config)
    units = range(len(model.blocks))
    assert needs.denoiser == model.stored("bf16", kind=kind)
    assert needs.adaln == model.stored("bf16", kind=kind, adaln=True)
    assert needs.block == max(model.stored("bf16", unit=unit, kind=kind, adaln=False) for unit in units)
    assert needs.block <= before.block * {"whole": 1, "int8": 0.6, "fp8": 0.9}[kind]
    assert (needs.vae, needs.encoders) == (before.vae, before.encoders)


def test_fp8_is_refused_where_it_cannot_be(pipeline: OpenSoraPlanPipeline) -> None:
    with pytest.raises(ValueError, match="fp8 weights need dtype bf16, got float32"):
        quantise_weights(pipeline.transformer, "fp8")
    other = torch.device("privateuseone:0")
    with pytest.raises(ValueError, match=r"privateuseone:0 does not support fp8.*int8 .* all devices"):
        check_weight_precision("fp8", other, torch.bfloat16)
    check_weight_precision("int8", other, torch.float16)
