"""Tensors that stay in their files until they are asked for. Pickles are read without running code;
safetensors too.

What the tensors mean (dialects, shards, names) is in checkpoints.py.
"""

import argparse
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

# Objects of the training frameworks that a checkpoint's `args` may hold. They are not needed, and not
# imported.
FRAMEWORKS = ("megatron.", "mindspeed.", "mindspeed_mm.", "transformer_engine.")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: what is known of it without reading, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class StoredTensors(Mapping[str, Tensor]):
    """A mapping that reads a tensor each time one is taken out of it, and keeps none."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = dict(stored)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.stored.items()}

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {tensor.dtype for tensor in self.stored.values()}

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


class _Ignored:
    """Stands in for an object of a training framework; keeps nothing of it."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def read_pickle(path: Path) -> Any:  # noqa: ANN401 (whatever was pickled)
    """What `torch.save` put into `path`, with a `Stored` for every tensor, and no code of the file's run.

    Raises ValueError for a file that is no checkpoint, is truncated, or holds anything but plain data.
    """
    allowed: list[Any] = [argparse.Namespace, np.ndarray, np.dtype, (np.ndarray, "numpy.ndarray")]
    reconstruct = np.empty(0).__reduce__()[0]
    allowed += [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    allowed += [type(np.dtype(name)) for name in ("uint32", "uint8", "int64", "float64")]
    allowed += [(_Ignored, "_io.BytesIO")]  # Transformer Engine's `_extra_state`
    try:
        with safe_globals(allowed):
            unsafe = get_unsafe_globals_in_checkpoint(path) if _is_zip(path) else []
        foreign = [name for name in unsafe if not name.startswith(FRAMEWORKS)]
        if foreign:
            raise ValueError(
                f"{path} holds code or objects that could run code ({', '.join(sorted(foreign))}): refused. "
                "A checkpoint needs tensors and plain data only"
            )
        with safe_globals(allowed + [(_Ignored, name) for name in unsafe]):
            return _read_zip(path) if _is_zip(path) else _read_legacy(path)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} is not a readable checkpoint (truncated, or not one at all): {reason}"
        ) from error


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _read_zip(path: Path) -> Any:  # noqa: ANN401
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = torch.load(path, map_location="cpu", weights_only=True)
    return _replace_tensors(content, lambda tensor: _stored_in_zip(path, tensor))


def _read_legacy(path: Path) -> Any:  # noqa: ANN401
    """A file from before torch 1.6, which can only be read whole."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    return _replace_tensors(content, lambda t: Stored(tuple(t.shape), t.dtype, lambda: t.detach()))


def _replace_tensors(value: Any, replace: Callable[[Tensor], Stored]) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, dict):
        return {key: _replace_tensors(inner, replace) for key, inner in value.items()}
    return value


def _stored_in_zip(path: Path, fake: Tensor) -> Stored:
    start: int = fake.untyped_storage()._checkpoint_offset  # type: ignore[attr-defined]
    shape, stride, dtype = tuple(fake.shape), fake.stride(), fake.dtype
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if fake.numel() else 0
    offset = start + int(fake.storage_offset()) * dtype.itemsize

    def read() -> Tensor:
        return torch.as_strided(read_span(path, offset, span, dtype), shape, stride).contiguous()

    return Stored(shape, dtype, read)


def read_span(path: Path, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` values of `dtype` from byte `offset` of a file, [count]. Not memory-mapped: mapped pages would
    count as memory of the process for as long as the file is open.
    """
    buffer = bytearray(count * dtype.itemsize)
    with open(path, "rb") as file:
        file.seek(offset)
        if file.readinto(buffer) != len(buffer):
            raise ValueError(f"{path} is truncated: it ends before byte {offset + len(buffer)}")
    return torch.frombuffer(buffer, dtype=dtype) if count else torch.empty(0, dtype=dtype)


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. Raises ValueError if it is none, or truncated."""
    from safetensors import SafetensorError, safe_open

    def read(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).clone()  # what the file gives is mapped, and goes with it

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {
                name: Stored(
                    tuple(part.get_shape()), SAFETENSORS_DTYPES[part.get_dtype()], partial(read, name)
                )
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file (truncated, or not one): {error}"
        ) from error


def read_sharded_safetensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a diffusers component folder: one safetensors file, or shards with an index."""
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(names - {file.name for file in files}):
            raise ValueError(f"{index} names shards that are not there: {', '.join(missing)}")
    if not files:
        raise ValueError(f"there are no safetensors files in {folder}")
    return {name: tensor for file in files for name, tensor in read_safetensors(file).items()}
