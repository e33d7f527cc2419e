"""From a training run to what others read: a diffusers folder, Megatron shards, or the release's pickle."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from opensoraplan.defaults import INDEX, GenerateDefaults, ModelIndex, SchedulerConfig
from opensoraplan.formats.assemble import Opened, Sources, open_vae, write_pipeline
from opensoraplan.formats.export import (
    check_shard_size,
    new_folder,
    write_component,
    write_megatron,
    write_release,
)
from opensoraplan.models.prompts import PromptSettings
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.inputs.encoders import find_parts
from opensoraplan.train.inputs.sources import selection_of_run
from opensoraplan.train.learner.learner import check_finite
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.folder import CONFIG
from opensoraplan.train.run.state import DenoiserState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptDefaults:
    """How the exported pipeline treats prompts; the original wraps them and adds a negative prompt, in
    generating though not in training. Raises ValueError for a template without exactly one {}.
    """

    template: str | None = None
    negative: str | None = None

    def __post_init__(self) -> None:
        PromptSettings(template=self.template)  # raises for one that prompts do not fit into

    def as_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {}
        if self.template is not None:
            config["prompt_template"] = None if self.template == "{}" else self.template
        if self.negative is not None:
            config["default_negative_prompt"] = self.negative
        return config


def export_run(
    run: Path,
    out: Path,
    *,
    step: str = "latest",
    ema: bool = True,
    to: Literal["diffusers", "megatron", "release"] = "diffusers",
    tensor_parallel: int = 1,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "2GB",
    prompts: PromptDefaults = PromptDefaults(),
) -> None:
    """Write the denoiser of a run's checkpoint to the new folder `out`.

    `to` "diffusers" writes a whole pipeline where the run's settings name VAE and text encoders, else the
    folder's `transformer` alone. `ema` False takes the last weights. Raises ValueError for a folder that is
    no run, a step that is not there, and a run without EMA if that is asked for.
    """
    check_shard_size(max_shard_size)
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} is not the output folder of a training run: it has no {CONFIG}")
    settings = TrainSettings.read_file(run / CONFIG)
    denoiser = _denoiser(run, checkpoint.find(run, step), ema=ema)
    if to == "diffusers":
        with new_folder(out) as folder:
            _write_diffusers(
                folder, denoiser, settings, dtype=dtype, max_shard_size=max_shard_size, prompts=prompts
            )
        logger.info("wrote %s", out)
        return
    rename = denoiser.model.original_format().rename
    theirs = {rename(name): tensor.to(dtype or tensor.dtype) for name, tensor in denoiser.tensors.items()}
    with new_folder(out) as folder:
        if to == "megatron":
            write_megatron(denoiser.model, theirs, folder, tensor_parallel=tensor_parallel)
        else:
            write_release(denoiser.model, theirs, folder)
    logger.info("wrote %s", out)


def _denoiser(run: Path, step: int, *, ema: bool) -> Opened[SparseUMMDiT]:
    part = "ema" if ema else "model"
    state = checkpoint.read_state(run, step, DenoiserState)
    saved = checkpoint.load(run, step, only=(part,))
    if part not in saved.parts:
        raise ValueError(f"{run} keeps no EMA of the weights (optimizer.ema_decay): give --no-ema")
    with torch.device("meta"):
        model = SparseUMMDiT(**state.architecture)
    tensors = saved.parts[part]
    check_finite(tensors.values())
    return Opened(model, tensors, {name: name for name in tensors})


def _write_diffusers(
    folder: Path,
    denoiser: Opened[SparseUMMDiT],
    settings: TrainSettings,
    *,
    dtype: torch.dtype | None,
    max_shard_size: str,
    prompts: PromptDefaults,
) -> None:
    vae, text = settings.vae, settings.text
    if vae.pretrained is None or text.t5 is None or text.clip is None:
        logger.warning(
            "the run's settings name no VAE and text encoders (vae.pretrained, text.t5, text.clip): only the "
            "denoiser is written"
        )
        transformer = folder / "transformer"
        write_component(
            denoiser.model,
            denoiser.names,
            denoiser.tensors,
            transformer,
            dtype=dtype,
            max_shard_size=max_shard_size,
        )
        return
    paths, base = find_parts(vae, text), _base(settings)
    sources = Sources(
        transformer=folder,
        vae=paths["vae.pretrained"],
        text_encoder=paths["text.t5"],
        text_encoder_2=paths["text.clip"],
        tokenizer=paths["text.t5_tokenizer"],
        tokenizer_2=paths["text.clip_tokenizer"],
    )
    write_pipeline(
        folder,
        denoiser=denoiser,
        vae=open_vae(sources.vae, vae.config),
        sources=sources,
        dtype=dtype,
        scheduler=_scheduler(settings, base),
        prompts={
            **_prompts_of(base),
            "max_text_tokens": text.max_tokens,
            "clean_prompts": text.clean,
            "keep_chinese": text.keep_chinese,
            **prompts.as_config(),
        },
        max_shard_size=max_shard_size,
    )
    _generate_defaults(settings, base).write(folder)


def _base(settings: TrainSettings) -> Path | None:
    """The whole pipeline that the run began from, if it is one."""
    path = settings.model.pretrained
    return path if path is not None and (path / INDEX).is_file() else None


def _prompts_of(base: Path | None) -> dict[str, Any]:
    """How the pipeline in that folder treats prompts, as far as it says so."""
    if base is None:
        return {}
    config = ModelIndex.of(base).prompt_config()
    return {key: config[key] for key in ("prompt_template", "default_negative_prompt") if key in config}


def _scheduler(settings: TrainSettings, base: Path | None) -> dict[str, Any]:
    """The shift of the run's validation, else of the pipeline that it began from."""
    if settings.validation.shift is not None:
        return {"shift": settings.validation.shift}
    if base is None:
        return {}
    config = SchedulerConfig.of(base).model_dump(include={"shift", "use_dynamic_shifting"})
    return {key: value for key, value in config.items() if value is not None}


def _generate_defaults(settings: TrainSettings, base: Path | None) -> GenerateDefaults:
    """Videos like those of the run's validation, else of the size that it was trained on, if that is one, and
    else as of the pipeline that it began from.
    """
    validation, selection = settings.validation, selection_of_run(settings.data)
    before = GenerateDefaults() if base is None else GenerateDefaults.of(base)
    if validation.prompts:
        shown = {
            "frames": validation.frames,
            "height": validation.height,
            "width": validation.width,
            "fps": validation.fps,
            "steps": validation.sampling_steps,
            "guidance": validation.guidance_scale,
        }
        return before.model_copy(update={**shown, "dtype": settings.model.compute})
    if selection is None:
        return before.model_copy(update={"dtype": settings.model.compute})
    size = {"frames": selection.sample_frames(selection.num_frames), "fps": selection.train_fps}
    if selection.force_resolution:
        size |= {"height": selection.max_height, "width": selection.max_width}
    return before.model_copy(update={**size, "dtype": settings.model.compute})
