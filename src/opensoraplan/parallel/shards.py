"""Sharded tensors: what this rank has of them, and files of the pieces of all ranks, for any number to read.

A part of a checkpoint, such as "model", is PART.safetensors, or of four ranks
PART-00001-of-00004.safetensors and so on, whose headers say where in its tensor each piece begins, as
torch.distributed.checkpoint's HuggingFaceStorageWriter does.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Tensors = Mapping[str, Tensor]
Parts = Mapping[str, Tensors]

_NAME = re.compile(r"(\w+?)(?:-\d{5}-of-(\d{5}))?\.safetensors")
_OFFSETS = "DCP_SHARDING_INFO"
_OFFSET = "saved_offsets"


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _offset(tensor: Tensor) -> tuple[int, ...]:
    """Where in the whole tensor this rank's part begins."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    return tuple(
        compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]
    )


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy `whole`, or what this rank has of it, into `tensor`. Raises ValueError for another shape."""
    if tensor.shape != whole.shape:
        raise ValueError(f"a tensor is {list(whole.shape)}, where {list(tensor.shape)} is wanted")
    _copy_overlap(tensor, whole, (0,) * whole.ndim)


@torch.no_grad()
def _copy_overlap(tensor: Tensor, piece: Tensor, offset: tuple[int, ...]) -> None:
    """Copy what this rank has of `tensor` from a piece of it that begins at `offset`."""
    own, begin = local(tensor), _offset(tensor)
    first = [max(pair) for pair in zip(begin, offset, strict=True)]
    ends = zip(begin, own.shape, offset, piece.shape, strict=True)
    last = [min(a + length, b + size) for a, length, b, size in ends]
    if all(a < b for a, b in zip(first, last, strict=True)):
        to, of = (
            tuple(slice(a - start, b - start) for a, b, start in zip(first, last, starts, strict=True))
            for starts in (begin, offset)
        )
        own[to].copy_(piece[of])


# --- Writing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """What a rank writes of a tensor, and where in it that begins."""

    values: Tensor
    offset: tuple[int, ...]

    def copied(self) -> "Piece":
        """In host memory, for good: what is done to the tensor later does not change it."""
        return Piece(self.values.to("cpu", copy=True), self.offset)


def pieces(tensors: Mapping[str, Tensor], *, rank: int = 0) -> dict[str, Piece]:
    """What this rank writes: of what several ranks have, the first of them writes it."""
    return {
        name: Piece(local(tensor).detach(), _offset(tensor))
        for name, tensor in tensors.items()
        if _is_first(tensor, rank) and local(tensor).numel()
    }


def _is_first(tensor: Tensor, rank: int) -> bool:
    """Whether no rank before this one has the same part of the tensor."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    place = tensor.device_mesh.get_coordinate()
    assert place is not None, "a rank outside of a tensor's mesh has nothing of it"
    return not any(at for at, how in zip(place, tensor.placements, strict=True) if how.is_replicate())


def file_name(part: str, *, rank: int, count: int) -> str:
    """Of the file that one of `count` ranks writes."""
    return f"{part}-{rank + 1:05d}-of-{count:05d}.safetensors" if count > 1 else f"{part}.safetensors"


def write(folder: Path, part: str, own: Mapping[str, Piece], *, rank: int = 0, count: int = 1) -> Path:
    """Write this rank's file of a part. Raises OSError or SafetensorError for a full disk."""
    path = folder / file_name(part, rank=rank, count=count)
    header = {"format": "pt"}
    if count > 1:
        header[_OFFSETS] = json.dumps({name: {_OFFSET: piece.offset} for name, piece in own.items()})
    save_file({name: piece.values.contiguous().cpu() for name, piece in own.items()}, path, metadata=header)
    return path


# --- Reading ------------------------------------------------------------------------------------------------


class Part:
    """A part in open files: pieces of tensors, which are read when they are asked for."""

    def __init__(self) -> None:
        self._pieces: dict[str, dict[tuple[int, ...], Any]] = {}  # the file of each, by offset

    def add(self, file: Any) -> None:  # noqa: ANN401 (what safe_open gives has no type)
        """Take in another open file of this part."""
        offsets = json.loads((file.metadata() or {}).get(_OFFSETS, "null"))
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            begin = [0] * len(_shape(file, name)) if offsets is None else offsets[name][_OFFSET]
            self._pieces.setdefault(name, {})[tuple(begin)] = file

    def names(self) -> list[str]:
        return list(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor. Raises ValueError if there is none of this name, or not all of it."""
        if name not in self._pieces:
            raise ValueError(f"{name} is missing")
        shapes = {begin: _shape(file, name) for begin, file in self._pieces[name].items()}
        ends = (map(sum, zip(begin, shape, strict=True)) for begin, shape in shapes.items())
        whole = tuple(max(along) for along in zip(*ends, strict=True))
        there = sum(math.prod(shape) for shape in shapes.values())
        if there != math.prod(whole):
            raise ValueError(f"{name}: {there} of its {math.prod(whole)} numbers are there")
        return whole

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise ValueError unless `fill` would find all of a tensor of this name and shape."""
        if (shape := self.shape(name)) != tuple(tensor.shape):
            raise ValueError(f"{name} is {list(shape)}, where {list(tensor.shape)} is wanted")

    def fill(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor, or what this rank has of it, into `tensor`."""
        for begin, file in self._pieces[name].items():
            _copy_overlap(tensor, file.get_tensor(name), begin)

    def whole(self, name: str) -> Tensor:
        """A tensor of all its pieces."""
        shape, files = self.shape(name), list(self._pieces[name].values())
        piece = files[0].get_tensor(name)
        if len(files) == 1:
            return piece
        tensor = torch.empty(shape, dtype=piece.dtype)
        self.fill(name, tensor)
        return tensor


def _shape(file: Any, name: str) -> list[int]:  # noqa: ANN401
    return file.get_slice(name).get_shape()


@contextmanager
def open_parts(folder: Path, only: Collection[str] | None = None) -> Iterator[dict[str, Part]]:
    """The parts in a folder, by name, of these `only`. Raises ValueError, with the name of a file, for one
    that is damaged or missing.
    """
    matches = (_NAME.fullmatch(path.name) for path in sorted(folder.iterdir()))
    counts = {match[1]: int(match[2] or 1) for match in matches if match}
    parts = {part: Part() for part in counts if only is None or part in only}
    with ExitStack() as stack:
        for part, of_part in parts.items():
            for rank in range(counts[part]):
                path = folder / file_name(part, rank=rank, count=counts[part])
                with named(path):
                    of_part.add(stack.enter_context(safe_open(path, framework="pt")))
        yield parts


@contextmanager
def named(file: Path) -> Iterator[None]:
    """What goes wrong with a file in the block becomes a ValueError that begins with its name."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise ValueError(f"{file.name}: {error}") from None
