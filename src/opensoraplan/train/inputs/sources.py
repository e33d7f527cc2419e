"""Where a trainer's batches come from: clips that are encoded as they come, or features encoded before."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from opensoraplan.data.aesthetics import add_aesthetic_notices
from opensoraplan.data.dataset import Batch, ClipDataset, collate
from opensoraplan.data.features import (
    DESCRIPTION,
    FeatureBatch,
    FeatureDataset,
    check_files,
    check_fresh,
    collate_features,
    read_parts,
)
from opensoraplan.data.manifest import read_manifest
from opensoraplan.data.selection import Reason, Sample, SelectionSettings, repeat_samples, select
from opensoraplan.data.video import installed_reader
from opensoraplan.documents import parse_json
from opensoraplan.models.conditions import wrong_features
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.text import PromptEmbeds, shapes_of
from opensoraplan.models.vae import VideoVAE, vae_without_weights
from opensoraplan.parallel.ranks import Ranks, place_in_job
from opensoraplan.shapes import FeatureShape, latent_shape
from opensoraplan.train.config import (
    ClipSourceSettings,
    DataSettings,
    TextSettings,
    TrainSettings,
    VAETrainSettings,
)
from opensoraplan.train.inputs.caption_check import find_caption_losses
from opensoraplan.train.inputs.encoders import (
    Encoders,
    check_paths,
    fingerprint_of_named,
    load_encoders,
)
from opensoraplan.train.run.state import ClipsState

logger = logging.getLogger(__name__)

# Among the parts of a cache: before the names of the selection's settings, and what else is not of encoders.
_SELECTION = "selection."
_READER, _AESTHETIC, _CLIPS = "reader", "use_aesthetic", "clips, windows (drawn by seed) and captions"


class Encoded(NamedTuple):
    """A micro-batch as the denoiser's training needs it: posterior moments [B, 2 C, T, H, W] and text; where
    a task is given last frames, the moments [B, 2 C, 1, H, W] of each as a picture.
    """

    moments: Tensor
    prompt: PromptEmbeds
    last: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset, read by workers in batches that `collate` makes, and how a batch is encoded here.

    `samples` are the dataset's, in its order, of `largest` bytes at most. `vae` says what the latents
    are, and may have no weights; `text_features` which features a text has, in which shapes.
    """

    dataset: Dataset[Any]
    samples: Sequence[Sample]
    collate: Callable[[list[Any]], Any]
    encode: Callable[[Any], Encoded]
    vae: VideoVAE
    text_features: Mapping[str, FeatureShape]
    device: torch.device
    largest: int

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Frames, height and width in pixels of each sample."""
        return [sample.shape for sample in self.samples]

    def latent_shape(self, index: int) -> tuple[int, int, int, int]:
        """[C, T, H, W] of the latents of sample number `index`."""
        grid = latent_shape(*self.samples[index].shape, strides=self.vae.strides, patch=1)
        return self.vae.latent_channels, *grid

    def check_fits(self, model: SparseUMMDiT) -> None:
        """Raise ValueError, with both numbers, unless the denoiser takes these latents and this text."""
        for shape in set(self.shapes):
            latent_shape(*shape, strides=self.vae.strides, patch=model.config["patch_size"])
        channels = self.vae.latent_channels
        problems = [
            f"the VAE makes latents of {channels} channels, the denoiser has {name} {model.config[name]}"
            for name in ("in_channels", "out_channels")  # of noisy latents alone: nothing is put beside them
            if model.config[name] != channels
        ]
        problems += wrong_features(model.config, self.text_features, have="the captions have")
        if problems:
            raise ValueError("; ".join(problems))


def open_source(
    settings: TrainSettings,
    *,
    device: torch.device,
    global_batch: int | None = None,
    held_out: bool = False,
    encoders: Encoders | None = None,
) -> tuple[Source, Encoders | None]:
    """The training clips or features of a run, or those of its validation (`held_out`, without dropout), and
    the encoders, on `device`, if the run needs them: `encoders` if given. `global_batch` is how many samples
    a step has in all processes (None: in this one alone).

    Features are held against the clips and encoders that the settings name, if they do; the encoders then
    are loaded on the CPU and, unless validation needs them, let go. Without clips, features are held against
    what the settings give of the selection and the reader. Raises ValueError for data that does not exist, is
    empty, or was encoded by something else.
    """
    wanted = settings.validation if held_out else settings.data
    if global_batch is None and not held_out:
        global_batch = global_batch_of(settings)
    if wanted.features is None or _names_encoders(settings):
        check_paths(settings.vae, settings.text)  # first, for reading a manifest may take minutes
    if wanted.features is None:
        return _open_clips(
            settings, device=device, global_batch=global_batch, held_out=held_out, encoders=encoders
        )
    encoders = _check_features(settings, wanted.features, device=device, held_out=held_out, encoders=encoders)
    source = _features(wanted.features, settings, device=device, global_batch=global_batch, held_out=held_out)
    return source, encoders


def _names_encoders(settings: TrainSettings) -> bool:
    return bool(settings.vae.pretrained and settings.text.t5 and settings.text.clip)


def _open_clips(
    settings: TrainSettings,
    *,
    device: torch.device,
    global_batch: int | None,
    held_out: bool,
    encoders: Encoders | None,
) -> tuple[Source, Encoders]:
    data, wanted = settings.data, settings.validation if held_out else settings.data
    assert wanted.manifest is not None
    samples = select_clips(
        data, wanted.manifest, root=wanted.root, seed=settings.seed, global_batch=global_batch
    )
    warn_of_captions(samples, settings.text)
    if not held_out:
        samples = tuple(samples[place] for place in repeat_samples(samples, data.repeat))
    loaded = encoders or encoders_of_run(settings, device)
    dataset = ClipDataset(
        samples,
        seed=settings.seed,
        new_windows=data.new_windows and not held_out,
        caption_dropout=0.0 if held_out else data.caption_dropout,
        reader=data.reader,
        replace=not held_out,
    )

    def encode(batch: Batch) -> Encoded:
        moments = loaded.encode_videos(batch.video)
        last = loaded.encode_videos(batch.video[:, :, -1:]) if settings.conditions.first_last else None
        return Encoded(moments, PromptEmbeds.of(loaded.encode_captions(batch.captions)), last)

    shapes = shapes_of(loaded.text)
    largest = max(clip_bytes(sample.shape) for sample in samples)
    return Source(dataset, samples, collate, encode, loaded.vae, shapes, device, largest), loaded


def _check_features(
    settings: TrainSettings,
    folder: Path,
    *,
    device: torch.device,
    held_out: bool,
    encoders: Encoders | None,
) -> Encoders | None:
    """Hold the features against what the settings name; returns the encoders that the run still needs."""
    data, wanted = settings.data, settings.validation if held_out else settings.data
    parts: dict[str, str] = {}
    samples: Sequence[Sample] = ()
    if wanted.manifest is not None:
        # Without the batch: a cache has the rare shapes, too.
        samples = select_clips(data, wanted.manifest, root=wanted.root, seed=settings.seed)
        parts |= preprocessing_parts(settings, samples)
    elif not held_out:
        parts |= _given_parts(data, of=read_parts(folder))
    if _names_encoders(settings):
        loaded = encoders or load_encoders(settings.vae, settings.text, device=device, on_host=True)
        parts |= loaded.fingerprint()
        if not held_out and validation_encodes(settings):
            encoders = loaded
            if not waits_on_host(settings):
                encoders.stay()
    else:
        parts |= fingerprint_of_named(settings.vae, settings.text)
    if held_out and data.features is not None:
        parts |= encoders_of_cache(data.features)
    check_fresh(folder, parts)
    if samples:
        check_files(folder, samples)
    return encoders


def waits_on_host(settings: TrainSettings) -> bool:
    """Whether the encoders are in the host's memory while they do not encode, at least until it is known
    whether they fit the device, too.
    """
    return settings.memory.encoders == "in-turn" or settings.memory.placement == "auto"


def encoders_of_run(settings: TrainSettings, device: torch.device) -> Encoders:
    """Load the encoders that the settings name, where they want them. Raises what `load_encoders` raises."""
    return load_encoders(settings.vae, settings.text, device=device, on_host=waits_on_host(settings))


def global_batch_of(settings: TrainSettings | VAETrainSettings) -> int:
    """How many samples a step has, of those processes that work on the same ones."""
    return settings.data.batch_size * settings.optimizer.accumulate


def select_clips(
    data: ClipSourceSettings,
    manifest: Path,
    *,
    root: Path | None,
    seed: int,
    global_batch: int | None = None,
    need_captions: bool = True,
) -> tuple[Sample, ...]:
    """The clips of a manifest that are used, as `osp data check` shows, with sentences on their quality in
    their captions if the settings ask for them; how many are not used is logged for each reason. Arguments
    and errors are those of `read_manifest` and `select`.
    """
    records = read_manifest(manifest, root=root)
    selection = select(
        records, data.selection, seed=seed, global_batch=global_batch, need_captions=need_captions
    )
    logger.info("%s: %d of %d clips are used", manifest, len(selection.kept), len(records))
    for reason, drops in selection.reasons().items():
        logger.info("%s: %d dropped, %s: %s", manifest, len(drops), reason, reason.sentence)
    if isinstance(data, DataSettings) and data.use_aesthetic:
        return add_aesthetic_notices(selection.kept, seed=seed)
    return selection.kept


def warn_of_captions(samples: Sequence[Sample], text: TextSettings) -> None:
    """Log, in the first process of a job, what cleaning removes from the captions of these clips."""
    if place_in_job()[0] == 0:
        for warning in find_caption_losses(samples, text).warnings():
            logger.warning(warning)


def clip_bytes(shape: tuple[int, int, int]) -> int:
    """Of a clip of so many frames, height and width as workers hand it over: three channels in fp32."""
    return 12 * math.prod(shape)


def clips_of(samples: Sequence[Sample]) -> dict[str, Any]:
    """What a checkpoint knows of the clips that the run is trained on."""
    return {"count": len(samples), "digest": digest_of(samples)}


def clips_of_all(samples: Sequence[Sample], ranks: Ranks) -> dict[str, Any]:
    """`clips_of` of all processes, which all ask. Raises ValueError, with what each has, if they differ."""
    mine = clips_of(samples)
    if ranks.any(mine != ranks.agree(lambda: mine)):
        counts = ranks.merged({f"rank {ranks.rank}": str(mine["count"])})
        raise ValueError(
            f"the processes see different clips ({', '.join(f'{who}: {n}' for who, n in counts.items())}, or "
            "other captions or sizes): each of them reads the manifest and must find the same files"
        )
    return mine


def check_clips(before: ClipsState | None, now: Mapping[str, Any], *, others: bool) -> None:
    """Raise ValueError unless the clips are those that the run was begun with (None: it is not known), or
    `others` may take their places.
    """
    if before is None or before.model_dump() == now:
        return
    what = f"{before.count} then, {now['count']} now, or other captions or sizes"
    if others:
        logger.warning("these are not the clips that the run was started with (%s)", what)
        return
    raise ValueError(
        f"these are not the clips that the run was started with ({what}): its steps would use other clips. "
        "Restore the manifest, or set data.other_clips to continue with these"
    )


def digest_of(samples: Sequence[Sample]) -> str:
    """A fingerprint of the clips, their order, captions, sizes and frames. Not of what is in the files, nor
    of the folders that they are in: the same data on another disk is the same.
    """
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        record = sample.record
        facts = [record.path.name, record.captions, record.crop, record.aesthetic, sample.shape]
        if record.variable:
            facts.append("by time")
        if sample.framing is not None:
            facts.append(sample.framing)
        digest.update(json.dumps([*facts, sample.frame_numbers]).encode())
    return digest.hexdigest()


def preprocessing_parts(settings: TrainSettings, samples: Sequence[Sample]) -> dict[str, str]:
    """What features depend on beside the encoders, as `Encoders.fingerprint` names parts. Other parts of a
    cache are those of its encoders: see `encoders_of_cache`.
    """
    data = settings.data
    return {
        **_selection_parts(data.selection),
        _READER: installed_reader(data.reader),
        _AESTHETIC: str(data.use_aesthetic).lower(),
        _CLIPS: digest_of(samples),
    }


def _selection_parts(selection: SelectionSettings, *, given: bool = False) -> dict[str, str]:
    """Of all settings of the selection, or only of those that are given."""
    # Caches are not made of batches.
    values = selection.model_dump(exclude={"min_batches"}, exclude_unset=given)
    return {f"{_SELECTION}{name}": json.dumps(value) for name, value in values.items()}


def _given_parts(data: DataSettings, *, of: Mapping[str, str]) -> dict[str, str]:
    """As `preprocessing_parts`, but of what the settings give and can be known without clips, to be compared
    with the parts `of` a cache.
    """
    parts = _selection_parts(data.selection, given=True)
    # The reader of the cache need not be installed where nothing is read.
    if "reader" in data.model_fields_set and of.get(_READER) != data.reader:
        parts[_READER] = installed_reader(data.reader)
    return parts


def selection_of_cache(folder: Path) -> SelectionSettings:
    """How the clips of the features in `folder` were selected. Raises ValueError for a folder without."""
    parts = {name: value for name, value in read_parts(folder).items() if name.startswith(_SELECTION)}
    values = {
        name.removeprefix(_SELECTION): parse_json(value, where=f"{folder}, {name}")
        for name, value in parts.items()
    }
    return SelectionSettings.read(values, where=str(folder))


def selection_of_run(data: DataSettings) -> SelectionSettings | None:
    """How the clips are selected that a run is trained on. One from features alone knows that itself only if
    its settings say so; None: they do not, and the features are gone.
    """
    if data.manifest is not None or data.features is None:
        return data.selection
    try:
        return selection_of_cache(data.features)
    except (ValueError, OSError):
        return data.selection if data.selection != SelectionSettings() else None


def encoders_of_cache(folder: Path) -> dict[str, str]:
    """The fingerprints of what encoded the features in `folder`."""
    others = (_READER, _AESTHETIC, _CLIPS)
    parts = read_parts(folder).items()
    return {name: value for name, value in parts if name not in others and not name.startswith(_SELECTION)}


def validation_encodes(settings: TrainSettings) -> bool:
    """Whether the run's validation needs the encoders, which then stay on the device."""
    wanted = settings.validation
    return wanted.every > 0 and bool(wanted.prompts or wanted.manifest)


