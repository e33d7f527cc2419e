"""Timesteps of single frames: the same bits where all are equal, and each token told its own frame's."""

import pytest
import torch
from tiny_models import DENOISER
from torch import Tensor
from torch._dynamo.utils import counters

from opensoraplan.models.adaln import modulate, timestep_rows
from opensoraplan.models.modulation import modulations
from opensoraplan.models.skiparse import order_rows, swap_skip, to_single_skip
from opensoraplan.models.sparse_ummdit import SparseUMMDiT

SMALL = {**DENOISER, "num_layers": [2, 2, 4, 2, 2], "sparse_n": [1, 2, 4, 2, 1]}
# Frames of 16 tokens, whole groups of every rate, and of 15.
WHOLE, RAGGED = (4, 8, 8), (4, 6, 10)
GRIDS = pytest.mark.parametrize("grid", [WHOLE, RAGGED], ids=["whole", "ragged"])


@pytest.fixture(scope="module")
def model() -> SparseUMMDiT:
    torch.manual_seed(0)
    model = SparseUMMDiT(**SMALL).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.1)
    return model


def inputs(grid: tuple[int, int, int], *, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, *grid, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 6, 24, generator=generator),
        "pooled_projections": torch.randn(batch, 20, generator=generator),
    }


def first_is_clean(timestep: Tensor, frames: int) -> Tensor:
    """[B, T], the first frame at 0."""
    of_frames = timestep[:, None].repeat(1, frames)
    of_frames[:, 0] = 0
    return of_frames


@torch.no_grad()
@GRIDS
def test_frames_that_are_all_alike_give_the_bits_of_one_timestep(
    model: SparseUMMDiT, grid: tuple[int, int, int]
) -> None:
    timestep = torch.tensor([700.0, 300.3])
    wanted = model(**inputs(grid), timestep=timestep).sample
    found = model(**inputs(grid), timestep=timestep[:, None].expand(-1, grid[0])).sample
    assert torch.equal(found, wanted)


def test_rows_are_the_different_timesteps_and_the_text_has_the_highest() -> None:
    rows = timestep_rows(torch.tensor([[0.0, 500.0, 500.0], [20.0, 20.0, 20.0], [7.0, 6.0, 0.0]]))
    assert rows.timestep.tolist() == [500, 20, 7, 0, 6, 0]
    assert rows.sample is not None
    assert rows.of_frame is not None
    assert rows.sample.tolist() == [0, 1, 2, 0, 2, 2]
    assert rows.of_frame.tolist() == [[3, 0, 0], [1, 1, 1], [2, 4, 5]]


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize(("frame", "frames"), [(16, 4), (15, 4), (48, 3)])
def test_every_token_has_its_frames_row_in_every_order(n: int, frame: int, frames: int) -> None:
    batch, width = 2, 3
    rows = torch.tensor([[0, 2, 2, 4], [1, 3, 1, 1]])[:, :frames].repeat_interleave(frame, dim=1)
    x, shift, scale = torch.randn(batch, frame * frames, width), *torch.randn(2, 5, width)
    natural = x * (1 + scale[rows]) + shift[rows]
    single, group = order_rows(n, rows, frame)
    found, wanted = to_single_skip(x, n), to_single_skip(natural, n)
    real = to_single_skip(torch.ones_like(x, dtype=torch.bool), n)  # the rest is padding
    for order in (single, group):
        assert torch.equal(modulate(found, shift, scale, order)[real], wanted[real])
        found, wanted, real = swap_skip(found), swap_skip(wanted), swap_skip(real)
    assert (single.shape[-1] == frames) == (frame % n**2 == 0)


@torch.no_grad()
@GRIDS
def test_a_frames_timestep_changes_what_is_predicted(model: SparseUMMDiT, grid: tuple[int, int, int]) -> None:
    timestep = torch.tensor([700.0, 300.0])
    plain = model(**inputs(grid), timestep=timestep).sample
    found = model(**inputs(grid), timestep=first_is_clean(timestep, grid[0])).sample
    assert (found - plain)[:, :, 0].norm() > 0.02 * plain[:, :, 0].norm()
    each = [
        model(
            **{k: v[b : b + 1] for k, v in inputs(grid).items()},
            timestep=first_is_clean(timestep[b : b + 1], grid[0]),
        )
        for b in range(2)
    ]
    assert torch.allclose(found, torch.cat([one.sample for one in each]), atol=1e-5)


@torch.no_grad()
@GRIDS
def test_vectors_made_before_are_those_of_the_forward_pass(
    model: SparseUMMDiT, grid: tuple[int, int, int]
) -> None:
    told, timestep = inputs(grid), first_is_clean(torch.tensor([700.0, 300.0]), grid[0])
    (modulation,) = modulations(model, [(timestep, told["pooled_projections"])], device=torch.device("cpu"))
    wanted = model(**told, timestep=timestep).sample
    assert torch.equal(model(**told, timestep=timestep, modulation=modulation).sample, wanted)


@GRIDS
def test_gradients_reach_the_condition_of_every_frame(
    model: SparseUMMDiT, grid: tuple[int, int, int]
) -> None:
    """The gradient of a step in the condition's weights is what the loss changes by."""
    told, timestep = inputs(grid), first_is_clean(torch.tensor([700.0, 300.0]), grid[0])
    model = SparseUMMDiT(**SMALL).double()
    model.load_state_dict({name: w.double() for name, w in SparseUMMDiT(**SMALL).state_dict().items()})
    weight = model.transformer_blocks[2].norm1.linear.weight
    torch.nn.init.normal_(weight, 0, 0.1)
    told = {name: tensor.double() for name, tensor in told.items()}
    loss = model(**told, timestep=timestep).sample.square().mean()
    (gradient,) = torch.autograd.grad(loss, weight)
    step = torch.randn_like(weight) * 3e-3
    with torch.no_grad():
        weight += step
        after = model(**told, timestep=timestep).sample.square().mean()
    assert float(after - loss.detach()) == pytest.approx(float((gradient * step).sum()), rel=0.05)


@torch.no_grad()
def test_compiled_blocks_need_no_more_graphs_for_frames_that_are_alike() -> None:
    torch.compiler.reset()
    counters.clear()
    model = SparseUMMDiT(**DENOISER).eval()
    told, timestep = inputs(WHOLE), torch.tensor([700.0, 300.0])
    clean = first_is_clean(timestep, WHOLE[0])
    wanted = model(**told, timestep=clean).sample
    model.compile_repeated_blocks(backend="eager")
    plain = model(**told, timestep=timestep).sample
    graphs = counters["stats"]["unique_graphs"]
    alike = model(**told, timestep=timestep[:, None].expand(-1, WHOLE[0])).sample
    assert counters["stats"]["unique_graphs"] == graphs
    assert torch.equal(alike, plain)
    assert torch.allclose(model(**told, timestep=clean).sample, wanted, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 * graphs
    torch.compiler.reset()


def test_timesteps_of_other_shapes_are_refused(model: SparseUMMDiT) -> None:
    with pytest.raises(
        ValueError, match=r"timestep must be \[2\] or, one for each frame, \[2, 4\], got \[2, 3\]"
    ):
        model(**inputs(WHOLE), timestep=torch.zeros(2, 3))
