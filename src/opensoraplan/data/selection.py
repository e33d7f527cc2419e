"""Selects the records to train on, with their frames and size, and says why others are dropped:
the original's rules.

Pure arithmetic on records, no file is opened. buckets.py makes batches.
"""

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from opensoraplan.data.record import Record
from opensoraplan.data.sizes import Framing, frame_five_ratios, frame_freely
from opensoraplan.settings import Settings
from opensoraplan.shapes import SIDE_MULTIPLE, TEMPORAL_STRIDE

# Frame rates that differ by less are the same, so that 23.976 is not resampled to 24.
_SAME_FPS = 0.1
# Examples of a reason in messages and reports.
EXAMPLES = 3


class Reason(StrEnum):
    """Why a record is dropped. The value is a short name; `sentence` explains it."""

    UNREADABLE = "unreadable"
    NO_CAPTION = "no caption"
    NO_SIZE = "no size"
    NO_LENGTH = "no length"
    ASPECT = "aspect ratio"
    TOO_SMALL = "too small"
    TOO_LONG = "too long"
    LOW_FPS = "low fps"
    TOO_SHORT = "too short"
    SHORT = "short"
    RARE_SHAPE = "rare shape"

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES: Mapping[Reason, str] = {
    Reason.UNREADABLE: "the file is missing or damaged, or not what the manifest says of it",
    Reason.NO_CAPTION: "neither cap, caption or text, nor a .txt file of the same name",
    Reason.NO_SIZE: "height or width is unknown, and was not looked up in the file",
    Reason.NO_LENGTH: "num_frames or fps is unknown, and was not looked up in the file",
    Reason.ASPECT: "height / width is outside min_h_div_w_ratio .. max_h_div_w_ratio",
    Reason.TOO_SMALL: "fewer pixels than min_hxw asks for",
    Reason.TOO_LONG: "more than too_long_factor times the frames wanted",
    Reason.LOW_FPS: "fewer frames a second than train_fps",
    Reason.TOO_SHORT: "no valid number of frames (8k + 1) from min_num_frames on fits into it",
    Reason.SHORT: "fewer than num_frames, and drawn by drop_short_ratio",
    Reason.RARE_SHAPE: "too few of its shape to fill min_batches global batches (batch_size x accumulate)",
}


