"""Features that were encoded before training: the folder that `osp cache` fills, and a dataset that reads it.

No models here; encoding is in train/inputs/cache.py, a file of the folder in shards.py. The folder has

    features.json               what it was made from, part by part
    videos-00000.safetensors    posterior moments of so many samples in a row; in the header what is known of
                                each sample, of its file, and of those that could not be read; where
                                training needs them, moments of last frames as pictures
    texts-00000.safetensors     features of so many texts, by the names that the text encoders gave them
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from opensoraplan.data.buckets import Draw
from opensoraplan.data.dataset import Failure, caption_of
from opensoraplan.data.selection import Sample, samples_needed
from opensoraplan.data.shards import (
    KINDS,
    WHOLE,
    AnyIndex,
    Kind,
    KnownFile,
    LeftOut,
    OpenFiles,
    PlacedFile,
    SampleEntry,
    Shapes,
    Side,
    TextIndex,
    VideoIndex,
    damage,
    last_name,
    read_index,
    same_channels,
    shard_path,
    text_key,
    video_name,
    write_shard,
)
from opensoraplan.disk import OWN, clear_dead, explain_disk_errors, write_whole
from opensoraplan.settings import Settings
from opensoraplan.shapes import RELEASE, FeatureShape, Strides

DESCRIPTION = "features.json"
# Of what a cache has. Before 2, captions were cleaned a little otherwise and had other sentences on quality.
VERSION = 2

# Of clips in a message.
_NAMED = 5
# Threads that read headers: on a network disk they wait for it most of the time.
_READERS = 16
# Letters of a hash that a message shows.
_SHOWN = 8


class Description(Settings):
    """What a cache was made from and how it is divided; all of it is known before the first shard.

    `parts` are fingerprints of all that the features depend on, under names for messages. `vae` is the
    VAE's config (with the latents' shift and scale), `vae_class` its class. `text_features`: the shapes of a
    text's features; caches without this key have "sequence" [L, D] and "pooled" [P]. `last_frames`: whether
    there are the moments of each clip's last frame as a picture. `left_out` is None until all shards are
    written.
    """

    version: int = VERSION
    parts: dict[str, str]
    vae: dict[str, Any]
    vae_class: str = "WFVAE"
    temporal_stride: Annotated[int, Field(ge=1)] = RELEASE.temporal
    spatial_stride: Annotated[int, Field(ge=1)] = RELEASE.spatial
    text_features: dict[str, tuple[Side | None, ...]] | None = None
    use_aesthetic: bool
    last_frames: bool = False
    samples: int
    texts: int
    videos_per_shard: int
    texts_per_shard: int
    left_out: tuple[LeftOut, ...] | None = None

    @property
    def strides(self) -> Strides:
        return Strides(self.temporal_stride, self.spatial_stride)

    def shards(self, kind: Kind) -> int:
        """How many files of `kind` the whole cache has."""
        if kind == "videos":
            return -(-self.samples // self.videos_per_shard)
        return -(-self.texts // self.texts_per_shard)

    def places(self, kind: Kind, shard: int) -> range:
        """Which samples or texts, counted from 0, are in file number `shard`."""
        size, total = (
            (self.videos_per_shard, self.samples) if kind == "videos" else (self.texts_per_shard, self.texts)
        )
        return range(shard * size, min(total, (shard + 1) * size))


# --- Writing ------------------------------------------------------------------------------------------------


def check_place(folder: Path, parts: Mapping[str, str]) -> None:
    """Raise ValueError if `folder` cannot be written to, or has something else than a cache of these `parts`,
    as far as they are given; a folder that does not exist, or is empty, is fine.
    """
    place = folder.absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"cannot write to {there}: give another folder")
    # Another process may be beginning the same cache: what is there is looked at before its description.
    strangers = folder.exists() and any(not entry.name.startswith(OWN) for entry in folder.iterdir())
    if (folder / DESCRIPTION).exists():
        _refuse_other_parts(folder, _read_description(folder), parts)
    elif strangers:
        raise ValueError(f"{folder} exists and is no feature cache: give another folder")


def begin(folder: Path, description: Description) -> None:
    """Make the folder and its features.json; go on with one that has the same.

    Raises ValueError for another cache in that place, naming what differs, and where nothing can be written.
    """
    check_place(folder, description.parts)
    if not (folder / DESCRIPTION).exists():
        with explain_disk_errors(folder, whole=WHOLE):
            folder.mkdir(parents=True, exist_ok=True)
        _write_description(folder, description)
    # Read it again in any case: another process may have begun at the same moment.
    there = _read_description(folder)
    _refuse_other_parts(folder, there, description.parts)
    clear_dead(folder)
    for name in type(description).model_fields:
        was, now = getattr(there, name), getattr(description, name)
        if name == "parts":  # their values are compared above
            was, now = sorted(was), sorted(now)
        if name == "text_features" and was is None:  # begun before there was this key
            continue
        if name != "left_out" and was != now:
            raise ValueError(f"{folder} has a cache with {name} {was}, not {now}: give another folder")


def is_written(folder: Path, description: Description, kind: Kind, shard: int) -> bool:
    """Whether that file is there and whole."""
    path = shard_path(folder, kind, shard)
    try:
        if kind == "videos":
            videos, shapes = read_index(path, VideoIndex)
            videos.channels(shapes, description.strides, last_frames=description.last_frames)
        else:
            texts, shapes = read_index(path, TextIndex)
            texts.features(shapes, description.text_features)
    except ValueError:
        return False
    return True


def write_videos(
    folder: Path,
    shard: int,
    moments: Sequence[tuple[Sample, Tensor]],
    *,
    last: Sequence[Tensor] = (),
    files: Mapping[int, KnownFile] = MappingProxyType({}),
    left_out: Sequence[LeftOut] = (),
) -> None:
    """Write samples with their moments [2 C, t, h, w] as file number `shard`, or nothing at all.

    `last`: the moments [2 C, 1, h, w] of each one's last frame. `files`: the clips' files as they were read,
    by the samples' places in the whole cache, in their order.

    Raises ValueError in plain words for a disk that is full or cannot be written to.
    """
    index = VideoIndex(
        samples=[SampleEntry.of(sample) for sample, _ in moments],
        files=[PlacedFile(place, *file) for place, file in files.items()],
        left_out=list(left_out),
    )
    tensors = {video_name(place): tensor for place, (_, tensor) in enumerate(moments)}
    tensors |= {last_name(place): tensor for place, tensor in enumerate(last)}
    write_shard(shard_path(folder, "videos", shard), tensors, index)


def write_texts(folder: Path, shard: int, texts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write texts with their features, by name, as file number `shard`; as `write_videos` does."""
    tensors = {
        f"{text_key(text)}.{name}": feature
        for text, features in texts.items()
        for name, feature in features.items()
    }
    index = TextIndex(texts=[text_key(text) for text in texts])
    write_shard(shard_path(folder, "texts", shard), tensors, index)


