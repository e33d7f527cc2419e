"""Probing of videos and pictures: number, times and size of the frames that decode. Read from the container's
index or packets where they are reliable, else by decoding; the length that a container claims is not used.

Not here: the frames themselves (reading.py).
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from opensoraplan.data.pictures import picture_format
from opensoraplan.data.reading import (
    PACKET_IS_FRAME,
    REORDERED,
    SAME_INSTANT,
    TimedFrame,
    UncertainError,
    codec_of,
    decode_timed,
    listed_stamps,
    mean_rate,
    open_video,
    orientation_of,
    picture_frames,
)

# Start and end of a span are both rounded.
_ROUNDED = 2 * SAME_INSTANT
# A rate is the file's, with missing frames, if at least this part of the gaps between frames matches it.
_TYPICAL = Fraction(3, 4)


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video.

    `frames` is how many decode, which `count_frames` gives, too. `fps` is a rate that the file names, if
    nearly all frames keep it by their time stamps, else their mean rate. `variable`: some frame appears at
    least a whole frame's time before or after its place at that rate. `resampled` is how many frames there
    are at that rate by time; unless `variable`, all of them. `height` and `width` are those of the upright
    picture, in pixels. `duration` is in seconds. `codec` is FFmpeg's name of the format, such as "h264".
    """

    frames: int
    fps: Fraction
    height: int
    width: int
    duration: float
    codec: str
    variable: bool
    resampled: int