class SelectionSettings(Settings):
    """Which clips to train on, at which size. Names and defaults are those of the guide's data.json."""

    num_frames: int = Field(default=121, ge=1, le=2**16)
    """Most frames of a sample, 8k + 1. Longer clips give a random window of this many frames."""
    frame_interval: Literal[1] = 1
    """Kept for the original's files, must be 1. `train_fps` reduces the frame rate."""
    train_fps: float = Field(default=24, gt=0, le=1000)
    """Frame rate to train at. Faster clips are reduced to it, slower ones dropped."""
    speed_factor: float = Field(default=1.0, ge=1, le=1000)
    """Most that a long clip may be sped up to show more of it. 1 is real time."""
    too_long_factor: float = Field(default=5.0, ge=1, le=10**6)
    """Clips longer than this many times `num_frames` are dropped. Raise it to keep long clips."""
    drop_short_ratio: float = Field(default=1.0, ge=0, le=1)
    """Probability of dropping a clip shorter than `num_frames`. 0 keeps them all."""
    min_num_frames: int = Field(default=29, ge=1, le=2**16)
    """Fewest frames of a video sample. Images always have 1."""
    max_height: int = Field(default=576, ge=1, le=2**16)
    """Height of every sample, with `force_resolution`. Otherwise part of the default of `max_hxw`."""
    max_width: int = Field(default=1024, ge=1, le=2**16)
    """Width of every sample, with `force_resolution`. Otherwise part of the default of `max_hxw`."""
    max_hxw: int | None = Field(default=None, ge=1, le=2**32)
    """Most pixels of a frame, without `force_resolution`; None is max_height * max_width."""
    min_hxw: int | None = Field(default=None, ge=1, le=2**32)
    """Fewest pixels of a frame, before and after scaling; None is max_height * max_width with
    `force_resolution`, else no limit. Lower it to keep small clips.
    """
    force_resolution: bool = True
    """Scale and crop all clips to max_height x max_width. Switch it off to keep aspect ratios."""
    force_5_ratio: bool = False
    """Scale and crop each clip to the nearest of the ratios 9:16, 3:4, 1:1, 4:3 and 16:9."""
    max_h_div_w_ratio: float = Field(default=1.0, gt=0, le=1000)
    """Largest height / width of a clip; others are dropped. Raise it to keep portrait clips."""
    min_h_div_w_ratio: float = Field(default=0.42, gt=0, le=1000)
    """Smallest height / width of a clip; others are dropped. Lower it to keep very wide clips."""
    hw_stride: int = Field(default=SIDE_MULTIPLE, ge=1, le=2**16)
    """Sides of samples are multiples of this. Without `force_resolution`, frames are scaled, then cropped."""
    ae_stride_t: int = Field(default=TEMPORAL_STRIDE, ge=1, le=2**16)
    """Frames of samples are 1 + a multiple of this, which is the VAE's temporal stride."""
    sequence_parallel: int = Field(default=1, ge=1, le=2**16)
    """Latent frames of a video are a multiple of this. Kept for the original's files; `parallel.sp` needs no
    change of it.
    """
    min_batches: int = Field(default=4, ge=1, le=10**6)
    """Shapes with fewer global batches are dropped; if that drops all, only those with less than one. Lower
    it for small data sets.
    """

    @property
    def smallest_area(self) -> int:
        """min_hxw, or its default."""
        if self.min_hxw is not None:
            return self.min_hxw
        return self.max_height * self.max_width if self.force_resolution else 1

    @property
    def largest_area(self) -> int:
        """max_hxw, or its default."""
        return self.max_height * self.max_width if self.max_hxw is None else self.max_hxw

    @property
    def largest_size(self) -> tuple[int, int]:
        """Height and width of the largest samples; if several are possible, the size nearest to square."""
        if self.force_resolution:
            return self.max_height, self.max_width
        side = math.isqrt(self.largest_area) // self.hw_stride * self.hw_stride
        return side, side

    def sample_frames(self, frames: int) -> int:
        """The largest valid number of frames for a sample from a clip with `frames`; 0 if there is none."""
        unit = self.ae_stride_t * self.sequence_parallel
        # With k + 1 = j P latent frames, the pixel frames 8 k + 1 are 8 P j - 7.
        return max(0, (frames + self.ae_stride_t - 1) // unit * unit - self.ae_stride_t + 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_strides(self)
        _check_frames(self)
        _check_sizes(self)
        return self


def _check_strides(settings: SelectionSettings) -> None:
    for name, value, unit in (
        ("hw_stride", settings.hw_stride, SIDE_MULTIPLE),
        ("ae_stride_t", settings.ae_stride_t, TEMPORAL_STRIDE),
    ):
        if value % unit:
            nearest = max(unit, round(value / unit) * unit)
            raise ValueError(f"{name} must be a multiple of {unit}, got {value}: use {nearest}")


def _check_frames(settings: SelectionSettings) -> None:
    wanted, fewest = settings.num_frames, settings.min_num_frames
    # Training on images, for which min_num_frames has no effect.
    if wanted == 1:
        return
    below = settings.sample_frames(wanted)
    if below >= fewest:
        return
    unit = settings.ae_stride_t * settings.sequence_parallel
    above = settings.sample_frames(max(wanted, fewest) + unit - 1)
    rule = f"1 + a multiple of {settings.ae_stride_t}" + (
        f", in latent frames a multiple of {settings.sequence_parallel}"
        if settings.sequence_parallel > 1
        else ""
    )
    nearest = f"the nearest are {below} and {above}" if below else f"the fewest are {above}"
    lower = f"min_num_frames {below} or " if below else ""
    raise ValueError(
        f"num_frames {wanted} with min_num_frames {fewest} drops every video: frames are {rule}, "
        f"{nearest}: use {lower}num_frames {above}"
    )


def _check_sizes(settings: SelectionSettings) -> None:
    low, high = settings.min_h_div_w_ratio, settings.max_h_div_w_ratio
    if low > high:
        raise ValueError(f"min_h_div_w_ratio {low:g} is above max_h_div_w_ratio {high:g}: no clip is between")
    if settings.force_resolution:
        if settings.force_5_ratio:
            raise ValueError(
                "force_resolution and force_5_ratio exclude each other: set one of them to false"
            )
        stride = settings.hw_stride
        sides = (settings.max_height, settings.max_width)
        if any(side % stride for side in sides):
            nearest = " x ".join(str(max(stride, round(side / stride) * stride)) for side in sides)
            raise ValueError(
                f"max_height x max_width must be multiples of hw_stride {stride}, got "
                f"{sides[0]} x {sides[1]}: the nearest valid size is {nearest}"
            )
    elif settings.smallest_area > settings.largest_area:
        least, most = settings.smallest_area, settings.largest_area
        raise ValueError(
            f"min_hxw {least} is above max_hxw {most} and drops every clip: use min_hxw up to {most}"
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """A record to train on, as `num_frames` frames of `height` x `width` pixels.

    `index` is the record's position in the manifest. The frames are chosen in three steps: every `step`th
    frame of the file from `start` on gives `resampled` frames; these are thinned evenly to `thinned` (the
    same number unless the clip is sped up); of these, a window of `num_frames` frames starts at `window`,
    which is below `windows`. `framing`: how frames are scaled and cropped; None (force_resolution): they are
    cropped to the aspect ratio of `height` x `width` and scaled to it.
    """

    index: int
    record: Record
    num_frames: int
    height: int
    width: int
    start: int = 0
    step: float = 1.0
    resampled: int = 1
    thinned: int = 1
    window: int = 0
    windows: int = 1
    framing: Framing | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels; samples of one shape can share a batch."""
        return self.num_frames, self.height, self.width

    @property
    def frame_numbers(self) -> tuple[int, ...]:
        """Numbers of the file's frames to read, from 0, in ascending order."""
        last = self.thinned - 1
        places = range(self.window, self.window + self.num_frames)
        if self.thinned < self.resampled:
            places = [place * (self.resampled - 1) // last if last else 0 for place in places]
        return tuple(math.floor(self.start + place * self.step) for place in places)

    def at(self, window: int) -> Self:
        """The same sample with another window, 0 <= window < `windows`, for example for another epoch."""
        assert 0 <= window < self.windows
        return replace(self, window=window)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A dropped record; `detail` has the numbers behind `reason`."""

    index: int
    record: Record
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Selection:
    """The result of `select`; both parts are in the manifest's order."""

    settings: SelectionSettings
    kept: tuple[Sample, ...]
    dropped: tuple[Dropped, ...]

    @property
    def shapes(self) -> Counter[tuple[int, int, int]]:
        """How many samples are kept of each shape."""
        return Counter(sample.shape for sample in self.kept)

    def reasons(self) -> dict[Reason, list[Dropped]]:
        """The dropped records by reason, the most frequent first."""
        by_reason: dict[Reason, list[Dropped]] = {}
        for drop in self.dropped:
            by_reason.setdefault(drop.reason, []).append(drop)
        return dict(sorted(by_reason.items(), key=lambda item: -len(item[1])))


def select(
    records: Sequence[Record],
    settings: SelectionSettings,
    *,
    seed: int = 0,
    global_batch: int | None = None,
    need_captions: bool = True,
    allow_empty: bool = False,
) -> Selection:
    """Decide for every record whether to train on it, with which frames and size (docs/model.md, section 6).

    Random choices (windows of long clips, which short clips are dropped) depend only on `seed` and the
    record, not on other records. With `global_batch`, the samples of a step over all ranks, shapes with fewer
    samples than `samples_needed` are dropped. `need_captions` False is for training a VAE.

    Raises ValueError without records and, unless `allow_empty`, if none is kept.
    """
    if not records:
        raise ValueError("there are no records to select from: the manifest is empty")
    kept: list[Sample] = []
    dropped: list[Dropped] = []
    for index, record in enumerate(records):
        outcome = _decide(record, index=index, settings=settings, seed=seed, need_captions=need_captions)
        if isinstance(outcome, Sample):
            kept.append(outcome)
        else:
            dropped.append(Dropped(index, record, outcome.reason, outcome.detail))
    if global_batch is not None:
        kept, rare = _drop_rare(kept, settings=settings, global_batch=global_batch)
        dropped = sorted(dropped + rare, key=lambda drop: drop.index)
    selection = Selection(settings, tuple(kept), tuple(dropped))
    if not kept and not allow_empty:
        raise ValueError(f"all {len(records)} records are dropped: {_reasons(selection)}")
    return selection


def samples_needed(counts: Iterable[int], *, min_batches: int, global_batch: int) -> int:
    """Number of samples that a shape needs to be kept; `counts` has the number of samples of each shape.

    `min_batches` global batches, as in the original. If no shape has enough for that, one global batch, so
    that small data sets can be trained on, of which the original would keep nothing.
    """
    enough = min_batches * global_batch
    return enough if any(count >= enough for count in counts) else global_batch


def repeat_samples(samples: Sequence[Sample], repeat: Mapping[str, int]) -> list[int]:
    """Indices of all samples, repeated by caption: for each regular expression of `repeat` that matches one
    of its captions, a sample is repeated that number of times more.

    Raises ValueError for an expression that matches no caption.
    """
    times = [1] * len(samples)
    for pattern, more in repeat.items():
        found = [
            place
            for place, sample in enumerate(samples)
            if any(re.search(pattern, caption) for caption in sample.record.captions)
        ]
        if not found:
            raise ValueError(f"data.repeat: {pattern!r} is found in no caption of the {len(samples)} clips")
        for place in found:
            times[place] += more
    return [place for place, count in enumerate(times) for _ in range(count)]


def _reasons(selection: Selection) -> str:
    return "; ".join(
        f"{len(drops)} {reason} ({reason.sentence}), as {drops[0].record.path}: {drops[0].detail}"
        for reason, drops in selection.reasons().items()
    )


def _drop_rare(
    samples: list[Sample], *, settings: SelectionSettings, global_batch: int
) -> tuple[list[Sample], list[Dropped]]:
    counts = Counter(sample.shape for sample in samples)
    enough = samples_needed(counts.values(), min_batches=settings.min_batches, global_batch=global_batch)
    rare = [
        Dropped(
            sample.index,
            sample.record,
            Reason.RARE_SHAPE,
            f"{counts[sample.shape]} samples of {'x'.join(map(str, sample.shape))}, {enough} needed",
        )
        for sample in samples
        if counts[sample.shape] < enough
    ]
    return [sample for sample in samples if counts[sample.shape] >= enough], rare


class _Drop(NamedTuple):
    reason: Reason
    detail: str


def _decide(
    record: Record, *, index: int, settings: SelectionSettings, seed: int, need_captions: bool
) -> Sample | _Drop:
    if record.error:
        return _Drop(Reason.UNREADABLE, record.error)
    if need_captions and not record.captions:
        return _Drop(Reason.NO_CAPTION, "no caption")
    if record.height is None or record.width is None:
        return _Drop(Reason.NO_SIZE, f"height {record.height}, width {record.width}")
    size = _size(record.height, record.width, settings=settings)
    if isinstance(size, _Drop):
        return size
    framing = size if isinstance(size, Framing) else None
    height, width = size[-2:]  # in which both kinds end
    sample = Sample(index, record, num_frames=1, height=height, width=width, framing=framing)
    return sample if record.is_image else _choose_frames(sample, settings=settings, seed=seed)


def _size(height: int, width: int, *, settings: SelectionSettings) -> tuple[int, int] | Framing | _Drop:
    """Height and width of a sample from frames of this size, or how they are scaled and cropped."""
    low, high = settings.min_h_div_w_ratio, settings.max_h_div_w_ratio
    if not low <= height / width <= high:
        return _Drop(Reason.ASPECT, f"{height}/{width} = {height / width:.3f}, allowed {low:g} .. {high:g}")
    least = settings.smallest_area
    if settings.force_resolution:
        # The centre crop to the target's aspect ratio must be large enough, too.
        one, other = sorted((height * settings.max_width, width * settings.max_height))
        least = -(-least * other // one)
    if height * width < least:
        return _Drop(Reason.TOO_SMALL, f"{height}x{width} = {height * width} pixels, {least} needed")
    if settings.force_resolution:
        return settings.max_height, settings.max_width
    frame = frame_five_ratios if settings.force_5_ratio else frame_freely
    framing = frame(height, width, largest_area=settings.largest_area, stride=settings.hw_stride)
    if framing.height * framing.width < least:
        became = f"{height}x{width} becomes {framing.height}x{framing.width}"
        return _Drop(Reason.TOO_SMALL, f"{became} = {framing.height * framing.width} pixels, {least} needed")
    return framing


def _choose_frames(sample: Sample, *, settings: SelectionSettings, seed: int) -> Sample | _Drop:
    """`sample` with frames chosen from its video, or why it is dropped."""
    record, wanted, rate = sample.record, settings.num_frames, settings.train_fps
    if record.num_frames is None or record.fps is None:
        return _Drop(Reason.NO_LENGTH, f"num_frames {record.num_frames}, fps {record.fps}")
    step = 1.0 if abs(record.fps - rate) < _SAME_FPS else record.fps / rate
    if step < 1:
        return _Drop(Reason.LOW_FPS, f"{record.fps:g} fps, train_fps is {rate:g}")
    most = settings.too_long_factor * wanted * record.fps / rate * settings.speed_factor
    if record.num_frames > most:
        return _Drop(
            Reason.TOO_LONG, f"{record.num_frames} frames at {record.fps:g} fps, at most {int(most)}"
        )
    resampled = math.ceil(record.num_frames / step)
    thinned = _count_sped_up(resampled, settings=settings)
    frames = settings.sample_frames(min(thinned, wanted))
    length = f"{thinned} frames" + ("" if step == 1 else f" ({record.num_frames} at {record.fps:g} fps)")
    if frames < settings.min_num_frames:
        return _Drop(Reason.TOO_SHORT, f"{length} give {frames}, min_num_frames is {settings.min_num_frames}")
    chance = _chance(record, seed=seed)
    if thinned < wanted and chance.random() < settings.drop_short_ratio:
        return _Drop(Reason.SHORT, f"{length}, num_frames is {wanted}")
    windows = max(1, thinned - wanted + 1)
    return replace(
        sample,
        num_frames=frames,
        start=0 if record.cut is None else record.cut[0],
        step=step,
        resampled=resampled,
        thinned=thinned,
        window=chance.randrange(windows),
        windows=windows,
    )


def _count_sped_up(frames: int, *, settings: SelectionSettings) -> int:
    """Number of frames after speeding up a clip, at least as many as wanted."""
    if settings.speed_factor == 1 or frames <= settings.num_frames:
        return frames
    return max(settings.num_frames, int(frames / settings.speed_factor))


def _chance(record: Record, *, seed: int) -> random.Random:
    """A random generator for one record, independent of other records."""
    # By name, not by path: the same data on another disk makes the same run.
    key = f"{seed} {record.cut} {record.path.name}".encode("utf-8", "surrogatepass")
    return random.Random(int.from_bytes(hashlib.sha256(key).digest()[:8]))
