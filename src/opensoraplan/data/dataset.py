"""Samples as tensors and captions, for a DataLoader: a file that cannot be read costs another sample,
not the run.

Not here: which samples there are (selection.py) and when each has its turn (buckets.py).
"""

import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import av.error
import torch
from torch.utils.data import Dataset

from opensoraplan.data.buckets import Draw, VideoShape
from opensoraplan.data.record import Record
from opensoraplan.data.selection import Sample
from opensoraplan.data.video import Reader, TooShortError, fit, installed_reader, read_numbered, scale_and_cut

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

# How many samples are tried for one position in a batch.
_ATTEMPTS = 5
# Most samples of the same shape among which replacements are drawn.
_CONSIDERED = 1000
# Files that were cut without re-encoding may claim up to this many frames more than can be decoded.
_CLAIMED = 16


class Failure(NamedTuple):
    """A file that could not be read, and why."""

    path: Path
    message: str


@dataclass
class Clip:
    """`video` float32 [3, T, H, W] in [-1, 1] of `sample`. `failures`: files that were tried before it."""

    video: torch.Tensor
    caption: str
    sample: Sample
    failures: tuple[Failure, ...]


@dataclass
class Batch:
    """Clips of one shape: `video` float32 [B, 3, T, H, W] in [-1, 1]."""

    video: torch.Tensor
    captions: tuple[str, ...]
    failures: tuple[Failure, ...]


def all_captions(sample: Sample) -> tuple[str, ...]:
    """All captions that `caption_of` may choose for a sample, without dropout; "" if it has none."""
    return sample.record.captions or ("",)


def caption_of(sample: Sample, draw: Draw, *, seed: int, dropout: float) -> str:
    """One of `all_captions`, or "" with probability `dropout`; depends on (seed, epoch, index) of `draw`."""
    chance = _chance("caption", seed, draw)
    if chance.random() < dropout:
        return ""
    return chance.choice(all_captions(sample))


class UnreadableClipError(ValueError):
    """Neither a clip nor any of its replacements can be read."""


class ClipDataset(Dataset[Clip]):
    """Clips by `Draw`. The same draw is always the same clip, in any process.

    With `new_windows`, a clip longer than its sample begins elsewhere in each epoch. `caption_dropout`: see
    `caption_of`. In place of a file that cannot be read comes another sample of the same shape, up to five in
    all (`replace`); then UnreadableClipError. A window that ends a few frames behind the last one that
    decodes is moved there.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        seed: int,
        new_windows: bool = True,
        caption_dropout: float = 0.1,
        reader: Reader = "pyav",
        replace: bool = True,
    ) -> None:
        self._samples = samples
        self._replace = replace
        self._seed = seed
        self._new_windows = new_windows
        self._caption_dropout = caption_dropout
        # Here, so that a missing reader is logged once and not by every worker.
        self._reader: Reader = installed_reader(reader)
        self._same: dict[VideoShape, list[int]] = {}
        for index, sample in enumerate(samples):
            self._same.setdefault(sample.shape, []).append(index)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, draw: Draw) -> Clip:
        failures: list[Failure] = []
        for index in islice(self._candidates(draw), _ATTEMPTS if self._replace else 1):
            sample = self._place_window(draw._replace(index=index))
            try:
                video = self._read(sample)
            except (OSError, ValueError, av.error.FFmpegError) as error:
                path, message = sample.record.path, str(error)
                failures.append(Failure(path, message if str(path) in message else f"{path}: {message}"))
                continue
            caption = caption_of(sample, draw, seed=self._seed, dropout=self._caption_dropout)
            return Clip(video, caption, sample, tuple(failures))
        shape = "x".join(map(str, self._samples[draw.index].shape))
        raise UnreadableClipError(
            f"none of {len(failures)} clips of {shape} can be read: "
            + "; ".join(failure.message for failure in failures)
        )

    def _candidates(self, draw: Draw) -> Iterator[int]:
        """Yield the sample drawn, then others of its shape: other files first, since mostly a whole
        file is damaged.
        """
        yield draw.index
        same = self._same[self._samples[draw.index].shape]
        others = _chance("another", self._seed, draw).sample(same, min(_CONSIDERED, len(same)))
        files, again = {self._samples[draw.index].record.path}, []
        for index in others:
            path = self._samples[index].record.path
            if path not in files:
                files.add(path)
                yield index
            elif index != draw.index:
                again.append(index)
        yield from again

    def _place_window(self, draw: Draw) -> Sample:
        """The sample with this epoch's window."""
        sample = self._samples[draw.index]
        if not self._new_windows or sample.windows == 1:
            return sample
        return sample.at(_chance("window", self._seed, draw).randrange(sample.windows))

    def _read(self, sample: Sample) -> torch.Tensor:
        record, numbers = sample.record, sample.frame_numbers
        try:
            frames = self._read_numbered(record, numbers)
        except TooShortError as error:
            # The manifest may have the length that the file claims: move the window into what decodes.
            over, start = numbers[-1] + 1 - error.frames, 0 if record.cut is None else record.cut[0]
            if over > _CLAIMED or numbers[0] - over < start:
                raise
            frames = self._read_numbered(record, [number - over for number in numbers])
        if sample.framing is None:
            return fit(frames, height=sample.height, width=sample.width)
        _check_aspect(frames, record)
        return scale_and_cut(frames, sample.framing)

    def _read_numbered(self, record: Record, numbers: Sequence[int]) -> torch.Tensor:
        # Not every reader takes pictures.
        reader: Reader = "pyav" if record.is_image else self._reader
        rate = record.fps if record.variable else None
        return read_numbered(record.path, numbers, crop=record.crop, reader=reader, rate=rate)


