"""Reads checkpoints of every dialect of Open-Sora Plan v1.5.0 as one mapping with the release's names.

Dialects: release pickles, Megatron shards (tensor and pipeline parallel), MindSpeed-MM's names in either, VAE
pickles, and diffusers folders. Each tensor is read when it is accessed. export.py writes checkpoints.
"""

import argparse
import itertools
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opensoraplan.documents import check_file, read_json_object, read_text
from opensoraplan.formats import keys
from opensoraplan.formats.stored import (
    Ignored,
    Stored,
    StoredTensors,
    empty,
    read_pickle,
    read_safetensors,
    read_sharded_safetensors,
)
from opensoraplan.models.original import NESTED, denoiser_name
from opensoraplan.models.sizes import split_dimension
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.vae import VAES
from opensoraplan.settings import shown

logger = logging.getLogger(__name__)

# Prefix that training frameworks add to names.
PREFIX = re.compile(r"^(module\.)+")

RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
SHARD_FILE = "model_optim_rng.pt"
ITERATION_FOLDER = re.compile(r"iter_(\d+)")
# Modules that each pipeline rank numbers from 0.
NUMBERED = re.compile(rf"({NESTED}|skip_norm_linear|skip_norm_linear_enc)\.(\d+)\.(.+)")
TRACKER = "latest_checkpointed_iteration.txt"
# Possible places of the one file in a folder of the release.
RELEASE_FILES = (
    "model_ema.pt",
    "model.pt",
    "model_states.pt",
    "mp_rank_00/model_states.pt",
    "transformers/mp_rank_00/model_states.pt",
)
EMA_KEYS = ("ema_state_dict", "ema_model")

Dialect = Literal["release", "megatron", "diffusers", "safetensors"]


class Checkpoint(StoredTensors):
    """The tensors of a checkpoint by the release's names, read when accessed, and `info` about it."""

    def __init__(self, stored: Mapping[str, Stored], info: "Info") -> None:
        odd = [f"{name} ({t.dtype})" for name, t in stored.items() if not t.dtype.is_floating_point]
        if odd:
            raise ValueError(f"{info.path} has weights that are not floating-point: {', '.join(odd)}")
        super().__init__(stored)
        self.info = info

    @property
    def path(self) -> Path:
        return self.info.path


@dataclass(frozen=True)
class Info:
    """Properties of a checkpoint. `path`: its file, or the folder of its files. `names`: whose names for
    attention it uses. `ema`: whether these are EMA weights; `has_ema`: whether the file has EMA weights.
    `extra_states`: number of ignored entries without weights. `config`: our own config, if the
    checkpoint has one.
    """

    dialect: Dialect
    path: Path
    names: Literal["release", "mindspeed-mm"] = "release"
    ema: bool = False
    has_ema: bool = False
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    iteration: str | None = None
    extra_states: int = 0
    config: dict[str, Any] | None = None


def load_checkpoint(path: str | Path, *, ema: bool | None = None) -> dict[str, Tensor]:
    """Load all tensors of a checkpoint of any dialect, by the release's names, with shards merged.

    `ema`: True for the EMA weights, False for the others, None for EMA weights if there are some. Pickles are
    read with weights_only. Raises FileNotFoundError for a path that does not exist, and ValueError for a file
    that is not a checkpoint, is truncated, contains code, or does not have these weights.
    """
    return dict(open_checkpoint(path, ema=ema))