def probe(path: str | Path) -> VideoInfo:
    """Describe the video in `path` (of several, the one that players choose), or the picture.

    Decodes one frame. Where the file has no index of all frames, or one that shows gaps, the packets of the
    whole file are read, too, or, of a codec in which they are not frames, decoded.

    Raises FileNotFoundError, or ValueError for a file without readable video, for one that is shorter than
    its index says and, where all of it is decoded, for a damaged one.
    """
    picture = picture_format(path)
    if picture is not None:
        timed_frames = list(picture_frames(path))
        starts = [timed.start for timed in timed_frames]
        gaps = sorted(timed.end - timed.start for timed in timed_frames)
        return _describe(timed_frames[0].frame, starts, rates=[1 / gaps[len(gaps) // 2]], codec=picture)
    with open_video(path) as (container, stream):
        timed_frames = decode_timed(path, container, stream)
        first = next(timed_frames).frame
        starts = _frame_times(path, container, stream, first, timed_frames)
        rates = (mean_rate(stream), stream.guessed_rate, stream.base_rate)
        return _describe(first, starts, rates=[rate for rate in rates if rate], codec=codec_of(stream))


def _describe(
    first: VideoFrame, starts: Sequence[Fraction], *, rates: Sequence[Fraction], codec: str
) -> VideoInfo:
    """Describe a video by its `first` frame, the times of all frames, and the rates that the file names."""
    height, width = first.height, first.width
    if orientation_of(first)[0]:
        height, width = width, height
    fps = _rate(starts, rates)
    variable = _is_irregular(starts, fps)
    frames = len(starts)
    resampled = int((starts[-1] + SAME_INSTANT) * fps) + 1 if variable else frames
    return VideoInfo(
        frames=frames,
        fps=fps,
        height=height,
        width=width,
        duration=float(resampled / fps),
        codec=codec,
        variable=variable,
        resampled=resampled,
    )


def _rate(starts: Sequence[Fraction], rates: Sequence[Fraction]) -> Fraction:
    """The rate of frames that appear at those times: the first one that the file names if they keep it, or
    the one that nearly all of them keep, else their mean.
    """
    last, span = len(starts) - 1, starts[-1]
    if span <= 0 or (abs(span - last / rates[0]) <= _ROUNDED and not _is_irregular(starts, rates[0])):
        return rates[0]
    mean = last / span
    gaps = sorted(after - before for before, after in pairwise(starts))
    if gaps[-1] - gaps[0] <= 2 * _ROUNDED:
        return mean
    median = gaps[last // 2]
    near = [gap for gap in gaps if abs(gap - median) <= _ROUNDED]
    if len(near) < _TYPICAL * last:
        return mean
    typical = sum(near, Fraction(0)) / len(near)
    return next((rate for rate in rates if abs(1 / rate - typical) <= _ROUNDED), 1 / typical)


def _is_irregular(starts: Sequence[Fraction], rate: Fraction) -> bool:
    """Whether some frame appears at least a whole frame's time before or after its place at a rate."""
    return any(abs(start * rate - place) >= 1 for place, start in enumerate(starts))


def _frame_times(
    path: str | Path,
    container: InputContainer,
    stream: VideoStream,
    first: VideoFrame,
    rest: Iterable[TimedFrame],
) -> Sequence[Fraction]:
    """When each frame of a file appears, in seconds from the `first` one on: by its index or packets if they
    are its frames, else by decoding the `rest`.
    """
    # Two packets may be one interlaced frame, where the container leaves them apart.
    if not first.interlaced_frame and first.pts is not None and first.time_base == stream.time_base:
        tick = stream.time_base or Fraction(0)
        stamps = _times_from_index(path, container, stream, first=first.pts)
        if stamps is None and codec_of(stream) in PACKET_IS_FRAME:
            with suppress(UncertainError):
                stamps = listed_stamps(path, first=first.pts)
        if stamps is not None:
            return [(stamp - stamps[0]) * tick for stamp in stamps]
    return [Fraction(0), *(timed.start for timed in rest)]


def _times_from_index(
    path: str | Path, container: InputContainer, stream: VideoStream, *, first: int
) -> Sequence[Fraction] | None:
    """Time stamps of all frames if the index of an mp4 shows that they are evenly spaced; `first` is that of
    the frame that is decoded first.
    """
    every = list(getattr(stream, "index_entries", ()))
    if "mp4" not in container.format.name or len(every) != stream.frames or _is_fragmented(path):
        return None
    end, size = max(entry.pos + entry.size for entry in every), Path(path).stat().st_size
    if end > size:
        raise ValueError(f"{path} is cut off: it has {size} of at least {end} bytes")
    # An edit list may begin after a keyframe: what is decoded only to get there is discarded.
    times = [entry.timestamp for entry in every if not entry.is_discard]
    tick = stream.time_base or Fraction(0)
    early, latest = _edges(path, times, first=first)
    count = len(times) - early
    if count < 1:
        return None
    if count == 1:
        return [Fraction(first)]
    # These are times of decoding, which are as far apart as those of showing, in another order. At the end of
    # a clip that was cut out of a longer one, frames between the last ones may be missing.
    step = Fraction(times[-1] - times[0], len(times) - 1)
    uneven = max(abs(time - times[0] - place * step) for place, time in enumerate(times))
    if uneven * tick > _ROUNDED or abs(latest - first - (count - 1) * step) * tick > _ROUNDED:
        return None
    return [first + place * step for place in range(count)]


def _edges(path: str | Path, times: Sequence[int], *, first: int) -> tuple[int, int]:
    """How many packets are shown before the `first` frame that can be decoded, which happens where a clip was
    cut out of a longer one, and the latest time stamp. `times` of decoding are those of the index.
    """
    with open_video(path) as (container, stream):
        early = 0
        for packet in container.demux(stream):
            if packet.dts is None or packet.pts is None or packet.dts > first:
                break
            early += packet.pts < first and not packet.is_discard
        container.seek(times[-min(len(times), REORDERED)], stream=stream, any_frame=True)
        last = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
    return early, max(last, default=first)


def _is_fragmented(path: str | Path) -> bool:
    """Whether an mp4 has fragments, which its index may lack: boxes named moof (ISO/IEC 14496-12)."""
    with Path(path).open("rb") as file:
        while len(header := file.read(16)) >= 8:
            if header[4:8] == b"moof":
                return True
            size = int.from_bytes(header[:4])
            size = int.from_bytes(header[8:]) if size == 1 else size
            if size < 8:  # 0: to the end of the file
                return False
            file.seek(size - len(header), 1)
    return False
