"""Tensors that stay in their files until they are asked for. Pickles are read without running
code; safetensors too.

What the tensors mean (dialects, shards, names) is in checkpoints.py.
"""

import argparse
import io
import math
import mmap
import pickletools
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2
from torch.serialization import safe_globals

from opensoraplan.documents import check_file, read_shard_index

# What a checkpoint may hold beside its weights, and what we neither need nor import nor run: objects of the
# training frameworks (by how their names start), and plain values of the standard library and numpy.
FRAMEWORKS = ("megatron.", "mindspeed.", "mindspeed_mm.", "transformer_engine.", "torch_npu.")
PLAIN_VALUES = {
    "_io.BytesIO",  # Transformer Engine's `_extra_state`
    "datetime.datetime",
    "datetime.timedelta",
    "numpy.core.multiarray._reconstruct",  # arrays: the state of numpy's random numbers
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "signal.Signals",
    "types.SimpleNamespace",
}
# What torch reads by itself, beside its own.
PLAIN_CONTAINERS = {"collections.Counter", "collections.OrderedDict", "argparse.Namespace"}
# How torch_npu saves every tensor that was on an Ascend card.
NPU_TENSOR = "torch_npu.utils.storage._rebuild_npu_tensor"

# Where torch says in the text of an error which name it refused.
REFUSED = re.compile(r"GLOBAL ([\w.]+)")
LOCAL_HEADER_SIZE = 30  # of a zip record, before its name
OWN_PAGES = 2**20  # bytes
# A compressed file may become so many times as large in memory; a small one may, whatever it becomes.
MOST_UNPACKED, SMALL_FILE = 20, 2**28
LEGACY_PICKLES = 5  # magic number, version, system, content, keys of the storages; then the values


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


# --- Pickles ------------------------------------------------------------------------------------------------


class Ignored:
    """Stands in for an object that is not needed; keeps nothing of it."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _rebuild_npu_tensor(storage: Any, *arguments: Any) -> Tensor:  # noqa: ANN401 (as torch_npu pickled it)
    """What torch_npu's function of that name does, on the CPU: the last argument is a layout on the card."""
    return _rebuild_tensor_v2(storage, *arguments[:5])


def read_pickle(path: Path) -> Any:  # noqa: ANN401 (whatever was pickled)
    """What `torch.save` put into `path`, with a `Stored` for every tensor, and no code of the file's run.

    Objects that are not needed (`FRAMEWORKS`, `PLAIN_VALUES`) become `Ignored`. Raises ValueError for a file
    that is no checkpoint, is truncated, or holds anything else that is not plain data.
    """
    check_file(path)
    with open(path, "rb") as file:  # an OSError from here on is the content's fault
        start = file.read(64)
    if not start:
        raise ValueError(f"{path} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is only a Git LFS pointer to the checkpoint: fetch it with `git lfs pull`")
    names: set[str] = set()
    with _only_value_errors(path, names):
        records = _scan(path, names, zipped=start.startswith(b"PK\x03\x04"))
        if not start.startswith((b"PK\x03\x04", b"\x80")):
            raise ValueError("it begins neither as a zip archive nor as a pickle")
        ignored = [name for name in names if name.startswith(FRAMEWORKS) or name in PLAIN_VALUES]
        stand_ins = {name: Ignored for name in ignored} | {NPU_TENSOR: _rebuild_npu_tensor}
        with safe_globals([argparse.Namespace, *((value, name) for name, value in stand_ins.items())]):
            content = None if records is None else _read_in_place(path, records)
            return _read_whole(path) if content is None else content


@contextmanager
def _only_value_errors(path: Path, names: set[str]) -> Iterator[None]:
    """Turn whatever a damaged or foreign file makes the readers raise into a ValueError that names it; of one
    with code, this is the reason, whatever else is wrong. `names`: classes and functions that it wants.
    """
    try:
        yield
    except Exception as error:
        match = REFUSED.search(str(error))
        code = {match[1]} if match else {name for name in names if not _is_plain(name)}
        if code:
            raise ValueError(
                f"{path} holds code or objects that could run code ({', '.join(sorted(code)[:5])}): refused. "
                "A checkpoint needs tensors and plain data only"
            ) from None
        # torch's own text advises to load with weights_only=False, which is what nobody should do.
        last = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        reason = next((line.strip() for line in last.splitlines() if line.strip()), type(error).__name__)
        if reason.startswith("Weights only load failed"):
            reason = type(error).__name__
        if reason.startswith("Unsupported operand"):
            reason += ", which no pickle of torch.save has unless it is told another protocol than its own"
        raise ValueError(
            f"{path} is not a readable checkpoint (truncated, or not one at all): {reason.split('. ')[0]}"
        ) from error


