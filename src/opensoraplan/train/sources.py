"""Where a trainer's batches come from: clips that are encoded as they come, or features encoded before."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from opensoraplan.data.dataset import Batch, ClipDataset, collate
from opensoraplan.data.features import FeatureBatch, FeatureDataset, check_fresh, collate_features
from opensoraplan.data.manifest import read_manifest
from opensoraplan.data.selection import Sample, select
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.train.cache import preprocessing_parts
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.encoders import Encoders, load_encoders

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """A micro-batch as the denoiser's training needs it: posterior moments [B, 2 C, T, H, W] and text."""

    moments: Tensor
    prompt: PromptEmbeds


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset, read by workers in batches that `collate` makes, and how a batch is encoded here.

    `shapes` are the samples' (frames, height, width) in pixels, `vae_config` says what the latents are.
    """

    dataset: Dataset[Any]
    shapes: Sequence[tuple[int, int, int]]
    collate: Callable[[list[Any]], Any]
    encode: Callable[[Any], Encoded]
    vae_config: Mapping[str, Any]
    device: torch.device

    def normalize(self, latents: Tensor) -> Tensor:
        """(latents - shift) * scale per channel of [B, C, T, H, W]."""
        shift, scale = self.vae_config["shift"], self.vae_config["scale"]
        if shift is None or scale is None:
            return latents
        return (latents - _per_channel(shift, latents)) * _per_channel(scale, latents)

    def check_fits(self, model: SparseUMMDiT) -> None:
        """Raise ValueError unless the denoiser takes these latents and, as far as known, this text."""
        have, wanted = self.vae_config["latent_channels"], model.config["in_channels"]
        if have != wanted:
            raise ValueError(
                f"the VAE makes latents of {have} channels, the denoiser has in_channels {wanted}"
            )


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(-1, 1, 1, 1)


def open_source(
    settings: TrainSettings, *, device: torch.device, held_out: bool = False, encoders: Encoders | None = None
) -> tuple[Source, Encoders | None]:
    """The training clips or features of a run, or those of its validation (`held_out`, without dropout), and
    the encoders if any are loaded: `encoders` if given.

    Features are held against the clips and encoders that the settings name, if they do. Raises ValueError for
    data that does not exist, is empty, or was encoded by something else.
    """
    data = settings.data
    manifest, features = data.manifest, data.features
    if held_out:
        manifest, features = settings.validation.manifest, settings.validation.features
    dropout = 0.0 if held_out else data.caption_dropout
    samples = None if manifest is None else training_samples(settings, manifest)
    if features is not None:
        parts = {} if samples is None else preprocessing_parts(settings, samples)
        if settings.vae.pretrained and settings.text.t5 and settings.text.clip:
            encoders = encoders or load_encoders(settings.vae, settings.text, device=device)
            parts |= encoders.fingerprint()
        check_fresh(features, parts)
        return _features(features, settings, dropout=dropout, device=device), encoders
    assert samples is not None
    encoders = encoders or load_encoders(settings.vae, settings.text, device=device)
    dataset = ClipDataset(
        samples,
        seed=settings.seed,
        new_windows=data.new_windows and not held_out,
        caption_dropout=dropout,
        use_aesthetic=data.use_aesthetic,
        reader=data.reader,
    )

    def encode(batch: Batch) -> Encoded:
        moments = encoders.encode_videos(batch.video)
        return Encoded(moments, encoders.encode_captions(batch.captions))

    shapes = [sample.shape for sample in samples]
    return Source(dataset, shapes, collate, encode, encoders.vae.config, device), encoders


def training_samples(settings: TrainSettings, manifest: Path) -> tuple[Sample, ...]:
    """What is kept of a manifest, as `osp data check` says."""
    selection = select(
        read_manifest(manifest, root=settings.data.root), settings.data.selection, seed=settings.seed
    )
    kept, dropped = len(selection.kept), len(selection.dropped)
    logger.info("%s: %d clips, %d dropped (osp data check says why)", manifest, kept, dropped)
    return selection.kept


def _features(folder: Path, settings: TrainSettings, *, dropout: float, device: torch.device) -> Source:
    dataset = FeatureDataset(
        folder,
        seed=settings.seed,
        caption_dropout=dropout,
        use_aesthetic=settings.data.use_aesthetic,
    )

    def encode(batch: FeatureBatch) -> Encoded:
        prompt = PromptEmbeds(batch.sequence, batch.mask, batch.pooled).to(device)
        return Encoded(batch.moments.to(device), prompt)

    return Source(dataset, dataset.shapes, collate_features, encode, dataset.description.vae, device)
