"""Writing checkpoints: diffusers component folders, Megatron shards, the release's pickles. Reading
is in checkpoints.py.

Nothing that exists is overwritten: a folder is written under another name beside it and renamed when
it is whole.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from opensoraplan.claims import hold_claim
from opensoraplan.disk import apply_umask, make_folder, name_path_in_errors, work_folder
from opensoraplan.formats.checkpoints import SHARD_FILE, TRACKER
from opensoraplan.models import original
from opensoraplan.models.sizes import split_dimension
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.vae import VideoVAE

WEIGHTS = "diffusion_pytorch_model"
RELEASE_DENOISER = "model_ema.pt"
RELEASE_VAE = "wfvae_888_dim32.ckpt"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill. It is moved to `path` if the block succeeds; otherwise it is removed, with every
    parent that did not exist.

    Raises ValueError if `path` exists and is not empty, if another process is writing there, or if it cannot
    be written to.
    """
    path = path.resolve()
    with _new_path(path, _check_free_folder) as partial:
        partial.mkdir()
        yield partial
        if path.exists():
            path.rmdir()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path for a file that is moved to `path`, as in `new_folder`."""
    with _new_path(path.resolve(), _check_free_file) as partial:
        yield partial


@contextmanager
def _new_path(path: Path, check_free: Callable[[Path], None]) -> Iterator[Path]:
    check_free(path)
    with ExitStack() as stack:
        try:
            stack.enter_context(make_folder(path.parent))
            stack.enter_context(hold_claim(path, doing=f"writing {path}"))
            check_free(path)
            partial = stack.enter_context(work_folder(path.parent)) / path.name
        except OSError as error:
            raise ValueError(f"cannot write to {path.parent}: {error.strerror}") from error
        with name_path_in_errors(path):
            yield partial
            apply_umask(partial)
            partial.rename(path)


def _check_free_folder(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty: use another folder")


def _check_free_file(path: Path) -> None:
    if path.exists():
        raise ValueError(f"{path} exists: use another name")


def check_shard_size(size: str) -> None:
    """Raise ValueError unless this is a size as huggingface_hub reads it, of 1 MB to 1 TB."""
    match = re.fullmatch(r"([0-9]{1,7}(?:\.[0-9]{1,6})?) ?(MB|GB|TB)", size.upper())
    scale = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
    if match is None or not 10**6 <= float(match[1]) * scale[match[2]] <= 10**12:
        raise ValueError(f"the size of a shard must be from 1MB to 1TB, such as 500MB or 2GB, got {size!r}")


@dataclass(frozen=True)
class WeightFiles:
    """How weights are written: in `dtype`, None is each tensor's own, and in files of that size at most.
    Raises ValueError as `check_shard_size`.
    """

    dtype: torch.dtype | None = None
    max_shard_size: str = "2GB"

    def __post_init__(self) -> None:
        check_shard_size(self.max_shard_size)


def write_component(
    model: SparseUMMDiT | VideoVAE,
    names: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    folder: Path,
    files: WeightFiles = WeightFiles(),
) -> None:
    """Write a model as a diffusers component: config.json and sharded safetensors.

    `model` only gives config and names, and may be on the meta device; `names` is what `original.match` made
    of it and `tensors`, which are read one at a time, so that no more than a shard is in memory.
    """
    dtypes = {ours: files.dtype or _dtype(tensors, theirs) for ours, theirs in names.items()}
    meta = {
        ours: torch.empty(value.shape, dtype=dtypes[ours], device="meta")
        for ours, value in model.state_dict().items()
    }
    pattern = WEIGHTS + "{suffix}.safetensors"
    plan = split_torch_state_dict_into_shards(
        meta, filename_pattern=pattern, max_shard_size=files.max_shard_size
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(names), desc=f"writing {folder.name}", unit="tensor") as progress:
        for file, members in plan.filename_to_tensors.items():
            shard = {}
            for ours in members:
                shard[ours] = tensors[names[ours]].to(dtypes[ours]).contiguous()
                progress.update()
            with name_path_in_errors(folder / file):
                save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / f"{WEIGHTS}.safetensors.index.json").write_text(
            json.dumps(index, indent=2), encoding="utf-8"
        )
    model.save_config(folder)


def write_megatron(
    model: SparseUMMDiT, tensors: Mapping[str, Tensor], folder: Path, *, tensor_parallel: int
) -> None:
    """Write a denoiser as Megatron shards, one for each of `tensor_parallel` ranks, under `folder`/release.

    `model` may be on the meta device, `tensors` have the original's names. With more than one rank, the last
    block gets unused tensors (zeros) that Megatron expects. Raises ValueError if the heads cannot be split
    evenly, and for tensors that do not fit.
    """
    heads = model.config["num_attention_heads"]
    if tensor_parallel < 1 or heads % tensor_parallel:
        valid = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"tensor parallel size must divide the {heads} heads ({valid}), got {tensor_parallel}"
        )
    names = list(original.match(model, tensors).values())
    unread = model.original_format().unread if tensor_parallel > 1 else {}
    fill = _dtype(tensors, names[0])
    for rank in tqdm(range(tensor_parallel), desc="writing Megatron shards", unit="shard"):
        shard = {name: _part(name, tensors[name], rank, tensor_parallel) for name in names}
        shard |= {
            name: _part(name, torch.zeros(shape, dtype=fill), rank, tensor_parallel)
            for name, shape in unread.items()
        }
        path = folder / "release" / f"mp_rank_{rank:02d}" / SHARD_FILE
        path.parent.mkdir(parents=True)
        arguments = argparse.Namespace(
            tensor_model_parallel_size=tensor_parallel, pipeline_model_parallel_size=1
        )
        content = {"model": shard, "args": arguments, "checkpoint_version": 3.0, "iteration": 0}
        _save_pickle(content, path)
    (folder / TRACKER).write_text("release", encoding="utf-8")


def write_release(model: SparseUMMDiT | VideoVAE, tensors: Mapping[str, Tensor], folder: Path) -> Path:
    """Write a model as the release does: one pickle of a flat dict, the VAE's with its fixed Haar filters.

    Returns the file's path. Raises ValueError for tensors that do not fit, and for a VAE that the original
    does not have.
    """
    if not isinstance(model, original.OriginalModel):
        raise ValueError(
            f"the original has no {type(model).__name__}: its VAE cannot be written as the release's"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (RELEASE_DENOISER if isinstance(model, SparseUMMDiT) else RELEASE_VAE)
    write_release_file(model, tensors, path)
    return path


def write_release_file(model: SparseUMMDiT | VideoVAE, tensors: Mapping[str, Tensor], path: Path) -> None:
    """As `write_release`, but to this path."""
    flat = {name: tensors[name] for name in original.match(model, tensors).values()}
    dtype = next(iter(flat.values())).dtype
    flat |= {name: value.to(dtype) for name, value in original.format_of(model).fixed.items()}
    _save_pickle(flat if isinstance(model, SparseUMMDiT) else {"state_dict": {"gen_model": flat}}, path)


def _save_pickle(content: object, path: Path) -> None:
    """`torch.save` that raises OSError for a full disk. Given a path, torch does not say why it fails."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _part(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    dim = split_dimension(name)
    return tensor if dim is None else tensor.chunk(ranks, dim)[rank].clone()


def _dtype(tensors: Mapping[str, Tensor], name: str) -> torch.dtype:
    stored = getattr(tensors, "stored", None)
    return stored[name].dtype if stored is not None else tensors[name].dtype