def changed_clips(folder: Path, samples: Sequence[Sample], shards: Iterable[int]) -> dict[int, list[Path]]:
    """The clips in these files of videos that are others now, by the number of the file. `samples`: all that
    the cache was made of, as they are now. Caches of earlier versions do not know their files.
    """

    def changed(shard: int) -> list[Path]:
        path = shard_path(folder, "videos", shard)
        index, _ = read_index(path, VideoIndex)
        with damage(path):
            if wrong := [file.place for file in index.files if file.place >= len(samples)]:
                raise ValueError(f"files: there is no sample {wrong[0]}, of {len(samples)}")
        files = {samples[file.place].record.path: KnownFile(*file[1:]) for file in index.files}
        return [path for path, file in files.items() if not file.is_at(path)]

    shards = list(shards)
    with ThreadPoolExecutor(_READERS) as executor:
        found = zip(shards, executor.map(changed, shards), strict=True)
        return {shard: gone for shard, gone in found if gone}


def check_files(folder: Path, samples: Sequence[Sample]) -> None:
    """Raise ValueError if clips were replaced since they were encoded, which the names do not tell."""
    description = _read_description(folder)
    changed = changed_clips(folder, samples, range(description.shards("videos")))
    paths = sorted({str(path) for shard in changed.values() for path in shard})
    if paths:
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        raise ValueError(
            f"{folder} is stale: {len(paths)} clips have changed since they were encoded "
            f"({', '.join(paths[:_NAMED])}{more}); `osp cache --out {folder}` encodes them again"
        )


def missing_shards(folder: Path) -> list[Path]:
    """The files that are not there yet."""
    description = _read_description(folder)
    wanted = [shard_path(folder, kind, n) for kind in KINDS[::-1] for n in range(description.shards(kind))]
    there = {entry.name for entry in os.scandir(folder)}
    return [path for path in wanted if path.name not in there]


def read_left_out(folder: Path, shards: Sequence[int]) -> list[LeftOut]:
    """The clips that are not in these files of videos."""
    read = _read_indices(VideoIndex, [shard_path(folder, "videos", shard) for shard in shards])
    return [clip for index, _ in read for clip in index.left_out]


