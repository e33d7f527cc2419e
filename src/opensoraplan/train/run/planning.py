"""A run's settings as plan/ takes them. Weights, data and devices need not be there yet."""

import logging
from typing import Any

import torch
from torch import nn

from opensoraplan.device import DTYPES
from opensoraplan.formats.assemble import denoiser_config, empty_vae
from opensoraplan.formats.checkpoints import open_checkpoint
from opensoraplan.models.sizes import BatchShape, DenoiserSizes
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.text import TEXT_PARTS, empty_text_model
from opensoraplan.models.vae import VideoVAE
from opensoraplan.models.wfvae import WFVAE
from opensoraplan.plan.report import FrozenParts
from opensoraplan.plan.step import AdapterOptions, TrainingOptions, TrainingStep
from opensoraplan.train.config import TextSettings, TrainSettings, VAESettings
from opensoraplan.train.inputs.encoders import given_paths
from opensoraplan.train.inputs.sources import selection_of_run, validation_encodes
from opensoraplan.train.learner.adapter import target_layers

logger = logging.getLogger(__name__)


def largest_sample(settings: TrainSettings) -> tuple[int, int, int]:
    """Frames, height and width of what the run is trained on at most."""
    selection = selection_of_run(settings.data) or settings.data.selection
    return selection.sample_frames(selection.num_frames), *selection.largest_size


def denoiser_sizes(settings: TrainSettings) -> DenoiserSizes:
    """Of the model that the run trains; where its weights are not there, of one like its config or the
    release, which is logged.
    """
    model = settings.model
    if model.pretrained is not None and model.pretrained.exists():
        config = denoiser_config(model.pretrained, model.config)
    else:  # planning comes before weights are there
        config = dict(model.config or {})
        if model.pretrained is not None:
            what = "of model.config" if config else "like the release"
            logger.warning(
                "model.pretrained %s does not exist: planned for a model %s", model.pretrained, what
            )
    if model.sparse_n is not None:
        config["sparse_n"] = list(model.sparse_n)
    return DenoiserSizes(config)


def training_step(settings: TrainSettings, shape: BatchShape) -> TrainingStep:
    """A step of the run in one process, with micro-batches of this shape."""
    model = denoiser_sizes(settings)
    return TrainingStep(model, shape, options=training_options(settings, model))


def training_options(settings: TrainSettings, model: DenoiserSizes) -> TrainingOptions:
    """How the run trains this model. Raises ValueError for an adapter that does not fit it."""
    optimizer, memory = settings.optimizer, settings.memory
    adapter = None if settings.adapter.kind == "none" else _adapter_options(settings, model)
    ema = "device" if optimizer.ema_device == "same" else "host"
    return TrainingOptions(
        compute=settings.model.compute,
        master=settings.model.master,
        accumulate=optimizer.accumulate,
        recompute_blocks=len(model.blocks) if memory.placement == "streamed" else memory.recompute_blocks,
        recompute_feed_forwards=memory.recompute_feed_forwards,
        keep_attention=memory.keep_attention,
        inputs_on_host=memory.inputs_on_host,
        bits=optimizer.bits,
        ema=None if optimizer.ema_decay is None else ema,
        cpu_offload=settings.parallel.cpu_offload,
        adapter=adapter,
    )


def _adapter_options(settings: TrainSettings, model: DenoiserSizes) -> AdapterOptions:
    adapter = settings.adapter
    with torch.device("meta"):
        layers = target_layers(SparseUMMDiT(**model.config), adapter.targets)
    return AdapterOptions(
        layers,
        adapter.rank,
        dora=adapter.kind == "dora",
        base="whole" if adapter.base == "auto" else adapter.base,
        streamed=settings.memory.placement == "streamed",
    )


def frozen_parts(vae: VAESettings, text: TextSettings) -> FrozenParts:
    """Those that the settings name; for parts that are not there, the release's."""
    paths = given_paths(vae, text)
    models: dict[str, Any] = {}
    if (path := paths.get("vae.pretrained")) and path.exists():
        models["vae"] = empty_vae(open_checkpoint(path), vae.config)
    for name, part in zip(("t5", "clip"), TEXT_PARTS, strict=True):
        if (path := paths.get(f"text.{name}")) and path.exists():
            models[name] = empty_text_model(path, part)
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return FrozenParts(**counts)


def empty_vae_of(settings: VAESettings) -> VideoVAE:
    """The VAE without weights, in its precision; where it is not there, the release's."""
    path = given_paths(settings, TextSettings()).get("vae.pretrained")
    if path is not None and path.exists():
        vae = empty_vae(open_checkpoint(path), settings.config)
    else:
        with torch.device("meta"):
            vae = WFVAE()
    nn.Module.to(vae, DTYPES[settings.compute])  # type: ignore[arg-type] (it is a module)
    vae.enable_streaming(latent_frames=settings.chunk)
    return vae


def encodes_while_training(settings: TrainSettings) -> bool:
    """Whether the VAE and the text encoders are on the device, too."""
    return settings.data.features is None or validation_encodes(settings)
