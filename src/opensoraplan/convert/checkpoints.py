"""Reading every dialect in which Open-Sora Plan v1.5.0 weights exist, as one mapping with the release's
names.

Dialects: release pickles, Megatron shards (tensor and pipeline parallel), MindSpeed-MM's names in either, VAE
pickles, and diffusers folders. Tensors are read one at a time, when they are taken; writing is in export.py.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from opensoraplan.convert import keys
from opensoraplan.convert.stored import (
    Stored,
    StoredTensors,
    read_pickle,
    read_safetensors,
    read_sharded_safetensors,
)
from opensoraplan.models.original import NESTED, denoiser_name

logger = logging.getLogger(__name__)

RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
SHARD_FILE = "model_optim_rng.pt"
TRACKER = "latest_checkpointed_iteration.txt"
# Where a folder of the release may hold its one file.
RELEASE_FILES = (
    "model_ema.pt",
    "model_states.pt",
    "mp_rank_00/model_states.pt",
    "transformers/mp_rank_00/model_states.pt",
)
EMA_KEYS = ("ema_state_dict", "ema_model")

Dialect = Literal["release", "megatron", "diffusers", "safetensors"]


class Checkpoint(StoredTensors):
    """The tensors of a checkpoint by the release's names, read when taken, and what was learned of it on the
    way.
    """

    def __init__(self, stored: Mapping[str, Stored], info: "Info") -> None:
        super().__init__(stored)
        self.info = info


@dataclass(frozen=True)
class Info:
    """What a checkpoint is. `names`: whose attention names it has. `ema`: whether these are the EMA weights;
    `has_ema`: whether the file has them. `extra_states`: entries without weights that were left out.
    `config`: our own config, where the checkpoint has one.
    """

    dialect: Dialect
    names: Literal["release", "mindspeed-mm"] = "release"
    ema: bool = False
    has_ema: bool = False
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    iteration: str | None = None
    extra_states: int = 0
    config: dict[str, Any] | None = None


def load_checkpoint(path: str | Path, *, ema: bool | None = None) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whatever its dialect, by the release's names, merged and in memory.

    `ema`: True for the EMA weights, False for the others, None for EMA weights where there are some. Pickles
    are read with weights_only. Raises FileNotFoundError for a path that does not exist, ValueError for one
    that is no checkpoint, is truncated, holds code, or has no such weights.
    """
    return dict(open_checkpoint(path, ema=ema))