def finish(folder: Path) -> None:
    """Once every shard is there: note in features.json what was left out. The same whoever does it."""
    description = _read_description(folder)
    left_out = read_left_out(folder, range(description.shards("videos")))
    _write_description(folder, description.model_copy(update={"left_out": tuple(left_out)}))


# --- Reading ------------------------------------------------------------------------------------------------


def read_parts(folder: Path) -> dict[str, str]:
    """The fingerprints of all that a cache was made from. Raises ValueError for a folder that is none."""
    return _read_description(folder).parts


def check_fresh(folder: Path, parts: Mapping[str, str]) -> Description:
    """Raise ValueError unless `folder` is a whole cache that was made with these `parts`, of those it has.

    `parts`: names and fingerprints of what is used now; the message names each that is another one, or how
    many shards are missing, and what to do.
    """
    description = _read_description(folder)
    _refuse_other_parts(folder, description, parts)
    absent = missing_shards(folder)
    if absent:
        total = description.shards("videos") + description.shards("texts")
        raise ValueError(
            f"{folder} is not finished: {len(absent)} of {total} shards are missing, the first is "
            f"{absent[0].name}; go on with `osp cache --out {folder}` and the settings that it was begun with"
        )
    return description


class Features(NamedTuple):
    """A sample: moments [2 C, t, h, w], and the features of the caption drawn, by name; moments of its last
    frame, if they are asked for.
    """

    moments: Tensor
    text: Mapping[str, Tensor]
    caption: str
    sample: Sample
    last: Tensor | None = None


class FeatureBatch(NamedTuple):
    """B samples of one shape: moments [B, 2 C, t, h, w], and `texts`. Nothing fails that was encoded before:
    `failures` is empty.

    `joined`: each feature of all texts end to end, and `sizes` of the parts. Each tensor that a worker hands
    over takes a file descriptor, so there are few.
    """

    moments: Tensor
    joined: Mapping[str, Tensor]
    sizes: Mapping[str, Sequence[int]]
    captions: tuple[str, ...]
    samples: tuple[Sample, ...]
    last: Tensor | None = None
    failures: tuple[Failure, ...] = ()

    @property
    def texts(self) -> list[dict[str, Tensor]]:
        """The features of each text, which have as many tokens as it has."""
        parts = {name: joined.split(list(self.sizes[name])) for name, joined in self.joined.items()}
        return [{name: part[place] for name, part in parts.items()} for place in range(len(self.captions))]


class FeatureDataset(Dataset[Features]):
    """The samples of a whole cache. `dataset[draw]` has the caption that training on the clips would draw.

    Nothing is read ahead, and an object sent to another process opens files of its own there. With
    `last_frames`, samples have those. Raises ValueError for a cache that is not finished or damaged, and for
    one without last frames, or without the captions that `use_aesthetic` asks for.

    Attributes: `samples`; `latent_channels`, C; `text_features`, the shapes of a text's features.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int,
        caption_dropout: float,
        use_aesthetic: bool,
        last_frames: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.description = check_fresh(self.folder, {})
        self.last_frames = last_frames
        if last_frames and not self.description.last_frames:
            raise ValueError(
                f"{self.folder} has no last frames of clips, which conditions.first_last needs: write a new "
                "cache with `osp cache` into another folder"
            )
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.samples: list[Sample] = []
        self._files: list[tuple[Path, int]] = []
        self._checksums: dict[Path, dict[str, int]] = {}
        channels: int | None = None
        files = _shards(self.folder, self.description, "videos")
        for file, (index, shapes) in zip(files, _read_indices(VideoIndex, files), strict=True):
            with damage(file):
                own = index.channels(
                    shapes, self.description.strides, last_frames=self.description.last_frames
                )
                channels = same_channels(channels, own)
            self._checksums[file] = index.checksums
            self.samples += [entry.sample() for entry in index.samples]
            self._files += [(file, place) for place in range(len(index.samples))]
        if channels is None:
            raise ValueError(f"{self.folder} has no samples: none of its clips could be read")
        self.latent_channels = channels
        known: Mapping[str, FeatureShape] | None = self.description.text_features
        files = _shards(self.folder, self.description, "texts")
        self._texts: dict[str, Path] = {}
        for file, (index, shapes) in zip(files, _read_indices(TextIndex, files), strict=True):
            with damage(file):
                known = index.features(shapes, known)
            self._checksums[file] = index.checksums
            self._texts |= dict.fromkeys(index.texts, file)
        self.text_features = known or {}
        self._open = OpenFiles()
        if use_aesthetic != self.description.use_aesthetic and any(
            sample.record.aesthetic is not None for sample in self.samples
        ):
            raise ValueError(
                f"{self.folder} was written with use_aesthetic {self.description.use_aesthetic}, so it has "
                "other captions: set data.use_aesthetic to that, or write a new cache with `osp cache`"
            )

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Frames, height and width in pixels of each sample."""
        return [sample.shape for sample in self.samples]

    def drop_rare(self, *, min_batches: int, global_batch: int) -> list[Sample]:
        """Leave out, and return, the samples of the shapes that `select` would drop for such batches.

        Raises ValueError if none is left.
        """
        counts = Counter(self.shapes)
        enough = samples_needed(counts.values(), min_batches=min_batches, global_batch=global_batch)
        dropped = [sample for sample in self.samples if counts[sample.shape] < enough]
        if len(dropped) == len(self.samples):
            raise ValueError(
                f"{self.folder}: no shape has the {enough} samples of a global batch, the most are "
                f"{max(counts.values())}: lower data.batch_size or optimizer.accumulate"
            )
        self.take([place for place, shape in enumerate(self.shapes) if counts[shape] >= enough])
        return dropped

    def take(self, places: Sequence[int]) -> None:
        """Have the samples at these places from now on, each as often as it is named."""
        self.samples = [self.samples[place] for place in places]
        self._files = [self._files[place] for place in places]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Draw) -> Features:
        sample = self.samples[draw.index]
        caption = caption_of(sample, draw, seed=self.seed, dropout=self.caption_dropout)
        file, place = self._files[draw.index]
        moments = self._tensor(file, video_name(place))
        last = self._tensor(file, last_name(place)) if self.last_frames else None
        return Features(moments, self._text(caption), caption, sample, last)

    def _text(self, caption: str) -> dict[str, Tensor]:
        key = text_key(caption)
        file = self._texts.get(key)
        if file is None:
            raise ValueError(f"{self.folder} is damaged: no file has the features of the caption {caption!r}")
        return {name: self._tensor(file, f"{key}.{name}") for name in self.text_features}

    def _tensor(self, file: Path, name: str) -> Tensor:
        return self._open.tensor(file, name, checksum=self._checksums[file].get(name))


