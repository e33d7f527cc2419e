"""What a denoiser is told, and the call of it that training and sampling share."""

from dataclasses import replace

import pytest
import torch
from tiny_models import DENOISER

from opensoraplan.models.conditions import Conditions, denoise
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.text import PromptEmbeds


def text(batch: int, tokens: int, *, real: int | None = None) -> PromptEmbeds:
    mask = torch.arange(tokens).expand(batch, -1) < (tokens if real is None else real)
    return PromptEmbeds(torch.randn(batch, tokens, 24), mask, torch.randn(batch, 20))


def with_frames(batch: int) -> Conditions:
    given = torch.tensor([True, False]).expand(batch, -1)
    return Conditions(text(batch, 3), torch.randn(batch, 4, 2, 4, 4), given)


@pytest.fixture(scope="module")
def model() -> SparseUMMDiT:
    torch.manual_seed(0)
    return SparseUMMDiT(**DENOISER).eval()


@torch.no_grad()
@pytest.mark.parametrize("real", [3, 5], ids=["masked", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_denoise_is_the_model_on_the_text_in_its_dtype(
    model: SparseUMMDiT, dtype: torch.dtype, real: int
) -> None:
    model.to(dtype)
    conditions = Conditions(text(2, 5, real=real)).to(dtype=dtype)
    latents, timestep = torch.randn(2, 4, 2, 4, 4), torch.tensor([900.0, 100.0])
    told = conditions.text
    wanted = model(latents.to(dtype), timestep, told.sequence, told.pooled, told.mask).sample
    found = denoise(model, latents, timestep, conditions)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted.float())


def test_frames_go_with_the_text() -> None:
    conditions = with_frames(2)
    assert conditions.frames is not None
    moved = conditions.to(dtype=torch.bfloat16)
    assert moved.text.sequence.dtype == torch.bfloat16
    assert moved.frames is not None
    assert moved.frames.dtype == torch.float32  # which latents are denoised in
    both = Conditions.cat([conditions, with_frames(1)])
    assert both.batch_size == 3
    assert torch.equal(both.frames[:2], conditions.frames)
    twice = conditions.repeat(2)
    assert torch.equal(twice.frames[1], conditions.frames[0])
    assert torch.equal(twice.text.pooled[2], conditions.text.pooled[1])


def test_text_alone_has_no_frames_anywhere() -> None:
    alone = Conditions(text(1, 3))
    joined = Conditions.cat([alone, Conditions(text(2, 5))])
    assert joined.text.sequence.shape == (3, 5, 24)
    for conditions in (alone.to("cpu", torch.bfloat16), alone.repeat(3), joined):
        assert conditions.frames is None
        assert conditions.given is None
        assert conditions.generated is None


def test_what_does_not_belong_together() -> None:
    conditions = with_frames(2)
    with pytest.raises(ValueError, match="give both, or neither"):
        replace(conditions, given=None)
    with pytest.raises(ValueError, match=r"given must be \[samples, latent frames\], \[1, 2\], got \[2, 2\]"):
        replace(conditions, text=text(1, 3))
    with pytest.raises(ValueError, match="1 of 2 parts have clean frames"):
        Conditions.cat([conditions, Conditions(text(1, 3))])


@torch.no_grad()
def test_given_frames_are_put_in_place_and_told_timestep_0(model: SparseUMMDiT) -> None:
    model.to(torch.float32)
    conditions, latents = with_frames(2), torch.randn(2, 4, 2, 4, 4)
    told, frames = conditions.text, conditions.frames
    assert frames is not None
    looked_at = torch.cat([frames[:, :, :1], latents[:, :, 1:]], dim=2)
    assert torch.equal(conditions.restore(latents), looked_at)
    timestep = torch.tensor([[0.0, 900.0], [0.0, 100.0]])
    wanted = model(looked_at, timestep, told.sequence, told.pooled).sample
    assert torch.equal(denoise(model, latents, torch.tensor([900.0, 100.0]), conditions), wanted)
