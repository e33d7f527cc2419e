"""Sharded tensors: what this rank has of them, and files of the shards of all ranks, for any number to read.

The files are torch.distributed.checkpoint's, in a folder `sharded`; tensors are named PART/NAME in them.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

FOLDER = "sharded"

Parts = Mapping[str, Mapping[str, Tensor]]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy `whole`, or what this rank has of it, into `tensor`. Raises ValueError for another shape."""
    if tensor.shape != whole.shape:
        raise ValueError(f"a tensor is {list(whole.shape)}, where {list(tensor.shape)} is wanted")
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
            whole = whole.narrow(dim, start, length)
    local(tensor).copy_(whole)


def are_in(folder: Path) -> bool:
    """Whether the checkpoint in `folder` was written by several ranks."""
    return (folder / FOLDER).is_dir()


def write(folder: Path, parts: Parts, *, group: dist.ProcessGroup) -> Future[Any]:
    """Begin to write; the tensors are copied before this returns. All ranks of the gloo group call it; the
    first one's future is done when all have written.
    """
    return cast(Future, async_save(_flat(parts), checkpoint_id=folder / FOLDER, process_group=group))


def finish(written: Future[Any]) -> None:
    """Return when what `write` began is on the disk. Raises OSError, of any rank."""
    with _plain():
        written.result()


@contextmanager
def _plain() -> Iterator[None]:
    """The library gathers all ranks' errors in one that is no Exception; let the first of them pass."""
    try:
        yield
    except CheckpointException as failed:
        error = next(iter(failed.failures.values()))[0]
        raise (error if isinstance(error, OSError | ValueError) else OSError(str(error))) from None


def read_into(folder: Path, parts: Parts) -> None:
    """Fill `parts`, tensors or DTensors of any sharding, in place. All ranks call this."""
    alone = not (dist.is_available() and dist.is_initialized())
    with _plain():
        load(_flat(parts), checkpoint_id=folder / FOLDER, no_dist=alone)


def read_whole(folder: Path, *, only: Sequence[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """All tensors by part and name, whole, in this process alone."""
    metadata = FileSystemReader(folder / FOLDER).read_metadata().state_dict_metadata
    parts: dict[str, dict[str, Tensor]] = {}
    for key, entry in metadata.items():
        part, _, name = key.partition("/")
        if isinstance(entry, TensorStorageMetadata) and (only is None or part in only):
            parts.setdefault(part, {})[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with _plain():
        load(_flat(parts), checkpoint_id=folder / FOLDER, no_dist=True)
    return parts


def _flat(parts: Parts) -> dict[str, Any]:
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