def iter_readable(
    dataset: Dataset[Item], count: int, *, agree: Callable[[bool], bool] = bool
) -> Iterator[tuple[Draw, Item]]:
    """The first `count` items, to measure something on, without those that cannot be read, each of which is
    warned of. Raises ValueError if none can. `agree`: whether any of several processes could not read one,
    which all of them then leave out.
    """
    read = 0
    for index in range(count):
        place = Draw(index=index, epoch=0, step=0, slot=index)
        item = None
        try:
            item = dataset[place]
        except UnreadableClipError as error:
            logger.warning("skipped an unreadable clip: %s", error)
        if agree(item is None):
            continue
        assert item is not None
        read += 1
        yield place, item
    if not read:
        raise ValueError(f"none of the {count} clips can be read")


def collate(clips: Sequence[Clip]) -> Batch:
    """A DataLoader's collate_fn: clips of one shape as a batch."""
    return Batch(
        video=torch.stack([clip.video for clip in clips]),
        captions=tuple(clip.caption for clip in clips),
        failures=tuple(failure for clip in clips for failure in clip.failures),
    )


class BadFiles:
    """Counts unreadable files in the main process: warns once of each and allows `limit` of them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._messages: dict[Path, str] = {}

    def __len__(self) -> int:
        """Number of different unreadable files."""
        return len(self._messages)

    def add(self, failures: Iterable[Failure]) -> None:
        """Add failures. Raises ValueError with all of them if there are now more than the limit."""
        for path, message in failures:
            if path not in self._messages:
                self._messages[path] = message
                logger.warning("replaced an unreadable clip by another one: %s", message)
        if len(self) > self._limit:
            raise ValueError(
                f"{len(self)} files cannot be read, {self._limit} are allowed: "
                + "; ".join(self._messages.values())
            )


def _check_aspect(frames: torch.Tensor, record: Record) -> None:
    """Raise ValueError if scaling frames [T, H, W, 3] as planned for the record's size would distort them."""
    height, width = frames.shape[1:3]
    assert record.height is not None
    assert record.width is not None
    if abs(height * record.width - width * record.height) > max(height, width):
        raise ValueError(
            f"{record.path} is {height} x {width} (height x width), the manifest says "
            f"{record.height} x {record.width}"
        )


def _chance(purpose: str, seed: int, draw: Draw) -> random.Random:
    """A random generator for one purpose, seeded by sample and epoch."""
    key = f"{purpose} {seed} {draw.epoch} {draw.index}".encode()
    return random.Random(int.from_bytes(hashlib.sha256(key).digest()[:8]))
