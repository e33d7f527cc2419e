"""From a training run to what others read: a diffusers folder, Megatron shards, or the release's pickle."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from opensoraplan.defaults import INDEX, GenerateDefaults, ModelIndex, SchedulerConfig, Task
from opensoraplan.formats.assemble import (
    Opened,
    OpenedPipeline,
    Sources,
    open_denoiser,
    open_vae,
    write_pipeline,
)
from opensoraplan.formats.export import (
    WeightFiles,
    new_folder,
    write_component,
    write_megatron,
    write_release,
)
from opensoraplan.formats.lora import Lora, LoraFormat, check_lora_path, write_lora
from opensoraplan.formats.stored import Stored, StoredTensors
from opensoraplan.models.prompts import PromptSettings
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.inputs.encoders import find_parts
from opensoraplan.train.inputs.sources import selection_of_run
from opensoraplan.train.learner.adapter import BASE_SETTING, fingerprint_base, lora_of
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


ExportFormat = Literal["diffusers", "megatron", "release", "lora", "lora-comfy", "lora-kohya", "lora-peft"]


@dataclass(frozen=True)
class ExportOptions:
    """What `export_run` writes. `to`: None is "lora" for a run that has trained an adapter, else "diffusers".

    `ema` False takes the last weights. `dtype`: None keeps that of the training. `tensor_parallel` is of
    Megatron shards, `max_shard_size` and `prompts` of a diffusers folder.
    """

    step: str = "latest"
    ema: bool = True
    to: ExportFormat | None = None
    tensor_parallel: int = 1
    dtype: torch.dtype | None = None
    max_shard_size: str = "2GB"
    prompts: PromptDefaults = PromptDefaults()


def export_run(run: Path, out: Path, options: ExportOptions = ExportOptions()) -> None:
    """Write the denoiser of a run's checkpoint to the new folder `out`, or the LoRA that it has trained to
    a new file.

    "diffusers" writes a whole pipeline where the run's settings name VAE and text encoders, else the folder's
    `transformer` alone. All formats but those of LoRAs have an adapter merged into the weights, in fp32.
    Raises ValueError for a folder that is no run, a step that is not there, a run without EMA or adapter if
    that is asked for, and a model to adapt that is not the one that was trained on.
    """
    files = WeightFiles(options.dtype, options.max_shard_size)
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} is not the output folder of a training run: it has no {CONFIG}")
    settings = TrainSettings.read_file(run / CONFIG)
    adapts = settings.adapter.kind != "none"
    to = options.to or ("lora" if adapts else "diffusers")
    if to != "diffusers":
        _check_unused(options, to)
    if to.startswith("lora"):
        if not adapts:
            raise ValueError(
                f"{run} has trained all weights, no LoRA: use --to diffusers, megatron or release"
            )
        _write_lora(run, out, settings, options, to=to)
        logger.info("wrote %s", out)
        return
    denoiser = _open_denoiser(run, settings, options)
    if to == "diffusers":
        with new_folder(out) as folder:
            _write_diffusers(folder, denoiser, settings, files, options.prompts)
        logger.info("wrote %s", out)
        return
    rename = denoiser.model.original_format().rename
    ours = ((name, denoiser.tensors[name]) for name in denoiser.names)
    theirs = {rename(name): tensor.to(options.dtype or tensor.dtype) for name, tensor in ours}
    with new_folder(out) as folder:
        if to == "megatron":
            write_megatron(denoiser.model, theirs, folder, tensor_parallel=options.tensor_parallel)
        else:
            write_release(denoiser.model, theirs, folder)
    logger.info("wrote %s", out)


def _check_unused(options: ExportOptions, to: ExportFormat) -> None:
    """Raise ValueError for options of diffusers folders, which this format has no use for."""
    usual = ExportOptions()
    for name in ("max_shard_size", "prompts"):
        if getattr(options, name) != getattr(usual, name):
            what = "prompt settings" if name == "prompts" else f"max_shard_size {options.max_shard_size}"
            raise ValueError(f"{what} go with a diffusers folder, and this export is {to}: leave them out")


def _write_lora(
    run: Path, out: Path, settings: TrainSettings, options: ExportOptions, *, to: ExportFormat
) -> None:
    kind = cast(LoraFormat, to.partition("-")[2] or "diffusers")
    check_lora_path(out, kind)
    write_lora(_read_adapter(run, settings, options), out, kind=kind, dtype=options.dtype)


def _read_adapter(run: Path, settings: TrainSettings, options: ExportOptions) -> Lora:
    """The adapter in a run's checkpoint."""
    step, base = checkpoint.find(run, options.step), settings.model.pretrained
    assert base is not None
    state, tensors = _read_weights(run, step, ema=options.ema)
    origin = {
        "step": step,
        "base": str(base),
        "base_fingerprint": state.encoders.get(BASE_SETTING, ""),
        "adapter": settings.adapter.model_dump(mode="json"),
        "tasks": tasks_of(settings),
    }
    return lora_of(tensors, settings.adapter, origin)


