"""Sizes by formula: tensor-parallel splits, FLOPs against torch's count, memory against what is alive."""

from typing import Any, Literal

import pytest
import torch
from alive import Alive
from tiny_models import DENOISER, FOUR_HEADS
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opensoraplan.defaults import WeightPrecision
from opensoraplan.models.sizes import (
    BatchShape,
    DenoiserSizes,
    cache_bytes,
    decoding_memory,
    forward_flops,
    forward_memory,
    split_dimension,
    training_flops,
)
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.wfvae import WFVAE
from opensoraplan.runtime.quantisation import quantise_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RELEASE_GRID = (16, 72, 128)
# 3 x 4 x 6 latents are 18 tokens: not a multiple of 4, so that sparse stages pad.
GRID, TEXT, BATCH = (3, 4, 6), 7, 2
TINY = {**DENOISER, "num_attention_heads": 4, "num_layers": [2, 4, 2], "sparse_n": None}
SMALL = BatchShape(GRID, TEXT, BATCH)


# --- Tensor parallelism ---


@pytest.fixture(scope="module")
def model() -> SparseUMMDiT:
    with torch.device("meta"):
        return SparseUMMDiT(num_layers=(2, 2, 2), sparse_n=(1, 2, 1), skip_connection_zero_init=False)


def test_names_of_the_model_and_of_the_release_are_split_alike(model: SparseUMMDiT) -> None:
    names = [name for name, _ in model.named_parameters()]
    rename = model.original_format().rename
    assert {name: split_dimension(name) for name in names} == {
        name: split_dimension(rename(name)) for name in names
    }


def test_layers_that_are_split(model: SparseUMMDiT) -> None:
    found: dict[int | None, set[str]] = {0: set(), 1: set(), None: set()}
    for name, _ in model.named_parameters():
        found[split_dimension(name)].add(name.split(".", 2)[2] if "blocks" in name else name)
    attention = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}
    outputs = {*(f"attn1.{layer}" for layer in attention), "norm1.linear", "norm2.linear", "norm_out.linear"}
    assert found[0] >= {f"{layer}.{kind}" for layer in outputs for kind in ("weight", "bias")}
    assert found[0] >= {"ff.net.0.proj.weight", "ff_enc.net.0.proj.weight"}
    assert found[1] == {
        *("attn1.to_out.0.weight", "attn1.to_add_out.weight"),
        *("ff.net.2.weight", "ff_enc.net.2.weight"),
    }
    assert found[None] >= {
        "attn1.to_out.0.bias",
        "attn1.norm_q.weight",
        "skip.linear.weight",
        "proj_out.weight",
    }


# --- FLOPs ---


def counted(model: SparseUMMDiT, *, backward: bool) -> int:
    inputs = (
        torch.randn(BATCH, 4, *GRID),
        torch.full((BATCH,), 500.0),
        torch.randn(BATCH, TEXT, 24),
        torch.randn(BATCH, 20),
    )
    # torch counts the fused attention of a CPU not at all; that of the plain formula as matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(*inputs).sample
        if backward:
            output.square().mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparse_n": [2, 4, 2], "double_ff": False, "skip_connection": False},
        {"num_layers": [2, 2, 4, 2, 2], "sparse_n": [1, 2, 3, 2, 1], "skip_connection_zero_init": False},
    ],
)
def test_flops_of_a_forward_pass_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    model = SparseUMMDiT(**TINY | changes)
    flops = forward_flops(model.config, SMALL)
    assert counted(model, backward=False) == flops


@pytest.mark.parametrize("sparse_n", [None, [1, 2, 1]])
def test_flops_of_training_are_three_forward_passes(sparse_n: list[int] | None) -> None:
    model = SparseUMMDiT(**TINY)
    model.set_sparsity(sparse_n)
    flops = training_flops(model.config, SMALL)
    # Inputs need no gradient, so that the first layers' backward is half of what is counted.
    assert counted(model, backward=True) == pytest.approx(flops, rel=0.01)


def test_flops_of_the_release_are_near_two_for_each_parameter_and_token() -> None:
    with torch.device("meta"):
        config = SparseUMMDiT().config
    flops = forward_flops(config, BatchShape((16, 36, 64), 512))
    tokens = 16 * 18 * 32
    # Video tokens pass half of the parameters, for the other half are the text's; attention comes on top.
    assert 2 * 4e9 * tokens < flops < 2 * 8e9 * tokens


# --- Memory ---

# Before torch 2.10 CPUs have no product of this kind in fp8: it is computed in fp32, which takes more.
FP8 = [("bf16", "fp8")] if hasattr(torch.nn.functional, "scaled_mm") else []


@pytest.mark.parametrize(("compute", "kind"), [("fp32", "whole"), ("bf16", "whole"), *FP8])
def test_a_forward_pass_needs_what_is_alive_at_most(
    compute: Literal["fp32", "bf16"], kind: WeightPrecision
) -> None:
    dtype, shape = DTYPES[compute], BatchShape((4, 16, 16), 8)
    model = nn.Module.to(SparseUMMDiT(**FOUR_HEADS), dtype).eval()
    quantise_weights(model, kind)
    inputs = torch.randn(1, 4, *shape.grid), torch.rand(1), torch.randn(1, 8, 12), torch.randn(1, 10)
    with torch.no_grad(), Alive(*model.parameters(), *model.buffers()) as alive:
        model(*(tensor.to(dtype) for tensor in inputs))
    assert forward_memory(DenoiserSizes(FOUR_HEADS), shape, compute, kind=kind) == pytest.approx(
        alive.peak, rel=0.15
    )


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("chunk", "tiling"), [(1, None), (4, None), (16, None), (1, (256, 64)), (4, (512, 64))]
)
def test_decoding_needs_what_is_alive_at_most(
    chunk: int, tiling: tuple[int, int] | None, compute: Literal["fp32", "bf16"]
) -> None:
    """In three chunks of the release's frames; more of them add their latents alone."""
    dtype, grid = DTYPES[compute], (min(RELEASE_GRID[0], 3 * chunk), *RELEASE_GRID[1:])
    with torch.device("meta"):
        vae, latents = nn.Module.to(WFVAE(), dtype), torch.randn(1, 32, *grid, dtype=dtype)
    vae.enable_streaming(latent_frames=chunk)
    if tiling is not None:
        vae.enable_tiling(tile_size=tiling[0], tile_overlap=tiling[1])
    with torch.no_grad(), Alive(*vae.parameters()) as alive:
        for pixels in vae.iter_decode(latents):
            del pixels
    predicted = decoding_memory(BatchShape(grid, 1), compute, chunk=chunk, tiling=tiling)
    assert predicted == pytest.approx(alive.peak, rel=0.05 if tiling is None else 0.1)


def test_the_cache_holds_latents_whatever_else_a_denoiser_takes() -> None:
    shape = BatchShape(GRID, TEXT)
    assert cache_bytes(DenoiserSizes({**TINY, "in_channels": 9}), shape) == cache_bytes(
        DenoiserSizes(TINY), shape
    )
