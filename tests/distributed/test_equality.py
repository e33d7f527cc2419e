"""Every mesh trains as one process does: the same losses and gradients, step by step."""

import functools

import denoising
import pytest
import torch
from denoising import RAGGED, WHOLE, Result, assert_equal
from ranks import Ranks

MESHES = {
    "fsdp 2": {"dp_shard": 2},
    "fsdp 4": {"dp_shard": 4},
    "hsdp 2 x 2": {"dp_replicate": 2, "dp_shard": 2},
    "hsdp 2 x tp 2": {"dp_replicate": 2, "dp_shard": 1, "tp": 2},
    "sp 2": {"sp": 2},
    "sp 4": {"sp": 4},
    "tp 2": {"tp": 2},
    "tp 2 x sp 2": {"sp": 2, "tp": 2},
    "fsdp 2 x sp 2": {"dp_shard": 2, "sp": 2},
    "fsdp 2 x tp 2": {"dp_shard": 2, "tp": 2},
}


def run(sizes: dict[str, int], options: dict[str, object]) -> Result:
    return denoising.train(sizes, **options)  # type: ignore[arg-type]


@functools.cache
def one_process(
    grid: tuple[int, int, int] = WHOLE,
    *,
    masked: bool = True,
    given: bool = False,
    double_ff: bool = True,
    layers: tuple[int, ...] = (2, 2, 2),
    dense: bool = False,
) -> Result:
    torch.set_num_threads(1)
    rates = {"sparse_n": None} if dense else {}
    return denoising.train(
        None, grid=grid, masked=masked, given=given, double_ff=double_ff, num_layers=layers, **rates
    )


# Where each rank has whole samples, none is padded for it.
CASES = {mesh: (mesh, WHOLE) for mesh in MESHES}
CASES |= {f"{mesh}, padded": (mesh, RAGGED) for mesh, sizes in MESHES.items() if {"sp", "tp"} & {*sizes}}


@pytest.mark.parametrize("case", CASES)
def test_mesh_equals_one_process(ranks: Ranks, case: str) -> None:
    mesh, grid = CASES[case]
    sizes = MESHES[mesh]
    count = torch.tensor(list(sizes.values())).prod().item()
    for result in ranks(run, sizes, {"grid": grid}, ranks=int(count)):
        assert_equal(result, one_process(grid))


@pytest.mark.parametrize("grid", [WHOLE, RAGGED], ids=["whole", "padded"])
@pytest.mark.parametrize("mesh", ["tp 2", "sp 2", "tp 2 x sp 2"])
def test_timesteps_of_single_frames_equal_one_process(
    ranks: Ranks, mesh: str, grid: tuple[int, int, int]
) -> None:
    count = torch.tensor(list(MESHES[mesh].values())).prod().item()
    for result in ranks(run, MESHES[mesh], {"grid": grid, "given": True}, ranks=int(count)):
        assert_equal(result, one_process(grid, given=True))


@pytest.mark.parametrize("mesh", ["tp 2 x sp 2", "fsdp 2 x sp 2"])
def test_dense_model_with_one_feed_forward_equals_one_process(ranks: Ranks, mesh: str) -> None:
    options = {"sparse_n": None, "double_ff": False}
    for result in ranks(run, MESHES[mesh], options, ranks=4):
        assert_equal(result, one_process(double_ff=False, dense=True))


@pytest.mark.parametrize("mesh", ["tp 2", "sp 2"])
def test_texts_of_one_length_equal_one_process(ranks: Ranks, mesh: str) -> None:
    """Nothing is masked then."""
    for result in ranks(run, MESHES[mesh], {"masked": False}, ranks=2):
        assert_equal(result, one_process(masked=False))


@pytest.mark.parametrize("mesh", ["tp 2", "sp 2"])
def test_recompute_equals_one_process(ranks: Ranks, mesh: str) -> None:
    for result in ranks(run, MESHES[mesh], {"recompute": 3}, ranks=2):
        assert_equal(result, one_process())


def test_offloaded_shards_equal_one_process(ranks: Ranks) -> None:
    for result in ranks(run, {"dp_shard": 2}, {"cpu_offload": True}, ranks=2):
        assert_equal(result, one_process())


@pytest.mark.parametrize("mesh", ["tp 2", "sp 2", "fsdp 2"])
def test_compiled_blocks_equal_one_process(ranks: Ranks, mesh: str) -> None:
    """In a graph for each kind of block, not for each of the four blocks."""
    options = {"backend": "eager", "num_layers": (4,), "sparse_n": None}
    for result in ranks(run, MESHES[mesh], options, ranks=2):
        assert_equal(result, one_process(layers=(4,), dense=True))
        assert 1 <= result.graphs <= 3


def test_bf16_on_a_mesh_learns_as_one_process_in_bf16(ranks: Ranks) -> None:
    """Weights are gathered in bf16, gradients reduced in fp32: no worse than rounding."""
    options = {"compute": torch.bfloat16}
    for mesh in ("fsdp 2 x sp 2", "fsdp 2 x tp 2"):
        for result in ranks(run, MESHES[mesh], options, ranks=4):
            assert result.losses == pytest.approx(one_process().losses, rel=0.02)
