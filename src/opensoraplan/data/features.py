"""Features that were encoded before training: the folder that `osp cache` fills, and a dataset that reads it.

No models here; encoding is in train/inputs/cache.py. C latent channels, L text tokens, D and P the widths of
the T5 and CLIP states. The folder has

    features.json               what it was made from, part by part
    videos-00000.safetensors    posterior moments [2 C, t, h, w] of so many samples in a row; in the header
                                what is known of each sample, of its file, and of those that could not be read
    texts-00000.safetensors     KEY.sequence [L, D] and KEY.pooled [P] of so many texts; see `text_key`

Headers have checksums of the tensors and of themselves.
"""

import hashlib
import json
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from opensoraplan.data.buckets import Draw
from opensoraplan.data.dataset import Failure, caption_of
from opensoraplan.data.record import Record
from opensoraplan.data.selection import Sample, samples_needed
from opensoraplan.disk import OWN, clear_dead, plain_errors, write_whole
from opensoraplan.documents import as_object, parse_json
from opensoraplan.fingerprint import fingerprint_file
from opensoraplan.settings import Settings

DESCRIPTION = "features.json"
# Of what a cache has. Before 2, captions were cleaned a little otherwise and had other sentences on quality.
VERSION = 2

# The one entry of a shard's header: with more, safetensors writes them in any order.
_INDEX = "index"
# In it, of each tensor; before it, of the index itself, in so many hexadecimal digits.
_CHECKSUMS, _DIGITS = "checksums", 8
# Of clips in a message.
_NAMED = 5
# What a failed write leaves.
_WHOLE = "what was written before is whole"
# Files that are kept open, of the thousand or so that a process may have.
_OPEN_FILES = 128
# Threads that read headers: on a network disk they wait for it most of the time.
_READERS = 16
# Letters of a hash that a message shows.
_SHOWN = 8

Kind = Literal["videos", "texts"]
# In the order in which they are encoded.
KINDS: tuple[Kind, ...] = ("texts", "videos")


class LeftOut(NamedTuple):
    """A clip that is not in the cache, and why."""

    path: str
    error: str


