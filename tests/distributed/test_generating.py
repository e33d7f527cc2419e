"""A video that several ranks make together is the one that one process makes."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from command import Command, Running
from denoising import RAGGED, WHOLE, make_batch, make_model
from ranks import Ranks
from tiny_models import VAE, lora_of
from torch import Tensor

from opensoraplan.data.video import read_frames
from opensoraplan.formats.lora import write_lora
from opensoraplan.models.wfvae import WFVAE
from opensoraplan.parallel.apply import share_sample
from opensoraplan.parallel.branches import share_branches
from opensoraplan.parallel.collectives import part_of
from opensoraplan.parallel.decode import _Halo, share_decoding
from opensoraplan.parallel.mesh import Mesh, MeshSettings
from opensoraplan.pipeline import OpenSoraPlanPipeline, VideoOutput

CLOSE = 1e-4


def video(model: Path, *, branches: bool = False, given: bool = False, **sizes: int) -> Tensor:
    """Frames of a prompt by the pipeline in `model`, on a mesh of these sizes or with shared branches; with
    the first and the last one `given`.
    """
    pipeline = OpenSoraPlanPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    if branches:
        share_branches(pipeline.transformer, dist.group.WORLD)
    elif sizes:
        share_sample(pipeline.transformer, Mesh.build(MeshSettings(dp_shard=1, **sizes), device_type="cpu"))
    output = pipeline(
        "a fox", height=64, width=64, num_frames=9, num_inference_steps=3, seed=1,
        batched_guidance=branches, output_type="pt",
        **({"image": picture(0), "last_image": picture(128)} if given else {}),
    )  # fmt: skip
    assert isinstance(output, VideoOutput)
    return output.frames


def picture(level: int) -> Tensor:
    columns = torch.arange(64, dtype=torch.uint8).expand(64, -1) + level
    return torch.stack([columns, columns.T, columns // 2], dim=-1).contiguous()


def on_ranks(model: Path, branches: bool, given: bool, sizes: dict[str, int]) -> Tensor:
    return video(model, branches=branches, given=given, **sizes)


@pytest.mark.parametrize("given", [False, True], ids=["text", "frames"])
@pytest.mark.parametrize(
    ("count", "branches", "sizes"),
    [(2, False, {"sp": 2}), (4, False, {"sp": 4}), (2, False, {"tp": 2}), (2, True, {})],
    ids=["sp 2", "sp 4", "tp 2", "guidance"],
)
def test_video_equals_one_process(
    ranks: Ranks, tiny_model: Path, count: int, branches: bool, given: bool, sizes: dict[str, int]
) -> None:
    reference = video(tiny_model, given=given)
    for frames in ranks(on_ranks, tiny_model, branches, given, sizes, ranks=count):
        assert (frames - reference).abs().max() < CLOSE


def velocity(grid: tuple[int, int, int], sizes: dict[str, int] | None) -> Tensor:
    model = make_model().eval()
    if sizes is not None:
        share_sample(model, Mesh.build(MeshSettings(dp_shard=1, **sizes), device_type="cpu"))
    batch = make_batch(grid)
    del batch["target"]
    with torch.no_grad():
        return model(**batch, return_dict=False)[0]


@pytest.mark.parametrize("grid", [WHOLE, RAGGED], ids=["whole", "padded"])
def test_velocity_on_four_ranks_equals_one_process(ranks: Ranks, grid: tuple[int, int, int]) -> None:
    reference = velocity(grid, None)
    for sizes in ({"sp": 4}, {"sp": 2, "tp": 2}):
        for result in ranks(velocity, grid, sizes, ranks=4):
            assert (result - reference).abs().max() < CLOSE * reference.abs().max()


@functools.cache
def make_vae() -> WFVAE:
    torch.manual_seed(0)
    return WFVAE(**VAE, shift=None, scale=None)


def decoded_rows(latents: Tensor, chunk: int | None) -> Tensor:
    vae = make_vae()
    if chunk is None:
        vae.disable_streaming()
    else:
        vae.enable_streaming(latent_frames=chunk)
    share_decoding(vae, dist.group.WORLD)
    pixels = torch.cat(list(vae.iter_decode(latents)), dim=2)
    make_vae.cache_clear()  # its hooks belong to this job's group
    return pixels


@pytest.mark.parametrize("chunk", [None, 1, 2], ids=["whole", "chunks of 1", "chunks of 2"])
@pytest.mark.parametrize("count", [2, 4])
def test_rows_decoded_on_ranks_equal_the_whole(ranks: Ranks, count: int, chunk: int | None) -> None:
    latents = torch.randn(1, 4, 4, 8, 6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        reference = make_vae().decode(latents).sample
    for pixels in ranks(decoded_rows, latents, chunk, ranks=count):
        assert (pixels - reference).abs().max() < 1e-5 * reference.abs().max()


def widened(x: Tensor) -> Tensor:
    """What a convolution gets for this rank's rows of x."""
    group = dist.group.WORLD
    assert group is not None
    seen: list[Tensor] = []

    def layer(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows

    own = part_of(x, dim=3, group=group)
    assert torch.equal(_Halo(group, grown=1).run(layer, own), own)
    return seen[0]


def test_rows_of_neighbours_come_in_the_layout_of_convolutions(ranks: Ranks) -> None:
    """Another one would be copied by each of them."""
    layout = torch.channels_last_3d
    x = torch.randn(2, 3, 2, 4, 5).to(memory_format=layout)
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1))
    for rank, rows in enumerate(ranks(widened, x, ranks=2)):
        assert torch.equal(rows, padded[..., 2 * rank : 2 * rank + 4, :])
        assert rows.is_contiguous(memory_format=layout)


def test_rows_that_cannot_be_shared_out_are_refused(ranks: Ranks) -> None:
    latents = torch.zeros(1, 4, 1, 6, 6)
    with pytest.raises(
        AssertionError, match="6 rows of latents cannot be shared out over 4 ranks: use 1, 2, 3, 6"
    ):
        ranks(decoded_rows, latents, None, ranks=4)


@pytest.mark.parametrize("branch_ranks", [1, 2], ids=["tokens", "branches"])
def test_command_in_several_processes_makes_the_picture_of_one(
    osp: Command,
    start_ranks: Callable[..., list[Running]],
    tiny_model: Path,
    tmp_path: Path,
    branch_ranks: int,
) -> None:
    """A picture is stored as it is; a codec would make more of the difference of sums in another order."""
    command = ["generate", "a fox", "--model", tiny_model, "--dtype", "fp32", "--steps", 3, "--frames", 1]
    command += ["--height", 64, "--width", 64, "--batched-guidance"]
    write_lora(lora_of(tiny_model, seed=0), tmp_path / "lora.safetensors", kind="diffusers")
    command += ["--lora", "lora.safetensors:0.5"]
    outcome = osp(*command, "--out", "one.png")
    assert outcome.code == 0, outcome
    for process in start_ranks(*command, "--out", "two.png", "--branch-ranks", branch_ranks, ranks=2):
        assert process.wait() == 0, process.said()
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        *("lora.safetensors", "one.json", "one.png", "two.json", "two.png")
    ]
    one, two = (read_frames(path).int() for path in files)
    assert one.float().std() > 1
    # Values that differ by less than CLOSE become another level where they are that near to its edge.
    assert (one - two).abs().max() <= 1
    assert (one != two).float().mean() < 255 * CLOSE