def _is_plain(name: str) -> bool:
    """Whether torch reads objects of this name, or we leave them out. `__torch__`: of TorchScript."""
    starts = ("torch.", "__torch__.", *FRAMEWORKS)
    return name.startswith(starts) or name in PLAIN_VALUES | PLAIN_CONTAINERS


def _scan(path: Path, names: set[str], *, zipped: bool) -> set[int] | None:
    """The bytes at which a file's records begin, if they are stored as they are. Adds the names of all
    classes and functions that it wants to `names`.
    """
    with open(path, "rb") as file:
        if not zipped:
            with suppress(Exception):  # of a damaged file; what is wrong with it, torch.load will say
                for _ in range(LEGACY_PICKLES):
                    _add_globals(file, names)
            return None
        with ZipFile(file) as archive:
            records = archive.infolist()
            _check_sizes(records, size=path.stat().st_size)
            for record in records:
                if record.filename.endswith("/data.pkl"):
                    _add_globals(io.BytesIO(archive.read(record)), names)
        if any(record.compress_type != ZIP_STORED for record in records):
            return None
        return {_data_offset(file, record.header_offset) for record in records}


def _check_sizes(records: list[ZipInfo], *, size: int) -> None:
    """Raise ValueError for a small file that would become a large one in memory; weights hardly shrink."""
    unpacked = sum(record.file_size for record in records)
    if unpacked > max(MOST_UNPACKED * size, SMALL_FILE):
        raise ValueError(
            f"its {size / 1e9:.3g} GB would become {unpacked / 1e9:.3g} GB, which no weights do: refused"
        )


def _data_offset(file: IO[bytes], header: int) -> int:
    """Where the data of the zip record begins whose local header is at byte `header`."""
    file.seek(header + LOCAL_HEADER_SIZE - 4)
    name, extra = struct.unpack("<HH", file.read(4))
    return header + LOCAL_HEADER_SIZE + name + extra


def _add_globals(file: IO[bytes], names: set[str]) -> None:
    """Add the names of classes and functions in the pickle at the file's position, which ends behind it.

    `torch.serialization.get_unsafe_globals_in_checkpoint` reads neither the legacy format nor pickles of
    other protocols than torch's. Code in those must be named, too.
    """
    texts: list[str] = []  # the last ones, of which STACK_GLOBAL takes two
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            names.add(str(argument).replace(" ", ".", 1))
        elif opcode.name == "STACK_GLOBAL":
            names.add(".".join(texts))
        elif isinstance(argument, str):
            texts = [*texts[-1:], argument]


def _read_in_place(path: Path, records: set[int]) -> Any:  # noqa: ANN401
    """The content with tensors that know where they are. None if that is not where torch puts them: it tells
    the places from its own way to write, and does not look, which fails after repacking.
    """
    starts: set[int | None] = set()

    def find(tensor: Tensor) -> Stored:
        start: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if tensor.numel():
            starts.add(start)
        return _stored_in_zip(path, tensor, start or 0)

    content = _replace_tensors(_load_without_values(path), find)
    return content if starts <= records else None


def _read_whole(path: Path) -> Any:  # noqa: ANN401
    """A file from before torch 1.6, or a repacked one: all of it is in memory while it is in use."""
    return _replace_tensors(_load(path, "cpu"), _stored_in_memory)


def _load(path: Path, device: str) -> Any:  # noqa: ANN401
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location=device, weights_only=True)


def _load_without_values(path: Path) -> Any:  # noqa: ANN401
    if hasattr(torch.serialization, "_is_meta_location"):
        return _load(path, "meta")
    # Older versions of torch (2.9, for one) read all values for that, and do not tell their places.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return _load(path, "cpu")