class KnownFile(NamedTuple):
    """What tells whether a clip's file is the one that was encoded: its size in bytes, the times when its
    content and its status changed last, and a hash of its content (see `fingerprint_file`).
    """

    size: int
    modified_ns: int
    changed_ns: int
    content: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Raises OSError for a file that cannot be read."""
        status = path.stat()  # first: what changes meanwhile is seen the next time
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, fingerprint_file(path))

    def is_at(self, path: Path) -> bool:
        """Whether this content is at `path` still; it is read if the times are others."""
        try:
            status = path.stat()
            if (status.st_size, status.st_mtime_ns, status.st_ctime_ns) == self[:3]:
                return True
            return status.st_size == self.size and fingerprint_file(path) == self.content
        except OSError:
            return False


class Description(Settings):
    """What a cache was made from and how it is divided; all of it is known before the first shard.

    `parts` are fingerprints of all that the features depend on, under names for messages. `vae` is the VAE's
    config (with the latents' shift and scale). `left_out` is None until every shard is there.
    """

    version: int = VERSION
    parts: dict[str, str]
    vae: dict[str, Any]
    use_aesthetic: bool
    samples: int
    texts: int
    videos_per_shard: int
    texts_per_shard: int
    left_out: tuple[LeftOut, ...] | None = None

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


def text_key(text: str) -> str:
    """The name of a text in the shards: a hash of it."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def shard_path(folder: Path, kind: Kind, shard: int) -> Path:
    return folder / f"{kind}-{shard:05d}.safetensors"


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
        with plain_errors(folder, whole=_WHOLE):
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
        if name != "left_out" and was != now:
            raise ValueError(f"{folder} has a cache with {name} {was}, not {now}: give another folder")


def is_written(folder: Path, kind: Kind, shard: int) -> bool:
    """Whether that file is there and whole."""
    try:
        _header(shard_path(folder, kind, shard))
    except ValueError:
        return False
    return True


def write_videos(
    folder: Path,
    shard: int,
    moments: Sequence[tuple[Sample, Tensor]],
    *,
    files: Mapping[int, KnownFile] = MappingProxyType({}),
    left_out: Sequence[LeftOut] = (),
) -> None:
    """Write samples with their moments [2 C, t, h, w] as file number `shard`, or nothing at all.

    `files`: the clips' files as they were read, by the samples' places in the whole cache, in their order.

    Raises ValueError in plain words for a disk that is full or cannot be written to.
    """
    index = {
        "samples": [
            {
                "index": sample.index,
                "path": str(sample.record.path),
                "captions": sample.record.captions,
                "aesthetic": sample.record.aesthetic,
                "shape": sample.shape,
            }
            for sample, _ in moments
        ],
        "files": [(place, *file) for place, file in files.items()],
        "left_out": left_out,
    }
    tensors = {_video_name(place): tensor for place, (_, tensor) in enumerate(moments)}
    _write_shard(shard_path(folder, "videos", shard), tensors, index)


def write_texts(folder: Path, shard: int, states: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write texts with their states [L, D] and [P] as file number `shard`; as `write_videos` does."""
    tensors: dict[str, Tensor] = {}
    for text, (sequence, pooled) in states.items():
        key = text_key(text)
        tensors |= {f"{key}.sequence": sequence, f"{key}.pooled": pooled}
    _write_shard(shard_path(folder, "texts", shard), tensors, {"texts": [text_key(text) for text in states]})


def changed_clips(folder: Path, samples: Sequence[Sample], shards: Iterable[int]) -> dict[int, list[Path]]:
    """The clips in these files of videos that are others now, by the number of the file. `samples`: all that
    the cache was made of, as they are now. Caches of earlier versions do not know their files.
    """

    def changed(shard: int) -> list[Path]:
        known = _header(shard_path(folder, "videos", shard)).get("files", [])
        files = {samples[place].record.path: KnownFile(*file) for place, *file in known}
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
    headers = _in_threads(_header, [shard_path(folder, "videos", shard) for shard in shards])
    return [LeftOut(*entry) for header in headers for entry in header["left_out"]]


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
    """A sample: moments [2 C, t, h, w], and of the caption drawn the states [L, D] and pooled [P]."""

    moments: Tensor
    sequence: Tensor
    pooled: Tensor
    caption: str
    sample: Sample


class FeatureBatch(NamedTuple):
    """B samples of one shape: moments [B, 2 C, t, h, w], sequence [B, L, D] with zeros after a text's end,
    mask [B, L] (True: a token), pooled [B, P]. Nothing fails that was encoded before: `failures` is empty.
    """

    moments: Tensor
    sequence: Tensor
    mask: Tensor
    pooled: Tensor
    captions: tuple[str, ...]
    samples: tuple[Sample, ...]
    failures: tuple[Failure, ...] = ()


class FeatureDataset(Dataset[Features]):
    """The samples of a whole cache. `dataset[draw]` has the caption that training on the clips would draw.

    Nothing is read ahead, and an object sent to another process opens files of its own there. Raises
    ValueError for a cache that is not finished or damaged, and for one without the captions that
    `use_aesthetic` asks for.
    """

    def __init__(self, folder: str | Path, *, seed: int, caption_dropout: float, use_aesthetic: bool) -> None:
        self.folder = Path(folder)
        self.description = check_fresh(self.folder, {})
        self.seed = seed
        self.caption_dropout = caption_dropout
        self.samples: list[Sample] = []
        self._files: list[tuple[Path, str]] = []
        self._checksums: dict[Path, dict[str, int]] = {}
        files = _shards(self.folder, self.description, "videos")
        for file, index in zip(files, _in_threads(_header, files), strict=True):
            self._checksums[file] = index.get(_CHECKSUMS, {})
            self.samples += [_sample(entry) for entry in index["samples"]]
            self._files += [(file, _video_name(place)) for place in range(len(index["samples"]))]
        if not self.samples:
            raise ValueError(f"{self.folder} has no samples: none of its clips could be read")
        files = _shards(self.folder, self.description, "texts")
        self._texts: dict[str, Path] = {}
        for file, index in zip(files, _in_threads(_header, files), strict=True):
            self._checksums[file] = index.get(_CHECKSUMS, {})
            self._texts |= dict.fromkeys(index["texts"], file)
        self._open = _OpenFiles()
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

    @property
    def widths(self) -> tuple[int, int, int]:
        """C, D and P: what the denoiser must take. They are read from the first sample."""
        moments = self._tensor(*self._files[0])
        sequence, pooled = self._states("")
        return moments.shape[0] // 2, sequence.shape[1], pooled.shape[0]

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
        moments = self._tensor(*self._files[draw.index])
        return Features(moments, *self._states(caption), caption, sample)

    def _states(self, caption: str) -> tuple[Tensor, Tensor]:
        key = text_key(caption)
        file = self._texts[key]
        return self._tensor(file, f"{key}.sequence"), self._tensor(file, f"{key}.pooled")

    def _tensor(self, file: Path, name: str) -> Tensor:
        """Raises ValueError for one whose bytes are not those that were written."""
        tensor = self._open.tensor(file, name)
        with _damage(file):
            if self._checksums[file].get(name, checksum := _checksum(tensor)) != checksum:
                raise ValueError(f"the bytes of {name} have changed")
        return tensor


def collate_features(items: Sequence[Features]) -> FeatureBatch:
    """One batch of samples of one shape. L is the longest text's length."""
    longest = max(len(item.sequence) for item in items)
    lengths = torch.tensor([len(item.sequence) for item in items])
    return FeatureBatch(
        moments=torch.stack([item.moments for item in items]),
        sequence=pad_sequence([item.sequence for item in items], batch_first=True),
        mask=torch.arange(longest) < lengths[:, None],
        pooled=torch.stack([item.pooled for item in items]),
        captions=tuple(item.caption for item in items),
        samples=tuple(item.sample for item in items),
    )


class _OpenFiles:
    """Tensors of files that stay open, the most recent ones. In another process it starts with none."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._files: OrderedDict[Path, Any] = OrderedDict()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _OpenFiles, ()

    def tensor(self, path: Path, name: str) -> Tensor:
        if self._process != os.getpid():
            self._process, self._files = os.getpid(), OrderedDict()
        with _damage(path):
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return self._files[path].get_tensor(name)


def _sample(entry: Mapping[str, Any]) -> Sample:
    frames, height, width = entry["shape"]
    record = Record(Path(entry["path"]), tuple(entry["captions"]), aesthetic=entry["aesthetic"])
    return Sample(entry["index"], record, num_frames=frames, height=height, width=width)


def _video_name(place: int) -> str:
    return f"{place:05d}.moments"


def _shards(folder: Path, description: Description, kind: Kind) -> list[Path]:
    return [shard_path(folder, kind, shard) for shard in range(description.shards(kind))]


def _in_threads(read: Callable[[Path], dict[str, Any]], paths: Sequence[Path]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(_READERS) as executor:
        return list(executor.map(read, paths))


def _header(path: Path) -> dict[str, Any]:
    """The index in a shard's header; ValueError for a file that is missing, cut off or none of ours."""
    with _damage(path), safe_open(path, framework="pt") as file:
        text = (file.metadata() or {})[_INDEX]
        if not text.startswith("{"):  # as the first version wrote it
            checksum, text = text[:_DIGITS], text[_DIGITS:]
            if checksum != _text_checksum(text):
                raise ValueError("the bytes of its header have changed")
        return as_object(parse_json(text, where=_INDEX), where=_INDEX)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _text_checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):0{_DIGITS}x}"


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({error}): delete it, then `osp cache --out {path.parent}` with "
            "the same settings writes it again"
        ) from None


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
    with plain_errors(folder / DESCRIPTION, whole=_WHOLE):
        write_whole(folder / DESCRIPTION, lambda path: path.write_text(text))


def _write_shard(path: Path, tensors: Mapping[str, Tensor], index: Mapping[str, object]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {name: _checksum(tensor) for name, tensor in plain.items()}
    text = json.dumps({**index, _CHECKSUMS: checksums})
    metadata = {_INDEX: _text_checksum(text) + text}
    with plain_errors(path, whole=_WHOLE):
        write_whole(path, lambda file: save_file(plain, file, metadata=metadata))