def open_checkpoint(path: str | Path, *, ema: bool | None = None) -> Checkpoint:
    """As `load_checkpoint`, but returns a mapping that reads each tensor when it
    is accessed and keeps none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_dir():
        check_file(path)
    checkpoint = _open_folder(path, ema) if path.is_dir() else _open_file(path, ema)
    if checkpoint.info.extra_states:
        logger.info("dropped %d _extra_state entries, which hold no weights", checkpoint.info.extra_states)
    return checkpoint


def _open_folder(path: Path, ema: bool | None) -> Checkpoint:
    if (path / "config.json").exists():
        return _open_diffusers(path, ema)
    if (folder := _iteration_folder(path)) is not None:
        return _open_megatron(folder, ema)
    for name in (*RELEASE_FILES, SHARD_FILE):
        if (path / name).exists():
            return _open_file(path / name, ema)
    if (path / "model_index.json").exists():
        raise ValueError(f"{path} is a whole pipeline: give {path / 'transformer'} or {path / 'vae'}")
    raise ValueError(
        f"{path} has no checkpoint: expected {TRACKER}, mp_rank_XX/{SHARD_FILE}, {RELEASE_FILES[0]}, "
        f"{RELEASE_FILES[-1]} or a diffusers component (config.json and safetensors)"
    )


# --- One file -----------------------------------------------------------------------------------------------


def _open_file(path: Path, ema: bool | None) -> Checkpoint:
    if path.suffix == ".safetensors":
        _refuse_ema(path, ema)
        if (path.parent / "config.json").exists():
            raise ValueError(f"{path} is a part of a diffusers component: give its folder, {path.parent}")
        return _release_names(read_safetensors(path), Info("safetensors", path))
    content = read_pickle(path)
    sizes = _parallel_sizes(content)
    if sizes not in (None, (1, 1)):
        raise ValueError(
            f"{path} is one shard of a checkpoint for (tensor, pipeline) parallel sizes {sizes}: "
            "give the folder that holds all mp_rank_XX"
        )
    weights, info = _find_weights(content, Info("megatron" if sizes else "release", path), path, ema)
    return _release_names(weights, info)


def _refuse_ema(path: Path, ema: bool | None) -> None:
    if ema:
        raise ValueError(f"{path} has one set of weights and no separate EMA weights, but ema is True")


def _find_weights(content: Any, info: Info, path: Path, ema: bool | None) -> tuple[dict[str, Stored], Info]:  # noqa: ANN401
    """The chosen weights of a file's content, without `module.` prefixes and `_extra_state` entries."""
    if not isinstance(content, dict):
        known = {Stored: "tensor", Ignored: "pickled object"}
        what = known.get(type(content), type(content).__name__)
        raise ValueError(f"{path} contains a {what}, not a dict of tensors")
    # Training without EMA leaves an empty dict.
    ema_key = next((key for key in EMA_KEYS if isinstance(content.get(key), dict) and content[key]), None)
    if ema and ema_key is None:
        raise ValueError(f"{path} has no EMA weights ({' or '.join(EMA_KEYS)}), but ema is True")
    info = replace(info, has_ema=ema_key is not None, ema=ema_key is not None and ema is not False)
    found = content[ema_key] if info.ema and ema_key else _plain_weights(content)
    if found is None:
        raise ValueError(f"{path} has EMA weights only ({ema_key}), but ema is False: --ema takes them")

    tensors: dict[str, Stored] = {}
    strange: list[str] = []
    extra_states = 0
    for key, value in found.items():
        name = PREFIX.sub("", str(key))
        if name.endswith("_extra_state"):
            extra_states += 1
        elif not isinstance(key, str) or not isinstance(value, Stored):
            strange.append(repr(key))
        elif name in tensors:
            raise ValueError(f"{path} has {name} twice, with and without the prefix module.")
        else:
            tensors[name] = value
    if strange:
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise ValueError(
            f"{path} is not a checkpoint of weights: these entries are not tensors: "
            f"{', '.join(strange[:5])}{more}"
        )
    if not tensors:
        raise ValueError(f"{path} is not a checkpoint of weights: it has no tensors")
    return tensors, replace(info, extra_states=info.extra_states + extra_states)


def _plain_weights(content: dict[str, Any]) -> dict[str, Any] | None:
    """The weights that are not EMA: `model`, `state_dict.gen_model`, `state_dict`, or the dict itself."""
    if isinstance(content.get("model"), dict):
        return content["model"]
    if isinstance(inner := content.get("state_dict"), dict):
        return inner["gen_model"] if isinstance(inner.get("gen_model"), dict) else inner
    return None if any(key in content for key in EMA_KEYS) else content


def _release_names(stored: Mapping[str, Stored], info: Info) -> Checkpoint:
    if any(keys.is_mindspeed(name) for name in stored):
        info = replace(info, names="mindspeed-mm")
    renamed = {keys.release_name(name): tensor for name, tensor in stored.items()}
    if len(renamed) < len(stored):
        both = [name for name in stored if keys.is_mindspeed(name) and keys.release_name(name) in stored]
        raise ValueError(f"{info.path} has these tensors under the release's names too: {', '.join(both)}")
    return Checkpoint(renamed, info)