def _features(
    folder: Path,
    settings: TrainSettings,
    *,
    device: torch.device,
    global_batch: int | None,
    held_out: bool,
) -> Source:
    dataset = FeatureDataset(
        folder,
        seed=settings.seed,
        caption_dropout=0.0 if held_out else settings.data.caption_dropout,
        use_aesthetic=settings.data.use_aesthetic,
        last_frames=settings.conditions.first_last > 0 and not held_out,
    )

    if global_batch is not None:
        fewest = settings.data.selection.min_batches
        rare = dataset.drop_rare(min_batches=fewest, global_batch=global_batch)
        if rare:
            reason = Reason.RARE_SHAPE
            logger.info("%s: %d dropped, %s: %s", folder, len(rare), reason, reason.sentence)
    if not held_out:
        dataset.take(repeat_samples(dataset.samples, settings.data.repeat))

    def encode(batch: FeatureBatch) -> Encoded:
        last = None if batch.last is None else batch.last.to(device)
        return Encoded(batch.moments.to(device), PromptEmbeds.of(batch.texts).to(device), last)

    known, where = dataset.description, f"{folder / DESCRIPTION}, vae"
    vae = vae_without_weights(known.vae_class, known.vae, where=where)
    if (channels := dataset.latent_channels) != vae.latent_channels:
        raise ValueError(f"{where}: latent_channels is {vae.latent_channels}, the moments are of {channels}")
    # Moments are a third of a picture's pixels, and of a clip's much less.
    largest = max(clip_bytes(sample.shape) for sample in dataset.samples) // 3
    shapes = dataset.text_features
    return Source(dataset, dataset.samples, collate_features, encode, vae, shapes, device, largest)
