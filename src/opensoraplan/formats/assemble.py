"""Loads whole pipelines from the files of their parts, and converts them to diffusers folders and back."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Self, TypeVar, cast

import psutil
import torch
from torch import Tensor, nn

from opensoraplan.device import free_memory
from opensoraplan.documents import read_json_object
from opensoraplan.formats.checkpoints import Checkpoint, open_checkpoint
from opensoraplan.formats.export import (
    WeightFiles,
    new_file,
    new_folder,
    write_component,
    write_megatron,
    write_release,
    write_release_file,
)
from opensoraplan.formats.infer import RELEASE_LAYERS, class_of, config_of, empty_model, name_path
from opensoraplan.models import original
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.strict import plain_config
from opensoraplan.models.text import TEXT_PARTS, empty_text_model, load_text_encoder
from opensoraplan.models.vae import VideoVAE
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.pipeline_inputs import check_parts
from opensoraplan.samplers import make_scheduler

logger = logging.getLogger(__name__)

Model = TypeVar("Model", SparseUMMDiT, VideoVAE)

# The parts of a pipeline that are files.
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class Sources:
    """Paths of a pipeline's parts. `transformer`, `vae`: checkpoints of any dialect; the rest: local folders.

    The configs are our constructors' arguments; None: inferred from the tensors' shapes. `sparse_n`: Skiparse
    rates instead of the config's. `ema`: which weights of the denoiser, as in `load_checkpoint`; the VAE uses
    its EMA weights if it has some.
    """

    transformer: Path
    vae: Path
    text_encoder: Path
    text_encoder_2: Path
    tokenizer: Path
    tokenizer_2: Path
    transformer_config: dict[str, Any] | None = None
    vae_config: dict[str, Any] | None = None
    sparse_n: Sequence[int] | None = None
    ema: bool | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """The parts of a diffusers folder."""
        paths: dict[str, Any] = {name: folder / name for name in COMPONENTS}
        return cls(**paths)

    def paths(self) -> dict[str, Path]:
        """The path of each part, by name."""
        return {name: getattr(self, name) for name in COMPONENTS}

    def check_exist(self) -> None:
        """Raise FileNotFoundError with all parts whose paths do not exist."""
        missing = [f"{name}: {path}" for name, path in self.paths().items() if not path.exists()]
        if missing:
            raise FileNotFoundError(f"these paths do not exist: {'; '.join(missing)}")


def empty_denoiser(
    checkpoint: Checkpoint, config: Mapping[str, Any] | None, *, rates: Sequence[int] | None = None
) -> SparseUMMDiT:
    """A denoiser on the meta device that fits the checkpoint, with Skiparse `rates` (None: the config's).

    `config`: our constructor's arguments; None: inferred from the checkpoint. Raises ValueError for a VAE's
    checkpoint, or if the Skiparse rates are not known.
    """
    with name_path(checkpoint.path):
        if class_of(checkpoint) is not SparseUMMDiT:
            raise ValueError("these are the weights of a VAE, not of a denoiser: were the two paths swapped?")
        arguments = dict(config_of(checkpoint) if config is None else config)
        if rates is not None:
            arguments["sparse_n"] = list(rates)
        stages = list(arguments.get("num_layers", RELEASE_LAYERS))
        if "sparse_n" not in arguments and stages != RELEASE_LAYERS:
            raise ValueError(
                f"the checkpoint does not have the Skiparse rates of the stages {stages}: "
                f"give --config, or --sparse-n with {len(stages)} rates (all 1: dense)"
            )
        return cast(SparseUMMDiT, empty_model(checkpoint, arguments))


def empty_vae(checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> VideoVAE:
    """A VAE on the meta device that fits the checkpoint; `config` and errors as in `empty_denoiser`, but that
    it goes before what the checkpoint's own says, and need not be whole: in that are shift and scale.
    """
    with name_path(checkpoint.path):
        if class_of(checkpoint) is SparseUMMDiT:
            raise ValueError("these are the weights of a denoiser, not of a VAE: were the two paths swapped?")
        if config is not None and checkpoint.info.config is not None:
            config = {**config_of(checkpoint), **config}
        return cast(VideoVAE, empty_model(checkpoint, config))


def denoiser_config(path: Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Constructor arguments of the denoiser in a config.json, in a model's or a pipeline's folder, or in any
    checkpoint; `config` as in `empty_denoiser`.
    """
    for file in (path, path / "transformer" / "config.json", path / "config.json"):
        if file.is_file() and file.suffix == ".json":
            return {key: value for key, value in read_json_object(file).items() if not key.startswith("_")}
    return plain_config(empty_denoiser(open_checkpoint(path), config))


@dataclass(frozen=True)
class Opened(Generic[Model]):
    """A model on the meta device with the tensors that fit it. `names`: ours to theirs."""

    model: Model
    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield our names with the tensors, each of which is read when it is its turn."""
        return ((ours, self.tensors[theirs]) for ours, theirs in self.names.items())


def open_denoiser(
    path: Path, config: Mapping[str, Any] | None = None, *, rates: Sequence[int] | None = None
) -> Opened[SparseUMMDiT]:
    """Open a denoiser of any dialect, or that of a diffusers folder. Weights are not read yet."""
    checkpoint = open_checkpoint(component_of(path, "transformer"))
    denoiser = empty_denoiser(checkpoint, config, rates=rates)
    return Opened(denoiser, checkpoint, original.match(denoiser, checkpoint))


def open_vae(path: Path, config: Mapping[str, Any] | None = None) -> Opened[VideoVAE]:
    """Open a VAE of any dialect, or that of a diffusers folder. Weights are not read yet."""
    checkpoint = open_checkpoint(component_of(path, "vae"))
    vae = empty_vae(checkpoint, config)
    return Opened(vae, checkpoint, original.match(vae, checkpoint))


@dataclass(frozen=True)
class OpenedPipeline:
    """Denoiser and VAE, known to be whole and to fit each other, and where the rest is. No weights
    are read yet.
    """

    sources: Sources
    denoiser: Opened[SparseUMMDiT]
    vae: Opened[VideoVAE]

    def without_weights(
        self, dtype: torch.dtype, *, vae_dtype: torch.dtype | None = None
    ) -> OpenSoraPlanPipeline:
        """What `load_pipeline` would load, on the meta device: its config and sizes, and no tokenizers."""
        transformer, vae = copy.deepcopy(self.denoiser.model), copy.deepcopy(self.vae.model)
        text = self._empty_text_models()
        for model in (transformer, vae, *text.values()):
            for parameter in model.parameters():
                parameter.data = parameter.data.to(vae_dtype or dtype if model is vae else dtype)
        absent: dict[str, Any] = dict.fromkeys(part.tokenizer for part in TEXT_PARTS)
        return OpenSoraPlanPipeline(transformer, vae, **text, **absent, scheduler=make_scheduler())

    def weight_bytes(self, dtype: torch.dtype, *, vae_dtype: torch.dtype | None = None) -> int:
        """Bytes of the weights that `load_parts` would load."""
        in_dtype = sum(map(_count, (self.denoiser.model, *self._empty_text_models().values())))
        return in_dtype * dtype.itemsize + _count(self.vae.model) * (vae_dtype or dtype).itemsize

    def _empty_text_models(self) -> dict[str, Any]:
        """The text encoders on the meta device, by their names."""
        paths = self.sources.paths()
        return {part.encoder: empty_text_model(paths[part.encoder], part) for part in TEXT_PARTS}


def _count(model: nn.Module | VideoVAE) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def open_pipeline(sources: Sources) -> OpenedPipeline:
    """A pipeline of these parts. Raises FileNotFoundError for those that do not exist, and ValueError for
    denoiser and VAE that are not whole or do not fit each other.
    """
    sources.check_exist()
    transformer_file = open_checkpoint(sources.transformer, ema=sources.ema)
    vae_file = open_checkpoint(sources.vae)
    transformer = empty_denoiser(transformer_file, sources.transformer_config, rates=sources.sparse_n)
    vae = empty_vae(vae_file, sources.vae_config)
    check_parts(transformer, vae, None, None)
    if sources.vae_config is None and vae_file.info.config is None and vae.config["shift"] is None:
        logger.warning(
            "%s: the file has no shift and scale of the latents: none are used",
            vae_file.path,
        )
    return OpenedPipeline(
        sources,
        Opened(transformer, transformer_file, original.match(transformer, transformer_file)),
        Opened(vae, vae_file, original.match(vae, vae_file)),
    )


def load_parts(
    opened: OpenedPipeline,
    *,
    dtype: torch.dtype,
    device: torch.device,
    vae_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """COMPONENTS by their names, each tensor moved to `device` as it is read; the host needs room for one
    text encoder at most. The VAE has `vae_dtype` (None: `dtype`). The models of `opened` get their weights.

    Raises what the loading of each text encoder raises, and MemoryError for a CPU without room for the
    weights, before any is read.
    """
    if device.type == "cpu":
        _check_room(opened.weight_bytes(dtype, vae_dtype=vae_dtype))
    transformer, vae = opened.denoiser.model, opened.vae.model
    text = load_text_parts(opened.sources, dtype=dtype, device=device)
    check_parts(transformer, vae, *(text[part.encoder] for part in TEXT_PARTS))
    original.fill(vae, opened.vae.names, _OnDevice(device, opened.vae.tensors), dtype=vae_dtype or dtype)
    original.fill(transformer, opened.denoiser.names, _OnDevice(device, opened.denoiser.tensors), dtype=dtype)
    return {
        "transformer": transformer.eval().to(device),  # type: ignore[arg-type]
        "vae": vae.eval().to(device),
        **text,
    }


def load_text_parts(sources: Sources, *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Text encoders and tokenizers by their names. Raises as `load_text_encoder`."""
    paths, loaded = sources.paths(), {}
    for part in TEXT_PARTS:
        encoder = load_text_encoder(
            paths[part.encoder], paths[part.tokenizer], part, dtype=dtype, device=device
        )
        loaded |= {part.encoder: encoder.model, part.tokenizer: encoder.tokenizer}
    return loaded


def load_pipeline(
    opened: OpenedPipeline,
    *,
    dtype: torch.dtype,
    device: torch.device,
    vae_dtype: torch.dtype | None = None,
    scheduler: Mapping[str, Any] = MappingProxyType({}),
    max_text_tokens: int = 512,
) -> OpenSoraPlanPipeline:
    """A pipeline of `load_parts`, which says the rest, with the default scheduler."""
    parts = load_parts(opened, dtype=dtype, device=device, vae_dtype=vae_dtype)
    return OpenSoraPlanPipeline(
        **parts, scheduler=make_scheduler(**scheduler), max_text_tokens=max_text_tokens
    )


class _OnDevice(Mapping[str, Tensor]):
    """A mapping of tensors that moves each one to a device when it is read."""

    def __init__(self, device: torch.device, tensors: Mapping[str, Tensor]) -> None:
        self._device = device
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _check_room(needed: int) -> None:
    """Raise MemoryError if weights of `needed` bytes do not fit into host memory."""
    free = free_memory(torch.device("cpu")) + psutil.swap_memory().free
    if needed > free:
        raise MemoryError(
            f"the weights take {needed / 1e9:.3g} GB of host memory, and {free / 1e9:.3g} GB are free, "
            "swap included"
        )


def save_diffusers(
    sources: Sources,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    scheduler: Mapping[str, Any] = MappingProxyType({}),
    max_text_tokens: int = 512,
) -> None:
    """Write a pipeline from the original's files as a diffusers folder, with no more than a shard of the
    denoiser in memory. `dtype`: None keeps that of each tensor, and fp32 for the text encoders.

    Raises what `open_pipeline` and the loading of text encoders raise, and ValueError if `out` exists.
    Nothing is left behind of a failed attempt.
    """
    with new_folder(out) as folder:
        write_pipeline(
            folder,
            open_pipeline(sources),
            files=WeightFiles(dtype),
            scheduler=scheduler,
            prompts={"max_text_tokens": max_text_tokens},
        )
    logger.info("wrote %s", out)


def write_pipeline(
    folder: Path,
    opened: OpenedPipeline,
    *,
    files: WeightFiles,
    scheduler: Mapping[str, Any] = MappingProxyType({}),
    prompts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Fill `folder` with a pipeline. `prompts`: its prompt settings, where they are not the original's."""
    sources, denoiser, vae = opened.sources, opened.denoiser, opened.vae
    text_dtype, cpu = files.dtype or torch.float32, torch.device("cpu")
    pipeline = OpenSoraPlanPipeline(
        transformer=denoiser.model,
        vae=vae.model,
        **load_text_parts(sources, dtype=text_dtype, device=cpu),
        scheduler=make_scheduler(**scheduler),
        **prompts,
    )
    for name in (*(name for part in TEXT_PARTS for name in part[:2]), "scheduler"):
        pipeline.components[name].save_pretrained(folder / name)
    for name, part in (("transformer", denoiser), ("vae", vae)):
        write_component(part.model, part.names, part.tensors, folder / name, files)
    pipeline.save_config(folder)


def load_vae(path: Path, *, dtype: torch.dtype, device: torch.device) -> VideoVAE:
    """A VAE from a checkpoint of any dialect, or from a diffusers folder that has one."""
    checkpoint = open_checkpoint(component_of(path, "vae"))
    vae = empty_vae(checkpoint, None)
    original.load(vae, checkpoint, dtype=dtype)
    return vae.eval().to(device)


def export_denoiser(model: Path, out: Path, *, tensor_parallel: int, ema: bool | None = None) -> None:
    """Write the denoiser of a diffusers folder (or of any checkpoint of one, `ema` as in `load_checkpoint`)
    as Megatron shards.

    Raises ValueError if `out` exists, or if `tensor_parallel` does not divide the heads.
    """
    with new_folder(out) as folder:
        checkpoint = open_checkpoint(component_of(model, "transformer"), ema=ema)
        write_megatron(_empty_of(checkpoint), checkpoint, folder, tensor_parallel=tensor_parallel)
    logger.info("wrote %s", out)


def merge_denoiser(path: Path, out: Path, *, ema: bool) -> None:
    """Write the denoiser of Megatron shards (or of any checkpoint) as one pickle of a flat dict, as the
    original's convert_mm_to_ckpt.py does. `out`: the file, or a folder, in which it is model.pt or, of
    EMA weights, model_ema.pt.

    Raises ValueError if there is that file, and for shards without such weights.
    """
    file = out if out.suffix else out / ("model_ema.pt" if ema else "model.pt")
    with new_file(file) as partial:
        checkpoint = open_checkpoint(path, ema=ema)
        write_release_file(_empty_of(checkpoint), checkpoint, partial)
    weights = "EMA weights" if ema else "weights, not their EMA" if checkpoint.info.has_ema else "weights"
    logger.info("wrote %s: the %s of %s", file, weights, checkpoint.path)


def _empty_of(checkpoint: Checkpoint) -> SparseUMMDiT:
    denoiser = empty_model(checkpoint)
    if not isinstance(denoiser, SparseUMMDiT):
        raise ValueError(f"{checkpoint.path} has the weights of a VAE: give those of a denoiser")
    return denoiser


def export_release(model: Path, out: Path) -> None:
    """Write denoiser and VAE of a diffusers folder as the release's two pickles. Raises ValueError if `out`
    exists, or if `model` is no such folder.
    """
    if not (model / "model_index.json").is_file():
        raise ValueError(f"{model} is not a model folder with denoiser and VAE: it has no model_index.json")
    with new_folder(out) as folder:
        for name in ("transformer", "vae"):
            checkpoint = open_checkpoint(model / name)
            write_release(empty_model(checkpoint), checkpoint, folder)
    logger.info("wrote %s", out)


def component_of(model: Path, name: str) -> Path:
    """Where a part of a model is: in its folder of a whole pipeline, else the path itself."""
    return model / name if (model / "model_index.json").exists() else model
