"""What `osp plan` predicts of a card's memory is what is counted on the simulated one."""

from typing import Any

import pytest
import torch
from counting import RELEASE, SMALL, TRAINED, adapter_of, encoding, generating, training

from opensoraplan.defaults import WeightPrecision
from opensoraplan.models.sizes import BatchShape
from opensoraplan.plan.step import TrainingOptions
from opensoraplan.requests import Request
from opensoraplan.runtime.placement import Placement

REQUEST = Request(prompt="any", frames=57, height=288, width=512, steps=1)


@pytest.mark.parametrize(
    ("placement", "weights"),
    [("resident", "whole"), ("in-turn", "int8"), ("streamed", "whole")],
)
def test_generating(placement: Placement, weights: WeightPrecision) -> None:
    cases = generating(SMALL, REQUEST, placement, weights=weights, chunks=(16, 1))
    assert cases
    for case in cases:
        assert abs(case.off) < 0.05, case


@pytest.mark.parametrize("chunk", [1, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding(dtype: torch.dtype, chunk: int) -> None:
    for size in ((57, 288, 512), (121, 576, 1024)):
        case = encoding(RELEASE, size, chunk=chunk, dtype=dtype)
        assert abs(case.off) < 0.05, case


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recompute_blocks": 6},
        {"recompute_feed_forwards": 3, "compute": "fp32"},
        {"ema": "host"},
        {"ema": "host", "bits": 8},
    ],
)
def test_training(options: dict[str, Any]) -> None:
    config = {**TRAINED, "num_layers": [2, 2, 2], "sparse_n": [1, 4, 1]}
    case = training(str(options), config, BatchShape((4, 16, 16), 64, 2), TrainingOptions(**options))
    assert abs(case.off) < 0.02, case


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ({}, {}),
        ({"base": "int8"}, {"recompute_blocks": 6, "bits": 8}),
        ({"streamed": True}, {"recompute_blocks": 6, "ema": "host"}),
        ({"base": "int8", "streamed": True}, {"recompute_blocks": 6, "keep_attention": True}),
        ({"base": "fp8"}, {"recompute_blocks": 3, "accumulate": 2}),
        ({"base": "int8", "streamed": True}, {"recompute_blocks": 6, "inputs_on_host": True}),
        ({"dora": True}, {"recompute_feed_forwards": 6, "compute": "fp32"}),
    ],
)
def test_training_of_an_adapter(adapter: dict[str, Any], options: dict[str, Any]) -> None:
    config = {**TRAINED, "num_layers": [2, 2, 2], "sparse_n": [1, 4, 1]}
    asked = TrainingOptions(**options, adapter=adapter_of(config, **adapter))
    case = training(f"{adapter}, {options}", config, BatchShape((8, 32, 32), 128), asked, steps=1)
    assert abs(case.off) < 0.05, case