def _replace_tensors(
    value: Any,  # noqa: ANN401
    replace: Callable[[Tensor], Stored],
    done: dict[int, Any] | None = None,
) -> Any:  # noqa: ANN401
    """`done`: what has become of each dict, by its id, since one may be in many places."""
    done = {} if done is None else done
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, dict):
        if id(value) not in done:
            done[id(value)] = {key: _replace_tensors(inner, replace, done) for key, inner in value.items()}
        return done[id(value)]
    return value


def _stored_in_memory(tensor: Tensor) -> Stored:
    # A copy each time: tensors that share a storage in the file must not do so in a model.
    return Stored(
        tuple(tensor.shape),
        tensor.dtype,
        lambda: tensor.detach().clone(memory_format=torch.contiguous_format),
    )


def _stored_in_zip(path: Path, meta: Tensor, start: int) -> Stored:
    """A tensor like `meta`, whose storage begins at byte `start` of the file."""
    shape, stride, dtype = tuple(meta.shape), meta.stride(), meta.dtype
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if meta.numel() else 0
    offset = start + int(meta.storage_offset()) * dtype.itemsize

    def read() -> Tensor:
        return torch.as_strided(read_span(path, offset, span, dtype), shape, stride).contiguous()

    return Stored(shape, dtype, read)


def read_span(path: Path, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` values of `dtype` from byte `offset` of a file, [count].

    The file is not mapped, as `torch.load(mmap=True)` would: pages of a mapping count as memory of the
    process, Linux refuses to map a file that is larger than memory and swap, and reading a mapped file that
    has shrunk ends the process.
    """
    end = offset + count * dtype.itemsize
    if path.stat().st_size < end:
        raise ValueError(f"{path} is truncated: it ends before byte {end}")
    values = empty((count,), dtype)
    with open(path, "rb") as file:
        file.seek(offset)
        file.readinto(values.view(torch.uint8).numpy().data)
    return values


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without values; a large one in pages of its own, which go back to the system with it.

    malloc would put tensors that come and go between those that stay, and the holes that they leave are lost:
    loading a model of 1 GB in another dtype took up to 0.2 GB more.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < OWN_PAGES or not hasattr(mmap, "MAP_PRIVATE"):  # Windows has no such flag
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # of a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)  # a third of the page faults
    return torch.frombuffer(pages, dtype=dtype).view(shape)


# --- Safetensors --------------------------------------------------------------------------------------------

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. Raises ValueError if it is none, or truncated."""
    from safetensors import SafetensorError, safe_open

    def read(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name).clone()  # what the file gives is mapped, and goes with it

    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file (truncated, or not one): {error}"
        ) from error
    if strange := sorted({kind for _, kind in kinds.values()} - set(SAFETENSORS_DTYPES)):
        raise ValueError(f"{path} has tensors of a kind that no model has: {', '.join(strange)}")
    return {
        name: Stored(shape, SAFETENSORS_DTYPES[kind], partial(read, name))
        for name, (shape, kind) in kinds.items()
    }


def read_sharded_safetensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a diffusers component folder: one safetensors file, or shards with an index.

    Raises ValueError if the index and the shards do not agree, or if it is not clear which file counts.
    """
    files = sorted(folder.glob("*.safetensors"))
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not files:
        raise ValueError(f"there are no safetensors files in {folder}")
    if len(indices) > 1 or (not indices and len(files) > 1):
        names = ", ".join(path.name for path in [*indices, *files])
        raise ValueError(f"{folder} has more than one set of weights ({names}): leave one there")
    if not indices:
        return read_safetensors(files[0])

    index = indices[0]
    weights = read_shard_index(index)
    named = sorted(set(weights.values()))
    if missing := [name for name in named if not (folder / name).is_file()]:
        raise ValueError(f"{index} names shards that are not there: {', '.join(missing)}")
    stored = {name: tensor for file in named for name, tensor in read_safetensors(folder / file).items()}
    if absent := sorted(set(weights) - set(stored)):
        raise ValueError(f"{index} names tensors that are in no shard: {', '.join(absent)}")
    return stored
