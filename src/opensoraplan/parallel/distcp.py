"""Reading checkpoints of several processes that earlier versions wrote, with torch.distributed.checkpoint.
Tensors are named PART/NAME in them.
"""

import pickle
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from opensoraplan.parallel.shards import Parts

FOLDER = "sharded"
_INDEX = ".metadata"
# What an index is made of. It is a pickle, which the library would let run anything.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", *(name for name, kind in vars(torch).items() if type(kind) is torch.dtype)},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:  # noqa: ANN401
        if global_name not in _CLASSES.get(module_name, ()):
            raise ValueError(f"it names {module_name}.{global_name}, which no index of tensors does")
        return super().find_class(module_name, global_name)


class _Reader(FileSystemReader):
    """The library's own, but for the index."""

    def read_metadata(self, *_args: object, **_options: object) -> Metadata:
        with (Path(self.path) / _INDEX).open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds no index of tensors, but a {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_into(folder: Path, parts: Parts) -> None:
    """Fill `parts`, tensors or DTensors of any sharding, in place. All ranks call this."""
    alone = not (dist.is_available() and dist.is_initialized())
    reader = _Reader(folder)
    with _plain(folder):
        reader.read_metadata()  # of what is wrong with it, torch 2.9 does not tell
        load(_flat(parts), storage_reader=reader, no_dist=alone)


def read_whole(folder: Path, *, only: Collection[str] | None = None) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors by part and name, whole, in this process alone."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    with _plain(folder):
        for key, entry in _Reader(folder).read_metadata().state_dict_metadata.items():
            part, _, name = key.partition("/")
            if isinstance(entry, TensorStorageMetadata) and (only is None or part in only):
                parts.setdefault(part, {})[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        load(_flat(parts), storage_reader=_Reader(folder), no_dist=True)
    return parts


@contextmanager
def _plain(folder: Path) -> Iterator[None]:
    """What goes wrong in the block becomes a ValueError that begins with the name of the folder. The library
    gathers all ranks' errors in one that is no Exception: the first of them is told.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as failed:
        raise ValueError(f"{folder.name}: {next(iter(failed.failures.values()))[0]}") from None
    except (OSError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder.name}: {error}") from None


def _flat(parts: Parts) -> dict[str, Any]:
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