def collate_features(items: Sequence[Features]) -> FeatureBatch:
    """One batch of samples of one shape."""
    names = items[0].text
    last = [item.last for item in items if item.last is not None]
    return FeatureBatch(
        moments=torch.stack([item.moments for item in items]),
        joined={name: torch.cat([item.text[name] for item in items]) for name in names},
        sizes={name: [len(item.text[name]) for item in items] for name in names},
        captions=tuple(item.caption for item in items),
        samples=tuple(item.sample for item in items),
        last=torch.stack(last) if last else None,
    )


def _shards(folder: Path, description: Description, kind: Kind) -> list[Path]:
    return [shard_path(folder, kind, shard) for shard in range(description.shards(kind))]


def _read_indices(kind: type[AnyIndex], paths: Sequence[Path]) -> list[tuple[AnyIndex, Shapes]]:
    with ThreadPoolExecutor(_READERS) as executor:
        return list(executor.map(partial(read_index, kind=kind), paths))


def _read_description(folder: Path) -> Description:
    path = folder / DESCRIPTION
    if not path.exists():
        raise ValueError(f"{folder} is no feature cache: it has no {DESCRIPTION}; `osp cache` writes one")
    description = Description.read_file(path)
    if description.version != VERSION:
        raise ValueError(
            f"{folder} has features of version {description.version}, this program reads version {VERSION}: "
            "write a new cache with `osp cache`"
        )
    return description


def _refuse_other_parts(folder: Path, description: Description, parts: Mapping[str, str]) -> None:
    changed = [
        f"{name} (was {_short(description.parts.get(name, 'not there'))}, is {_short(now)})"
        for name, now in parts.items()
        if not _same(description.parts.get(name), now)
    ]
    if changed:
        raise ValueError(
            f"{folder} is stale, it was written with another {', '.join(changed)}: write a new cache with "
            "`osp cache` into another folder, or go back to what this one was written with"
        )


def _same(was: str | None, now: str) -> bool:
    """Whether a part is the same: 24 is 24.0, however the settings have it."""
    if was is None or was == now:
        return was == now
    try:
        return float(was) == float(now)
    except ValueError:
        return False


def _short(value: str) -> str:
    return value if len(value) <= 2 * _SHOWN else value[:_SHOWN]


def _write_description(folder: Path, description: Description) -> None:
    text = json.dumps(description.model_dump(), indent=1) + "\n"  # ASCII
    with explain_disk_errors(folder / DESCRIPTION, whole=WHOLE):
        write_whole(folder / DESCRIPTION, lambda path: path.write_text(text))
