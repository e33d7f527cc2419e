"""A tiny denoiser and its training on a mesh; what the ranks of the tests run."""

from typing import NamedTuple

import pytest
import torch
from tiny_models import FOUR_HEADS
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.parallel.apply import parallelize
from opensoraplan.parallel.mesh import DATA, Mesh, MeshSettings
from opensoraplan.train.learner.gradient_clip import global_norm

BATCH, STEPS, TEXT = 4, 3, 6
# Tokens of the grids: 48, which 4 ranks share in whole groups of rate 2; 45, which have to be padded.
WHOLE, RAGGED = (3, 8, 8), (3, 6, 10)
# fp32 sums in another order; relative to the largest value of a tensor.
CLOSE = 1e-5


class Result(NamedTuple):
    """Losses and gradients' norms of all steps, the first and last step's gradients by name, and how many
    graphs were compiled.
    """

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    graphs: int


def make_model(**changes: object) -> SparseUMMDiT:
    """The same weights every time, none of which is zero."""
    model = SparseUMMDiT(**{**FOUR_HEADS, **changes})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * (0.1 if weight.ndim > 1 else 0.2) + (0 if weight.ndim > 1 else 0.5))
    return model


def make_batch(grid: tuple[int, int, int], *, masked: bool = True, given: bool = False) -> dict[str, Tensor]:
    """Inputs of four samples and what the output should be. Texts have different lengths if `masked`; the
    first frame of three samples is at timestep 0 if it is `given`.
    """
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = torch.tensor([3, 5, 6, 4] if masked else [TEXT] * BATCH)
    timestep = torch.tensor([100.0, 400.0, 700.0, 900.0])
    if given:
        timestep = timestep[:, None].repeat(1, grid[0])
        timestep[:3, 0] = 0
    return {
        "hidden_states": random(BATCH, 4, *grid),
        "timestep": timestep,
        "encoder_hidden_states": random(BATCH, TEXT, 12),
        "pooled_projections": random(BATCH, 10),
        "encoder_attention_mask": (torch.arange(TEXT) < lengths[:, None]).float(),
        "target": random(BATCH, 4, *grid),
    }


def train(
    sizes: dict[str, int] | None,
    *,
    grid: tuple[int, int, int] = WHOLE,
    masked: bool = True,
    given: bool = False,
    recompute: int = 0,
    backend: str | None = None,
    compute: torch.dtype = torch.float32,
    cpu_offload: bool = False,
    device: str = "cpu",
    **changes: object,
) -> Result:
    """A few steps of AdamW; on a mesh of these sizes, or in one process (None). With `backend`,
    blocks are compiled. The result is the host's.
    """
    torch.compiler.reset()
    counters.clear()
    model = make_model(**changes).train()
    model.set_recompute(blocks=recompute)
    if not cpu_offload:  # FSDP takes a rank's shards to the device
        model.to(device)
    batch = {name: value.to(device) for name, value in make_batch(grid, masked=masked, given=given).items()}
    share, shares = 0, 1
    if sizes is not None:
        mesh = Mesh.build(MeshSettings(**sizes), device_type=device)  # type: ignore[arg-type]
        compiled = {} if backend is None else {"compiled": True, "backend": backend}
        parallelize(model, mesh, compute=compute, cpu_offload=cpu_offload, **compiled)
        share, shares = mesh.rank(DATA), mesh.size(DATA)
    own = {name: value.chunk(shares)[share] for name, value in batch.items()}
    target = own.pop("target")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    losses, norms, gradients = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        (output,) = model(**own, return_dict=False)
        loss = (output - target).square().mean()
        loss.backward()
        losses.append(_mean_over_data(loss.detach(), mesh if sizes is not None else None))
        norms.append(global_norm([p.grad for p in model.parameters() if p.grad is not None]).item())
        if step in (0, STEPS - 1):
            gradients.append({name: _whole(p.grad) for name, p in model.named_parameters()})
        optimizer.step()
    return Result(losses, norms, gradients, counters["stats"]["unique_graphs"])


def _whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).cpu().clone()


def _mean_over_data(loss: Tensor, mesh: Mesh | None) -> float:
    if mesh is not None:
        torch.distributed.all_reduce(loss, group=mesh.group(DATA))
        loss = loss / mesh.size(DATA)
    return loss.item()


def assert_equal(result: Result, reference: Result) -> None:
    assert result.losses == pytest.approx(reference.losses, rel=CLOSE)
    assert result.losses[-1] < result.losses[0]
    assert result.norms == pytest.approx(reference.norms, rel=CLOSE)
    for step, wanted in zip(result.gradients, reference.gradients, strict=True):
        for name, gradient in wanted.items():
            error = (step[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-6)
            assert error < CLOSE, f"{name}: {error:.1e}"
