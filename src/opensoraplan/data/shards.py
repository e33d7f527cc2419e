"""One file of a feature cache: tensors and, in its header, an index of what they are with checksums of both.

Not here: the cache that the files make up, and the dataset that reads it (features.py). A file of videos has
NNNNN.moments [2 C, t, h, w] of each sample, with C latent channels, and in some caches NNNNN.last [2 C, 1, h,
w] of its last frame as a picture; one of texts has KEY.NAME of each text's feature NAME, see `text_key`.
"""

import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

import torch
from pydantic import Field, PlainValidator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opensoraplan.data.record import Record
from opensoraplan.data.selection import Sample
from opensoraplan.disk import explain_disk_errors, write_whole
from opensoraplan.documents import as_object, kind_of
from opensoraplan.fingerprint import fingerprint_file
from opensoraplan.settings import Settings
from opensoraplan.shapes import FeatureShape, Strides, latent_shape

Kind = Literal["videos", "texts"]
# In the order in which they are encoded.
KINDS: tuple[Kind, ...] = ("texts", "videos")

# What a failed write leaves.
WHOLE = "what was written before is whole"
# The one entry of a file's header: with more, safetensors writes them in any order.
_INDEX = "index"
# Before the index its checksum, in so many hexadecimal digits.
_DIGITS = 8
# Files that are kept open, of the thousand or so that a process may have.
_OPEN_FILES = 128


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {kind_of(value)}")
    return value


# Names of files may hold bytes that are not UTF-8, which pydantic's own text may not.
Text = Annotated[str, PlainValidator(_text)]
Count = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=1)]
# Of tensors, by their names.
Shapes = Mapping[str, Sequence[int]]


class LeftOut(NamedTuple):
    """A clip that is not in the cache, and why."""

    path: Text
    error: Text


class KnownFile(NamedTuple):
    """What tells whether a clip's file is the one that was encoded: its size in bytes, the times when its
    content and its status changed last, and a hash of its content (see `fingerprint_file`).
    """

    size: int
    modified_ns: int
    changed_ns: int
    content: Text

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


class PlacedFile(NamedTuple):
    """A clip's file, with the place of its sample in the whole cache."""

    place: Count
    size: int
    modified_ns: int
    changed_ns: int
    content: Text


class SampleEntry(Settings):
    """What the index has of a sample."""

    index: Count
    path: Text
    captions: list[Text]
    aesthetic: float | None
    shape: Annotated[list[Side], Field(min_length=3, max_length=3)]

    @classmethod
    def of(cls, sample: Sample) -> Self:
        record = sample.record
        return cls(
            index=sample.index,
            path=str(record.path),
            captions=list(record.captions),
            aesthetic=record.aesthetic,
            shape=list(sample.shape),
        )

    def sample(self) -> Sample:
        frames, height, width = self.shape
        record = Record(Path(self.path), tuple(self.captions), aesthetic=self.aesthetic)
        return Sample(self.index, record, num_frames=frames, height=height, width=width)