# --- Our own format -----------------------------------------------------------------------------------------


def _open_diffusers(folder: Path, ema: bool | None) -> Checkpoint:
    file = folder / "config.json"
    config = read_json_object(file)
    kind = config.get("_class_name")
    model = class_named(kind)
    if model is None:
        other = kind or config.get("architectures") or "something else"
        raise ValueError(f"{file} is of {other}, not of a SparseUMMDiT or {' or '.join(VAES)}")
    model.check_config({k: v for k, v in config.items() if not k.startswith("_")}, where=str(file))
    _refuse_ema(folder, ema)
    stored = read_sharded_safetensors(folder)
    if model is SparseUMMDiT:
        if "num_layers" not in config:
            raise ValueError(f"{file} has no num_layers")
        layers = config["num_layers"]
        stored = {denoiser_name(name, num_layers=layers): tensor for name, tensor in stored.items()}
    return Checkpoint(stored, Info("diffusers", folder, config=config))


def class_named(name: object) -> Any:  # noqa: ANN401 (a class)
    """The denoiser's class, or a VAE's, by the name that its config.json has; None for another name."""
    return SparseUMMDiT if name == SparseUMMDiT.__name__ else VAES.get(str(name))


# --- Megatron shards ----------------------------------------------------------------------------------------


def _iteration_folder(path: Path) -> Path | None:
    """The folder with mp_rank_XX folders of shards: `path` or one in it; None if there is none."""
    if (path / TRACKER).exists():
        iteration = read_text(path / TRACKER).strip()
        if iteration != "release" and not re.fullmatch(r"[0-9]{1,12}", iteration):
            raise ValueError(f"{path / TRACKER} must contain a number or release, not {shown(iteration)}")
        folder = path / (iteration if iteration == "release" else f"iter_{int(iteration):07d}")
        if not folder.is_dir():
            raise ValueError(f"{path / TRACKER} says {iteration!r}, but there is no folder {folder}")
        return folder
    return path if any((folder / SHARD_FILE).exists() for folder in path.glob("mp_rank_*")) else None


