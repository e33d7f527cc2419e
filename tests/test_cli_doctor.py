"""`osp doctor`: the page that a user pastes into a report."""

import pytest
import torch

from opensoraplan.cli.doctor import Doctor, doctor
from opensoraplan.models.sizes import BatchShape, DenoiserSizes, forward_flops
from opensoraplan.runtime.trials import Speed, step_seconds, try_attention


def test_the_page_says_what_was_tried(capsys: pytest.CaptureFixture[str]) -> None:
    doctor(Doctor(device="cpu", dtype="fp32", seconds=0.03))
    page = capsys.readouterr().out
    assert f"torch {torch.__version__}" in page
    assert "reading by pyav: works" in page
    assert "writing mp4: works" in page
    assert "tried below: cpu" in page
    assert "TFLOP/s in matrix products" in page
    assert "s a guided step" in page


def test_attention_is_tried() -> None:
    trials = {trial.name: trial for trial in try_attention(torch.device("cpu"), torch.float32)}
    assert trials["native"].works
    assert trials["native"].masks
    assert not trials["xformers"].works
    assert trials["xformers"].reason
    assert not [name for name in trials if "hub" in name]  # they would download


def test_a_step_takes_the_time_of_its_products_and_its_attention() -> None:
    model, shape = DenoiserSizes({}), BatchShape((16, 72, 128), 512)
    whole = 2 * forward_flops(model.config, shape) / 1e12
    assert step_seconds(Speed(1, 1, 1), model, shape) == pytest.approx(whole)
    slow = step_seconds(Speed(1, 0.5, 1), model, shape)
    assert whole < slow < 2 * whole


def test_seconds_cannot_be_negative() -> None:
    with pytest.raises(ValueError, match="--seconds must be at least 0, got -1"):
        doctor(Doctor(seconds=-1))