class VideoIndex(Settings):
    """What is in a file of videos: samples, in the order of their tensors; their files, which the first
    caches do not know, as they do not know checksums; and the clips that could not be read.
    """

    checksums: dict[str, int] = Field(default={})
    samples: list[SampleEntry]
    files: list[PlacedFile] = Field(default=[])
    left_out: list[LeftOut]

    def channels(self, shapes: Shapes, strides: Strides, *, last_frames: bool) -> int | None:
        """C, None without samples. Raises ValueError unless each sample has moments of so many channels, of
        its size by `strides`, and with `last_frames` those of its last frame.
        """
        channels: int | None = None
        for place, sample in enumerate(self.samples):
            name, size = video_name(place), " x ".join(map(str, sample.shape))
            shape = shapes.get(name, ())
            try:
                grid = latent_shape(*sample.shape, strides=strides, patch=1)
            except ValueError as error:
                raise ValueError(f"samples.{place}.shape: {error}") from None
            if len(shape) != 4 or shape[0] % 2 or tuple(shape[1:]) != tuple(grid):
                wanted = f"[2 C, {', '.join(map(str, grid))}]"
                raise ValueError(f"{name}: {size} pixels have moments {wanted}, got {_shown(shape)}")
            channels = same_channels(channels, shape[0] // 2)
            last = shapes.get(last_name(place), ())
            if last_frames and tuple(last) != (shape[0], 1, *shape[2:]):
                wanted = f"[{shape[0]}, 1, {shape[2]}, {shape[3]}]"
                raise ValueError(f"{last_name(place)}: must be {wanted}, got {_shown(last)}")
        return channels


class TextIndex(Settings):
    """What is in a file of texts: their keys, in the order of their tensors."""

    checksums: dict[str, int] = Field(default={})
    texts: list[Text]

    def features(
        self, shapes: Shapes, known: Mapping[str, FeatureShape] | None
    ) -> Mapping[str, FeatureShape]:
        """The features that each text has: those that are `known`; None, of a cache that does not say it:
        "sequence" and "pooled", as wide as the first text's. Raises ValueError for a text without all of them
        in these shapes.
        """
        if known is None:
            first = next(iter(self.texts), "")
            sequence, pooled = (shapes.get(f"{first}.{name}") or [0] for name in ("sequence", "pooled"))
            known = {"sequence": (None, sequence[-1]), "pooled": (pooled[-1],)}
        for key in self.texts:
            for name, wanted in known.items():
                found = shapes.get(f"{key}.{name}", ())
                if len(found) != len(wanted) or not all(map(_is_side, found, wanted)):
                    raise ValueError(f"{key}.{name}: must be {_shown(wanted)}, got {_shown(found)}")
        return known


AnyIndex = TypeVar("AnyIndex", VideoIndex, TextIndex)


def same_channels(before: int | None, now: int | None) -> int | None:
    """The number of channels, if one of the two is not known or both are the same; else raises ValueError."""
    if None not in (before, now) and before != now:
        raise ValueError(f"moments: of {now} channels here, of {before} before")
    return before if now is None else now


def _is_side(found: int, wanted: int | None) -> bool:
    return found > 0 if wanted is None else found == wanted


def _shown(shape: Sequence[int | None]) -> str:
    return f"[{', '.join('L' if side is None else str(side) for side in shape)}]" if shape else "none"


def text_key(text: str) -> str:
    """The name of a text in the files: a hash of it."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def video_name(place: int) -> str:
    """The name of the moments of sample number `place` of a file."""
    return f"{place:05d}.moments"


def last_name(place: int) -> str:
    """The name of the moments of that sample's last frame."""
    return f"{place:05d}.last"


def shard_path(folder: Path, kind: Kind, shard: int) -> Path:
    return folder / f"{kind}-{shard:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor], index: VideoIndex | TextIndex) -> None:
    """Write a file, or nothing at all. Raises ValueError in plain words for a disk that is full or cannot
    be written to.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {name: _checksum(tensor) for name, tensor in plain.items()}
    # Not by pydantic, whose text is UTF-8.
    text = json.dumps({**index.model_dump(exclude={"checksums"}), "checksums": checksums})
    metadata = {_INDEX: _text_checksum(text) + text}
    with explain_disk_errors(path, whole=WHOLE):
        write_whole(path, lambda file: save_file(plain, file, metadata=metadata))


def read_index(path: Path, kind: type[AnyIndex]) -> tuple[AnyIndex, Shapes]:
    """The index of a file, and the shapes of all its tensors by their names. Raises ValueError, which names
    the file and what is wrong in it, for one that is missing, cut off or none of ours.
    """
    with damage(path), safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_INDEX)
        if text is None:
            raise ValueError("its header has no index")
        if not text.startswith("{"):  # as the first version wrote it
            checksum, text = text[:_DIGITS], text[_DIGITS:]
            if checksum != _text_checksum(text):
                raise ValueError("the bytes of its header have changed")
        try:
            content = json.loads(text)  # numbers that are not finite are told with their fields below
        except RecursionError:
            raise ValueError("its index is nested too deeply") from None
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        index = kind.read(as_object(content, where="its index"), where="its index", strict=True)
        if whole := [name for name, one in slices.items() if not one.get_dtype().startswith(("F", "BF"))]:
            raise ValueError(f"{whole[0]}: must be of floating point, got {slices[whole[0]].get_dtype()}")
        return index, {name: one.get_shape() for name, one in slices.items()}


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """What goes wrong in the block becomes a ValueError that names the file, and says what to do."""
    try:
        yield
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({error}): delete it, then `osp cache --out {path.parent}` with "
            "the same settings writes it again"
        ) from None


class OpenFiles:
    """Tensors of files that stay open, the most recent ones. In another process it starts with none."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._files: OrderedDict[Path, Any] = OrderedDict()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return OpenFiles, ()

    def tensor(self, path: Path, name: str, *, checksum: int | None) -> Tensor:
        """Raises ValueError for one whose bytes are not those that were written."""
        if self._process != os.getpid():
            self._process, self._files = os.getpid(), OrderedDict()
        with damage(path):
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            tensor = self._files[path].get_tensor(name)
            if checksum not in (None, _checksum(tensor)):
                raise ValueError(f"the bytes of {name} have changed")
        return tensor


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _text_checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):0{_DIGITS}x}"