def _open_megatron(folder: Path, ema: bool | None) -> Checkpoint:
    ranks = _rank_files(folder)
    sizes = tensor_parallel, pipeline_parallel = _sizes(ranks)
    iteration = ITERATION_FOLDER.fullmatch(folder.name)
    info = Info(
        "megatron",
        folder,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        iteration=str(int(iteration[1])) if iteration else "release" if folder.name == "release" else None,
    )
    shards: dict[tuple[int, int], Checkpoint] = {}
    for rank, path in ranks.items():
        content = read_pickle(path)
        if (saved := _parallel_sizes(content)) not in (None, sizes):
            raise ValueError(
                f"{folder} has shards for (tensor, pipeline) parallel sizes {sizes}, but {path} was saved "
                f"with {saved}: are some missing, or left from another run?"
            )
        weights, info = _find_weights(content, info, path, ema)
        shards[rank] = _release_names(weights, info)
        info = shards[rank].info
    if len({shard.info.ema for shard in shards.values()}) > 1:
        raise ValueError(f"{folder}: only some of the shards have EMA weights: ema must be False")

    merged: dict[str, Stored] = {}
    for pp in range(pipeline_parallel):
        first = {part: _count(merged, part) for part in (NESTED, "skip_norm_linear", "skip_norm_linear_enc")}
        stage = _merge_tensor_parallel([shards[tp, pp] for tp in range(tensor_parallel)], folder)
        merged |= {_renumber(name, first): tensor for name, tensor in stage.items()}
    return Checkpoint(merged, info)


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The shard of each (tensor, pipeline) rank. Raises ValueError if there are none, or not all of them."""
    ranks: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        if match := RANK_FOLDER.fullmatch(path.name):
            rank = int(match[1]), int(match[2] or 0)
            if rank in ranks:
                raise ValueError(f"{ranks[rank].parent} and {path} are the same rank: remove one of them")
            ranks[rank] = path / SHARD_FILE
    if not ranks:
        raise ValueError(f"{folder} has no mp_rank_XX folders")
    tensor, pipeline = _sizes(ranks)
    if absent := tensor * pipeline - len(ranks):
        wanted = itertools.product(range(tensor), range(pipeline))
        missing = [*itertools.islice((rank for rank in wanted if rank not in ranks), 5)]
        more = f" and {absent - len(missing):,} more" if absent > len(missing) else ""
        raise ValueError(f"{folder} lacks the shards of these (tensor, pipeline) ranks: {missing}{more}")
    if absent := [str(path) for path in ranks.values() if not path.is_file()]:
        raise ValueError(f"these shards are missing: {', '.join(absent)}")
    return ranks


def _sizes(ranks: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """(tensor, pipeline) parallel sizes, from the highest ranks."""
    tensor, pipeline = zip(*ranks, strict=True)
    return max(tensor) + 1, max(pipeline) + 1


def _parallel_sizes(content: Any) -> tuple[int, int] | None:  # noqa: ANN401 (whatever was pickled)
    """(tensor, pipeline) parallel sizes of the run that saved a shard; None if they are not in it."""
    arguments = content.get("args") if isinstance(content, dict) else None
    if not isinstance(arguments, argparse.Namespace):
        return None
    tensor = getattr(arguments, "tensor_model_parallel_size", None)
    pipeline = getattr(arguments, "pipeline_model_parallel_size", 1)
    return (tensor, pipeline) if isinstance(tensor, int) and isinstance(pipeline, int) else None


def _count(names: Iterable[str], part: str) -> int:
    """Number of stages, or skip Linears, in `names`."""
    found = (NUMBERED.fullmatch(name) for name in names)
    return 1 + max((int(match[2]) for match in found if match and match[1] == part), default=-1)


def _renumber(name: str, first: Mapping[str, int]) -> str:
    """Renumber the stages and skip Linears of a pipeline rank, which numbers its own from 0."""
    if match := NUMBERED.fullmatch(name):
        part, number, rest = match.groups()
        return f"{part}.{int(number) + first[part]}.{rest}"
    return name


def _merge_tensor_parallel(shards: list[Checkpoint], folder: Path) -> dict[str, Stored]:
    first = shards[0].stored
    if len(shards) == 1:
        return first
    for rank, shard in enumerate(shards):
        if odd := sorted(set(shard) ^ set(first)):
            raise ValueError(f"{folder}: tensor-parallel rank {rank} and rank 0 differ in {', '.join(odd)}")
    merged: dict[str, Stored] = {}
    unlike: list[str] = []
    for name, tensor in first.items():
        pieces = [shard.stored[name] for shard in shards]
        if any((piece.shape, piece.dtype) != (tensor.shape, tensor.dtype) for piece in pieces):
            kinds = ", ".join(f"{list(piece.shape)} {piece.dtype}" for piece in pieces)
            raise ValueError(f"{folder}: the tensor-parallel ranks have different {name}: {kinds}")
        dim = split_dimension(name)
        if dim is None or dim >= len(tensor.shape):
            merged[name] = _take_first(name, pieces, unlike)
        else:
            merged[name] = _join(pieces, dim)
    return merged


def _take_first(name: str, pieces: list[Stored], unlike: list[str]) -> Stored:
    """A tensor that every rank has whole. `unlike` collects those that turn out to
    differ; the first is told.
    """

    def read() -> Tensor:
        value = pieces[0].read()
        if any(not torch.equal(piece.read(), value) for piece in pieces[1:]):
            if not unlike:
                logger.warning(
                    "%s differs between tensor-parallel ranks, which should all have the same: using that of "
                    "rank 0, and so for every such tensor",
                    name,
                )
            unlike.append(name)
        return value

    return replace(pieces[0], read=read)


def _join(pieces: list[Stored], dim: int) -> Stored:
    """Join the parts of a tensor that is split along `dim`."""
    shape = list(pieces[0].shape)
    part = shape[dim]
    shape[dim] = part * len(pieces)

    def read() -> Tensor:
        value = empty(tuple(shape), pieces[0].dtype)
        for rank, piece in enumerate(pieces):
            value.narrow(dim, rank * part, part).copy_(piece.read())
        return value

    return Stored(tuple(shape), pieces[0].dtype, read)