def open_checkpoint(path: str | Path, *, ema: bool | None = None) -> Checkpoint:
    """As `load_checkpoint`, but a mapping that reads each tensor when it is taken and keeps none."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        return _open_file(path, ema)
    if (path / "config.json").exists():
        return _open_diffusers(path)
    if (folder := _iteration_folder(path)) is not None:
        return _open_megatron(folder, ema)
    for name in RELEASE_FILES:
        if (path / name).exists():
            return _open_file(path / name, ema)
    raise ValueError(
        f"{path} holds no checkpoint: expected {TRACKER}, mp_rank_XX/{SHARD_FILE}, {RELEASE_FILES[0]}, "
        f"{RELEASE_FILES[-1]} or a diffusers component (config.json and safetensors)"
    )


# --- One file -----------------------------------------------------------------------------------------------


def _open_file(path: Path, ema: bool | None) -> Checkpoint:
    if path.suffix == ".safetensors":
        stored = read_safetensors(path)
        return _release_names(stored, Info("safetensors"))
    weights, info = _find_weights(read_pickle(path), Info("release"), path, ema)
    return _release_names(weights, info)


def _find_weights(content: Any, info: Info, path: Path, ema: bool | None) -> tuple[dict[str, Stored], Info]:  # noqa: ANN401
    """The chosen weights in what a file holds, without `module.` prefixes and `_extra_state` entries."""
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    ema_key = next((key for key in EMA_KEYS if isinstance(content.get(key), dict)), None)
    if ema and ema_key is None:
        raise ValueError(f"{path} has no EMA weights ({' or '.join(EMA_KEYS)}): leave --ema out")
    info = replace(info, has_ema=ema_key is not None, ema=ema_key is not None and ema is not False)
    found = content[ema_key] if info.ema and ema_key else _plain_weights(content)
    if found is None:
        raise ValueError(f"{path} has EMA weights only: leave --no-ema out")

    tensors = {
        name.removeprefix("module."): value for name, value in found.items() if isinstance(value, Stored)
    }
    others = [name for name, value in found.items() if not isinstance(value, Stored)]
    extra = [name for name in [*others, *tensors] if name.endswith("_extra_state")]
    strange = [name for name in others if name not in extra]
    if strange or not tensors:
        what = f"entries that are no tensors: {', '.join(map(str, strange[:5]))}" if strange else "no tensors"
        raise ValueError(f"{path} is not a checkpoint of weights: it has {what}")
    if extra:
        logger.info("dropped %d _extra_state entries, which hold no weights", len(extra))
    tensors = {name: value for name, value in tensors.items() if name not in extra}
    return tensors, replace(info, extra_states=len(extra))


def _plain_weights(content: dict[str, Any]) -> dict[str, Any] | None:
    """The weights that are no EMA: `model`, `state_dict.gen_model`, `state_dict`, or the dict itself."""
    if isinstance(content.get("model"), dict):
        return content["model"]
    if isinstance(inner := content.get("state_dict"), dict):
        return inner["gen_model"] if isinstance(inner.get("gen_model"), dict) else inner
    return None if any(key in content for key in EMA_KEYS) else content


def _release_names(stored: Mapping[str, Stored], info: Info) -> Checkpoint:
    if any(keys.is_mindspeed(name) for name in stored):
        info = replace(info, names="mindspeed-mm")
    return Checkpoint({keys.release_name(name): tensor for name, tensor in stored.items()}, info)


# --- Our own format -----------------------------------------------------------------------------------------


def _open_diffusers(folder: Path) -> Checkpoint:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("_class_name")
    if kind not in ("SparseUMMDiT", "WFVAE"):
        raise ValueError(f"{folder}/config.json is of a {kind!r}, not of a SparseUMMDiT or WFVAE")
    stored = read_sharded_safetensors(folder)
    if kind == "SparseUMMDiT":
        stored = {
            denoiser_name(name, num_layers=config["num_layers"]): tensor for name, tensor in stored.items()
        }
    return Checkpoint(stored, Info("diffusers", config=config))


# --- Megatron shards ----------------------------------------------------------------------------------------


def _iteration_folder(path: Path) -> Path | None:
    """The folder that holds mp_rank_XX folders with shards, under `path` or itself; None if there is none."""
    if (path / TRACKER).exists():
        iteration = (path / TRACKER).read_text(encoding="utf-8").strip()
        name = (
            iteration
            if iteration == "release"
            else f"iter_{int(iteration):07d}"
            if iteration.isdigit()
            else ""
        )
        if not (name and (path / name).is_dir()):
            raise ValueError(f"{path / TRACKER} says {iteration!r}, but there is no folder {path / name}")
        return path / name
    return path if any((folder / SHARD_FILE).exists() for folder in path.glob("mp_rank_*")) else None


def _open_megatron(folder: Path, ema: bool | None) -> Checkpoint:
    ranks = {}
    for path in sorted(folder.glob("mp_rank_*")):
        if match := RANK_FOLDER.fullmatch(path.name):
            ranks[int(match[1]), int(match[2] or 0)] = path / SHARD_FILE
    tensor_parallel, pipeline_parallel = (max(axis) + 1 for axis in zip(*ranks, strict=True))
    wanted = {(tp, pp) for tp in range(tensor_parallel) for pp in range(pipeline_parallel)}
    if missing := sorted(wanted - set(ranks)):
        raise ValueError(f"{folder} lacks the shards of these (tensor, pipeline) ranks: {missing}")
    absent = [str(path) for path in ranks.values() if not path.exists()]
    if absent:
        raise ValueError(f"these shards are not there: {', '.join(absent)}")

    info = Info(
        "megatron",
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        iteration=folder.name.removeprefix("iter_").lstrip("0") or folder.name,
    )
    merged: dict[str, Stored] = {}
    stages = skips = 0
    for pp in range(pipeline_parallel):
        shards = []
        for tp in range(tensor_parallel):
            path = ranks[tp, pp]
            weights, info = _find_weights(read_pickle(path), info, path, ema)
            shards.append(_release_names(weights, info))
            info = shards[-1].info
        for name, tensor in _merge_tensor_parallel(shards, folder).items():
            merged[_renumber(name, stages, skips)] = tensor
        stages = 1 + max(
            (int(name.split(".")[1]) for name in merged if name.startswith(f"{NESTED}.")), default=-1
        )
        skips = 1 + max(
            (int(name.split(".")[1]) for name in merged if name.startswith("skip_norm_linear.")), default=-1
        )
    return Checkpoint(merged, info)


def _renumber(name: str, stages: int, skips: int) -> str:
    """A pipeline rank counts its stages and skip Linears from 0; here from the first rank's."""
    part, _, rest = name.partition(".")
    first = {NESTED: stages, "skip_norm_linear": skips, "skip_norm_linear_enc": skips}.get(part)
    if first is None:
        return name
    number, _, rest = rest.partition(".")
    return f"{part}.{int(number) + first}.{rest}"


def _merge_tensor_parallel(shards: list[Checkpoint], folder: Path) -> dict[str, Stored]:
    if len(shards) == 1:
        return shards[0].stored
    first = shards[0]
    for rank, shard in enumerate(shards):
        if odd := sorted(set(shard) ^ set(first)):
            raise ValueError(f"{folder}: tensor-parallel rank {rank} and rank 0 differ in {', '.join(odd)}")
    merged, differing = {}, []
    for name, tensor in first.stored.items():
        pieces = [shard.stored[name] for shard in shards]
        dim = keys.split_dimension(name)
        if dim is None:
            merged[name] = tensor
            whole = tensor.read()
            if any(not torch.equal(piece.read(), whole) for piece in pieces[1:]):
                differing.append(name)
        else:
            merged[name] = _joined(pieces, dim)
    if differing:
        logger.warning(
            "%d tensors that every rank should have alike differ, rank 0's are taken: %s",
            len(differing),
            ", ".join(differing),
        )
    return merged


def _joined(pieces: list[Stored], dim: int) -> Stored:
    shape = list(pieces[0].shape)
    shape[dim] = sum(piece.shape[dim] for piece in pieces)

    def read() -> Tensor:
        whole = torch.empty(shape, dtype=pieces[0].dtype)
        start = 0
        for piece in pieces:
            whole.narrow(dim, start, piece.shape[dim]).copy_(piece.read())
            start += piece.shape[dim]
        return whole

    return Stored(tuple(shape), pieces[0].dtype, read)