def _read_weights(run: Path, step: int, *, ema: bool) -> tuple[DenoiserState, dict[str, Tensor]]:
    """What was trained, and the checkpoint's state."""
    part = "ema" if ema else "model"
    state = checkpoint.read_state(run, step, DenoiserState)
    saved = checkpoint.load(run, step, only=(part,))
    if part not in saved.parts:
        raise ValueError(f"{run} keeps no EMA of the weights (optimizer.ema_decay): give --no-ema")
    check_finite(saved.parts[part].values())
    return state, saved.parts[part]


def _open_denoiser(run: Path, settings: TrainSettings, options: ExportOptions) -> Opened[SparseUMMDiT]:
    """The denoiser of a run's checkpoint, with an adapter merged into the model that it was trained on."""
    if settings.adapter.kind != "none":
        lora, base = _read_adapter(run, settings, options), settings.model.pretrained
        assert base is not None
        now = fingerprint_base(base)
        if lora.origin["base_fingerprint"] not in ("", now):
            raise ValueError(f"{base} is not the model that {run} was trained on: its weights were replaced")
        opened = open_denoiser(base, settings.model.config, rates=settings.model.sparse_n)
        merged = _Merged(opened, lora, options.dtype)
        return Opened(opened.model, merged, {name: name for name in merged})
    state, tensors = _read_weights(run, checkpoint.find(run, options.step), ema=options.ema)
    with torch.device("meta"):
        model = SparseUMMDiT(**state.architecture)
    return Opened(model, tensors, {name: name for name in tensors})


class _Merged(Mapping[str, Tensor]):
    """The weights of a model with a LoRA in them, by our names, each made when it is asked for: in `dtype`,
    None is that of the model's.
    """

    def __init__(self, base: Opened[SparseUMMDiT], lora: Lora, dtype: torch.dtype | None) -> None:
        self._base = base
        self._lora = lora
        self._dtype = dtype

    @property
    def stored(self) -> Mapping[str, Stored]:
        """Shapes and types, without merging."""
        stored = cast(StoredTensors, self._base.tensors).stored
        return {name: stored[theirs] for name, theirs in self._base.names.items()}

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base.tensors[self._base.names[name]]
        return self._lora.merge(name.removesuffix(".weight"), weight).to(self._dtype or weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base.names)

    def __len__(self) -> int:
        return len(self._base.names)


def _write_diffusers(
    folder: Path,
    denoiser: Opened[SparseUMMDiT],
    settings: TrainSettings,
    files: WeightFiles,
    prompts: PromptDefaults,
) -> None:
    vae, text = settings.vae, settings.text
    if vae.pretrained is None or text.t5 is None or text.clip is None:
        logger.warning(
            "the run's settings name no VAE and text encoders (vae.pretrained, text.t5, text.clip): only the "
            "denoiser is written"
        )
        write_component(denoiser.model, denoiser.names, denoiser.tensors, folder / "transformer", files)
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
        OpenedPipeline(sources, denoiser, open_vae(sources.vae, vae.config)),
        files=files,
        scheduler=_scheduler(settings, base),
        prompts={
            **_prompts_of(base),
            "max_text_tokens": text.max_tokens,
            "clean_prompts": text.clean,
            "keep_chinese": text.keep_chinese,
            **prompts.as_config(),
        },
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
    before = GenerateDefaults() if base is None else GenerateDefaults.of(base)
    shown = {**_shown_size(settings), "dtype": settings.model.compute}
    if tasks := tasks_of(settings):
        shown["tasks"] = tasks
    return before.model_copy(update=shown)


def _shown_size(settings: TrainSettings) -> dict[str, Any]:
    """Options of videos like those of the run's validation, or of the size that it was trained on."""
    validation, selection = settings.validation, selection_of_run(settings.data)
    if validation.prompts:
        return {
            "frames": validation.frames,
            "height": validation.height,
            "width": validation.width,
            "fps": validation.fps,
            "steps": validation.sampling_steps,
            "guidance": validation.guidance_scale,
        }
    if selection is None:
        return {}
    size = {"frames": selection.sample_frames(selection.num_frames), "fps": selection.train_fps}
    if selection.force_resolution:
        size |= {"height": selection.max_height, "width": selection.max_width}
    return size


def tasks_of(settings: TrainSettings) -> tuple[Task, ...]:
    """What the run trains its model for, besides text to video."""
    return tuple(task for task in get_args(Task) if getattr(settings.conditions, task))
