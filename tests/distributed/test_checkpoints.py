"""Files of the pieces of several ranks: any number reads what any other number has written."""

import errno
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from opensoraplan.parallel import shards
from opensoraplan.parallel.mesh import Mesh, MeshSettings
from opensoraplan.parallel.ranks import Ranks as JobRanks
from opensoraplan.train.config import CheckpointSettings
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.writers import ShardedWriter

# Rows that four ranks cannot share evenly, a row for one of them alone, a number.
SHAPES = {"even": (8, 3), "uneven": (5, 4), "row": (1, 7), "wide": (6, 10), "number": ()}


def wholes() -> dict[str, Tensor]:
    return {
        name: torch.arange(float(torch.Size(shape).numel())).view(shape) for name, shape in SHAPES.items()
    }


def shared(tensors: dict[str, Tensor], sizes: tuple[int, int]) -> dict[str, Tensor]:
    """Rows over the first dimension of a mesh, columns over the second; "row" is whole on the second, "even"
    on the first. Numbers are plain tensors.
    """
    mesh = init_device_mesh("cpu", sizes)
    how = {"row": [Shard(0), Replicate()], "even": [Replicate(), Shard(1)]}
    return {
        name: distribute_tensor(tensor, mesh, how.get(name, [Shard(0), Shard(1)])) if tensor.ndim else tensor
        for name, tensor in tensors.items()
    }


def write(folder: str, sizes: tuple[int, int]) -> int:
    """Write a checkpoint of these ranks; how many numbers this rank has written."""
    place, rank, count = Path(folder), dist.get_rank(), dist.get_world_size()
    own = shards.pieces(shared(wholes(), sizes), rank=rank)
    shards.write(place, "model", own, rank=rank, count=count)
    return sum(piece.values.numel() for piece in own.values())


def read(output: str, sizes: tuple[int, int]) -> dict[str, Tensor]:
    """What these ranks read, joined."""
    parts = {"model": shared({name: torch.zeros(shape) for name, shape in SHAPES.items()}, sizes)}
    checkpoint.read_into(Path(output), 1, parts)
    return {
        name: tensor if not tensor.ndim else tensor.full_tensor()  # type: ignore[attr-defined]
        for name, tensor in parts["model"].items()
    }


def new_checkpoint(output: Path) -> Path:
    folder = checkpoint.path_of(output, 1)
    folder.mkdir(parents=True)
    checkpoint.write_state(folder, 1, {})
    return folder


def assert_same(read: dict[str, Tensor]) -> None:
    assert read.keys() == SHAPES.keys()
    assert all(torch.equal(read[name], whole) for name, whole in wholes().items())


def test_any_mesh_reads_what_any_other_has_written(ranks: Ranks, tmp_path: Path) -> None:
    numbers = sum(tensor.numel() for tensor in wholes().values())
    for written in ((4, 1), (2, 2), (1, 3)):
        output = tmp_path / f"{written}"
        folder = new_checkpoint(output)
        count = written[0] * written[1]
        assert sum(ranks(write, str(folder), written, ranks=count)) == numbers  # each once
        assert len(list(folder.glob("model-*.safetensors"))) == count
        assert_same(checkpoint.load(output, 1).parts["model"])
        for sizes in ((2, 1), (1, 2), (3, 1), (2, 2)):
            for found in ranks(read, str(output), sizes, ranks=sizes[0] * sizes[1]):
                assert_same(found)


def test_what_one_process_has_written_is_shared_out(ranks: Ranks, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, parts={"model": wholes()}, state={})
    for found in ranks(read, str(tmp_path), (2, 2), ranks=4):
        assert_same(found)


def test_checkpoints_of_earlier_versions_are_read(ranks: Ranks, tmp_path: Path) -> None:
    folder = new_checkpoint(tmp_path)
    ranks(write_as_before, str(folder), ranks=4)
    assert_same(checkpoint.load(tmp_path, 1).parts["model"])
    assert checkpoint.load(tmp_path, 1, only=("ema",)).parts == {}
    for sizes in ((2, 1), (1, 3)):
        for found in ranks(read, str(tmp_path), sizes, ranks=sizes[0] * sizes[1]):
            assert_same(found)


def write_as_before(folder: str) -> None:
    tensors = {f"model/{name}": tensor for name, tensor in shared(wholes(), (2, 2)).items()}
    dcp.save(tensors, checkpoint_id=Path(folder) / "sharded")


def test_torch_reads_the_pieces_too(ranks: Ranks, tmp_path: Path) -> None:
    ranks(write, str(tmp_path), (2, 2), ranks=4)
    found = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert_same(found)


def test_a_disk_that_is_full_for_one_rank_is_told_by_all(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks(write_on_a_full_disk, str(tmp_path), 1, ranks=2):
        assert said.endswith("step-00000002: the disk is full; the last checkpoint is of step 1")
    assert [path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()] == ["step-00000001"]
    assert_same(checkpoint.load(tmp_path, 1).parts["model"])


def write_on_a_full_disk(output: str, rank: int) -> str:
    """What is said of the second checkpoint, of which this rank cannot write its pieces."""
    job = JobRanks(Mesh.build(MeshSettings(), device_type="cpu"))
    writer = ShardedWriter(Path(output), CheckpointSettings(), job)
    parts = {"model": shared(wholes(), (2, 1))}
    writer.save(1, parts=parts, state={})
    writer.wait()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if job.rank == rank:
            patch.setattr(safetensors.torch, "serialize_file", full)  # the library's own, that writes
        writer.save(2, parts=parts, state={})
        try:
            writer.wait()
        except ValueError as error:
            return str(error)
    return ""
