"""Reading video by PyAV (or decord, or torchcodec), and pictures by Pillow: frames by time stamp or number.

Not here: what a file is (probing.py), the pixel transform, writing (both in video.py), which clips to take.
Frames are uint8 [T, H, W, 3] RGB, upright, otherwise as stored: pixels that are not square are not stretched,
interlaced frames not split, HDR not tone-mapped.
"""

import logging
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import import_module
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal, cast

import av
import av.error
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from opensoraplan.data.pictures import picture_format, read_pictures
from opensoraplan.documents import check_file

logger = logging.getLogger(__name__)

Reader = Literal["pyav", "decord", "torchcodec"]

# swscale's bilinear, full chroma, accurate rounding: exact to half a level of 255, where its default, a fast
# path, comes out 1 to 2 levels too dark. As numbers, since PyAV names the last two only from version 18 on.
SWSCALE = 0x2 | 0x2000 | 0x40000
# Rates that also exist a thousandth slower: 24 -> 24000/1001 = 23.976.
_NTSC_RATES = (12, 15, 24, 30, 48, 60, 120, 240)
# Matroska rounds time stamps to milliseconds: two that differ by half of one are the same instant.
SAME_INSTANT = Fraction(1, 2000)
# Decoding up to this many frames costs no more than seeking a keyframe.
_NEAR = 32
# Codecs in which one packet is one frame, so that packets can be counted instead of frames.
PACKET_IS_FRAME = frozenset(("h264", "hevc", "vvc", "vp9", "av1", "mpeg2video", "mjpeg", "prores", "ffv1"))
# `orientation_of` for rotations to the left, in degrees.
_TURNS = {
    0: (False, False, False),
    90: (True, True, False),
    180: (False, True, True),
    270: (True, False, True),
}
# Most frames that a decoder holds back to reorder them.
REORDERED = 32


class TooShortError(ValueError):
    """A video has fewer frames than asked for: only `frames`."""

    def __init__(self, path: str | Path, *, frames: int, asked: int) -> None:
        super().__init__(f"{path} has {frames} frames, asked for frame {asked}")
        self.frames = frames


class UncertainError(Exception):
    """The packets of this file may not match the frames that decoding gives."""


@dataclass(frozen=True)
class TimedFrame:
    """A decoded frame and the time that it is on screen, in seconds from the first frame."""

    start: Fraction
    end: Fraction
    frame: VideoFrame


def frame_rate(fps: float | Fraction) -> Fraction:
    """`fps` as an exact rate. Floats that mean n * 1000/1001 (23.976, 29.97, ...) become that fraction.

    Raises ValueError unless it is from 0.001 to 1000 frames a second.
    """
    if not 0.001 <= fps <= 1000:
        raise ValueError(f"fps must be in 0.001 .. 1000, got {fps}")
    if isinstance(fps, Fraction):
        return fps.limit_denominator(100_000)
    for whole in _NTSC_RATES:
        if abs(fps - whole / 1.001) < whole / 5000:
            return Fraction(whole * 1000, 1001)
    return Fraction(fps).limit_denominator(1001)


def count_frames(path: str | Path, *, fps: float | Fraction | None = None, limit: int | None = None) -> int:
    """How many frames `iter_frames(path, fps=fps)` yields, found by decoding; stops counting at `limit`.

    Raises FileNotFoundError, or ValueError for a file without readable video or damaged before `limit`.
    """
    rate = None if fps is None else frame_rate(fps)
    return sum(1 for _ in islice(decode_file(path, rate=rate), limit))


def iter_frames(
    path: str | Path, *, start: int = 0, count: int | None = None, fps: float | Fraction | None = None
) -> Iterator[torch.Tensor]:
    """Yield `count` frames (None: all) from frame `start` on, in the order shown, each uint8 [H, W, 3].

    With `fps`, the video is first resampled by its time stamps: frame j is what is on screen j / fps seconds
    after the first frame appears, and `start` and `count` are in frames of the new rate. Rotation and
    mirroring that the file asks for are applied. A repeated frame is the same tensor again.

    Raises FileNotFoundError, and ValueError for a file without readable video, fewer frames than asked
    for, a size that changes on the way and, once all frames before the damage are out, for a damaged
    or cut-off file.
    """
    if start < 0 or (count is not None and count < 1):
        raise ValueError(f"start must be at least 0 and count at least 1, got start {start}, count {count}")
    rate = None if fps is None else frame_rate(fps)
    return (picture for picture, _ in _iter_pictures(path, start=start, count=count, rate=rate))


def iter_timed_frames(
    path: str | Path, *, count: int
) -> Iterator[tuple[torch.Tensor, tuple[Fraction, Fraction]]]:
    """The first `count` frames as in `iter_frames`, each with the seconds from the first frame on at which it
    appears and disappears. Errors: see `iter_frames`.
    """
    shown = _iter_pictures(path, start=0, count=count, rate=None)
    before = next(shown)
    for after in shown:
        yield before[0], (before[1].start, after[1].start)
        before = after
    yield before[0], (before[1].start, before[1].end)


def read_frames(
    path: str | Path, *, start: int = 0, count: int | None = None, fps: float | Fraction | None = None
) -> torch.Tensor:
    """Frames of a video in one tensor, uint8 [T, H, W, 3]. Arguments and errors: see `iter_frames`."""
    return torch.stack(list(iter_frames(path, start=start, count=count, fps=fps)))


def read_numbered(
    path: str | Path,
    numbers: Sequence[int],
    *,
    crop: tuple[int, int, int, int] | None = None,
    reader: Reader = "pyav",
    rate: float | None = None,
) -> torch.Tensor:
    """The frames of these numbers, which rise and may repeat, as uint8 [len(numbers), H, W, 3].

    Numbers count the decoded frames of the file from 0 in the order shown; with `rate`, for a file whose own
    one varies, those that PyAV gives when it is resampled to that rate. `crop` = (left, right, top, bottom)
    in pixels of the upright picture. Far into a file, the keyframe before the first frame is sought instead
    of decoding all before it, if it is certain that this gives the same frames. `reader` "decord" or
    "torchcodec" decodes with that package; PyAV, and a line of log, take the place of one that is not
    installed, or cannot read the file.

    Raises FileNotFoundError, TooShortError for too few frames, and ValueError for a file without readable
    video, damaged before the last one, frames of several sizes, or a crop outside of the picture.
    """
    _check_file(path)
    if rate is not None or picture_format(path) is not None:
        timed_frames = decode_file(path, rate=None if rate is None else frame_rate(rate))
        return _select_frames(path, enumerate(timed.frame for timed in timed_frames), numbers, crop=crop)
    if installed_reader(reader) != "pyav":
        frames = (
            _read_with_decord(path, numbers) if reader == "decord" else _read_with_torchcodec(path, numbers)
        )
        if frames is not None:
            return _crop(path, frames, crop)
    if numbers[0] >= _NEAR:
        try:
            with open_video(path) as (container, stream):
                return _select_frames(
                    path, _decode_from_keyframe(path, container, stream, numbers), numbers, crop=crop
                )
        except (UncertainError, av.error.FFmpegError):
            logger.debug("%s: frames are counted from the first one on", path)
    with open_video(path) as (container, stream):
        frames = enumerate(_decode(path, container, stream))
        return _select_frames(path, frames, numbers, crop=crop)


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its main video stream, closed afterwards."""
    _check_file(path)
    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        size = Path(path).stat().st_size
        raise ValueError(f"{path} ({size} bytes) is not a video, or is cut off: {error.strerror}") from error
    with container:
        stream = container.streams.best("video")
        if stream is None or _is_cover(stream):
            found = ", ".join("cover" if _is_cover(other) else other.type for other in container.streams)
            raise ValueError(f"{path} ({container.format.name}) has no video; found: {found or 'nothing'}")
        if cast(VideoCodecContext | None, stream.codec_context) is None:
            raise ValueError(f"{path} has video of a codec unknown to this FFmpeg, or is cut off")
        video = cast(VideoStream, stream)
        video.thread_type = "AUTO"
        yield container, video


def _check_file(path: str | Path) -> None:
    """Raise FileNotFoundError, or ValueError for pipes and devices, which opening might wait for."""
    if not Path(path).exists():
        raise FileNotFoundError(f"video {path} does not exist")
    check_file(Path(path))


def _is_cover(stream: Stream) -> bool:
    """Whether this is the cover picture of a song, which is a video stream, too."""
    return bool(stream.disposition & Disposition.attached_pic)


def codec_of(stream: VideoStream) -> str:
    return stream.codec_context.codec.canonical_name


def mean_rate(stream: VideoStream) -> Fraction:
    return stream.average_rate or stream.guessed_rate or stream.base_rate or Fraction(25)


def _stated_duration(container: InputContainer, stream: VideoStream, *, origin: Fraction) -> Fraction | None:
    """How many seconds of video follow the first frame, which appears at `origin`, according to the file."""
    # Matroska has one length, that of the whole file, which FFmpeg puts here now and then.
    if "matroska" not in container.format.name and stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    if container.duration is None or len(container.streams) > 1:
        return None
    return Fraction(container.duration, av.time_base) - origin


def _decode(path: str | Path, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """All frames of a stream in the order shown. At damage: those before it, then ValueError."""
    codec = cast(VideoCodecContext, stream.codec_context)
    frames = 0
    damage = None
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                damage = "incomplete packet"
                break
            for frame in packet.decode():
                frames += 1
                yield cast(VideoFrame, frame)
    except av.error.FFmpegError as error:
        damage = error.strerror
    if damage is not None:
        # How many frames the decoder still holds depends on its threads; with them, what comes out does not.
        with suppress(av.error.FFmpegError):
            for frame in codec.decode(None):
                frames += 1
                yield frame
        raise ValueError(f"{path} is damaged or cut off after {frames} frames: {damage}")


def decode_timed(path: str | Path, container: InputContainer, stream: VideoStream) -> Iterator[TimedFrame]:
    """The frames of a stream with the times that they are on screen; at least one, or ValueError."""
    origin = None
    end = Fraction(0)
    for frame in _decode(path, container, stream):
        tick = frame.time_base or stream.time_base or Fraction(0)
        # Raw streams have no time stamps: each frame follows the one before.
        stamp = frame.pts * tick if frame.pts is not None else end + (origin or 0)
        if origin is None:
            origin = stamp
        start = stamp - origin
        end = start + (frame.duration * tick or 1 / mean_rate(stream))
        yield TimedFrame(start=start, end=end, frame=frame)
    if origin is None:
        raise ValueError(f"{path} has a video stream ({codec_of(stream)}) without frames")
    promised = _stated_duration(container, stream, origin=origin)
    if promised is not None and end < promised * Fraction(9, 10):
        # No error: a last frame may rightly stay on screen for long, and Matroska counts no frames.
        logger.warning("%s: frames end after %.2f s of %.2f s: is the file truncated?", path, end, promised)


def _resample(timed_frames: Iterable[TimedFrame], rate: Fraction) -> Iterator[TimedFrame]:
    """What is on screen at 0, 1 / rate, 2 / rate, ... seconds; at least one frame if there is any."""
    shown = None
    index = 0
    for timed in timed_frames:
        while shown is not None and index / rate + SAME_INSTANT < timed.start:
            yield shown
            index += 1
        shown = timed
    # Twice the tolerance, since start and duration of the last frame are both rounded.
    while shown is not None and (index == 0 or index / rate + 2 * SAME_INSTANT < shown.end):
        yield shown
        index += 1


def decode_file(path: str | Path, *, rate: Fraction | None) -> Iterator[TimedFrame]:
    """All frames of a file, resampled if there is a rate, not yet converted to RGB."""
    if picture_format(path) is not None:
        timed_frames = picture_frames(path)
        yield from timed_frames if rate is None else _resample(timed_frames, rate)
        return
    with open_video(path) as (container, stream):
        timed_frames = decode_timed(path, container, stream)
        yield from timed_frames if rate is None else _resample(timed_frames, rate)


def picture_frames(path: str | Path) -> Iterator[TimedFrame]:
    """The pictures of a file that Pillow reads."""
    start = Fraction(0)
    for pixels, seconds in read_pictures(path):
        yield TimedFrame(
            start=start, end=start + seconds, frame=VideoFrame.from_ndarray(pixels, format="rgb24")
        )
        start += seconds


def _iter_pictures(
    path: str | Path, *, start: int, count: int | None, rate: Fraction | None
) -> Iterator[tuple[torch.Tensor, TimedFrame]]:
    """`iter_frames` after its checks, with when each frame is on screen."""
    stop = None if count is None else start + count
    seen = 0
    frame, picture = None, torch.empty(0)
    for timed in islice(decode_file(path, rate=rate), stop):
        seen += 1
        if seen <= start:
            continue
        if timed.frame is not frame:
            before, picture = picture, _to_rgb(timed.frame)
            if frame is not None and before.shape != picture.shape:
                sizes = " to ".join(
                    f"{height} x {width}" for height, width, _ in (before.shape, picture.shape)
                )
                raise ValueError(f"{path} changes its size from {sizes} at frame {seen - 1}")
            frame = timed.frame
        yield picture, timed
    if seen < (start + 1 if stop is None else stop):
        wanted = f"frame {start} on" if stop is None else f"frames {start} to {stop - 1}"
        at = "" if rate is None else f" at {float(rate):g} a second"
        raise ValueError(f"{path} has {seen} frames{at}, asked for {wanted}")


def _to_rgb(frame: VideoFrame) -> torch.Tensor:
    """A decoded frame as an upright picture in its own memory, uint8 [H, W, 3]."""
    # Threads of its own would outlive the frame until garbage is collected, and in a forked process, which
    # lacks them, freeing them hangs or crashes.
    picture = frame.to_ndarray(format="rgb24", interpolation=SWSCALE, threads=1)
    transposed, down, across = orientation_of(frame)
    if transposed:
        picture = picture.transpose(1, 0, 2)
    return torch.from_numpy(picture[:: -1 if down else 1, :: -1 if across else 1].copy())


def orientation_of(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """What turns a frame upright: transpose it?, then reverse its rows?, and its columns?"""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # If PyAV does not know the kind of data, it gives only the angle, not whether it is mirrored.
        if frame.rotation % 90 == 0:
            return _TURNS[frame.rotation % 360]
    else:
        if data is None:
            return False, False, False
        # x' = a x + c y, y' = b x + d y in fixed point (ISO/IEC 14496-12); the rest of the matrix moves and
        # projects.
        a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
        if max(abs(b), abs(c)) * 50 < min(abs(a), abs(d)):
            return False, d < 0, a < 0
        if max(abs(a), abs(d)) * 50 < min(abs(b), abs(c)):
            return True, b < 0, c < 0
    raise ValueError(f"the video is rotated by {frame.rotation} degrees; only multiples of 90 can be read")


def _decode_from_keyframe(
    path: str | Path, container: InputContainer, stream: VideoStream, numbers: Sequence[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames with their numbers from a keyframe before the first wanted one on; else UncertainError."""
    if codec_of(stream) not in PACKET_IS_FRAME:
        raise UncertainError
    first = next(_decode_intact(path, container, stream), None)
    if first is None or first.pts is None or first.time_base != stream.time_base:
        raise UncertainError
    last = numbers[-1]
    stamps = _even_stamps(stream, first=first.pts, last=last)
    if stamps is None:
        # Two packets may be one interlaced frame, where the container leaves them apart.
        if first.interlaced_frame:
            raise UncertainError
        stamps = listed_stamps(path, first=first.pts, last=last)
    _seek(container, stream, stamps[numbers[0]])
    number = None
    for frame in _decode_intact(path, container, stream):
        if number is None:
            # Frames shown before a keyframe may need ones that were not decoded.
            if not frame.key_frame:
                continue
            place = bisect_left(stamps, frame.pts or 0)
            if place > numbers[0]:
                raise UncertainError
            number = place
        if number > last:
            return
        if frame.pts != stamps[number]:
            raise UncertainError
        yield number, frame
        number += 1
    raise UncertainError


def _decode_intact(path: str | Path, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Yield all further frames. Raises UncertainError at damage; decoding from the start then says where."""
    try:
        yield from _decode(path, container, stream)
    except ValueError as error:
        raise UncertainError from error


def _even_stamps(stream: VideoStream, *, first: int, last: int) -> Sequence[int] | None:
    """Time stamps of frames 0 to `last` if the container's index shows that they are evenly spaced."""
    # Not in every PyAV. The index of mp4 is whole, that of Matroska has keyframes only, if any.
    index = getattr(stream, "index_entries", ())
    if len(index) <= last:
        return None
    entries = list(islice(index, last + REORDERED))
    step = entries[1].timestamp - entries[0].timestamp
    # Decoding times are evenly spaced just where presentation times are: those are these in another order.
    even = step > 0 and all(b.timestamp - a.timestamp == step for a, b in pairwise(entries))
    if not even or any(entry.is_discard for entry in entries):
        return None
    return range(first, first + (last + 1) * step, step)


def listed_stamps(path: str | Path, *, first: int, last: int | None = None) -> Sequence[int]:
    """Time stamps of frames 0 to `last` (None: of all), from the file's packets, which are read but not
    decoded; `first` is that of frame 0.
    """
    stamps: list[int] = []
    with open_video(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.pts is None or packet.is_corrupt:
                raise UncertainError
            # What is still to come is shown after it is decoded.
            if last is not None:
                if packet.dts is None:
                    raise UncertainError
                if len(stamps) > last and packet.dts > stamps[last]:
                    break
            if packet.pts >= first:
                insort(stamps, packet.pts)
    if len(stamps) <= (last or 0) or stamps[0] != first or any(a == b for a, b in pairwise(stamps)):
        raise UncertainError
    return stamps


def _seek(container: InputContainer, stream: VideoStream, stamp: int) -> None:
    """Go to a keyframe that is shown at `stamp` or before, or to some packet before it."""
    at = stamp
    # Containers find keyframes by decoding time, which may be before `stamp` although they are shown after.
    for _ in range(4):
        container.seek(at, stream=stream)
        packet = next(container.demux(stream))
        if packet.pts is None or packet.dts is None:
            break
        if packet.pts <= stamp:
            container.seek(at, stream=stream)
            return
        at = min(at, packet.dts) - 1
    raise UncertainError


def _select_frames(
    path: str | Path,
    frames: Iterator[tuple[int, VideoFrame]],
    numbers: Sequence[int],
    *,
    crop: tuple[int, int, int, int] | None,
) -> torch.Tensor:
    """The pictures of these numbers, of frames that come with theirs."""
    result = torch.empty(0)
    filled = seen = 0
    for number, frame in frames:
        seen = number + 1
        if number != numbers[filled]:
            continue
        picture = _crop(path, _to_rgb(frame)[None], crop)[0]
        if not filled:
            result = picture.new_empty(len(numbers), *picture.shape)
        elif picture.shape != result.shape[1:]:
            sizes = " to ".join(f"{size[0]} x {size[1]}" for size in (result.shape[1:], picture.shape))
            raise ValueError(f"{path} changes its size from {sizes} before frame {number}")
        while filled < len(numbers) and numbers[filled] == number:
            result[filled] = picture
            filled += 1
        if filled == len(numbers):
            return result
    raise TooShortError(path, frames=seen, asked=numbers[-1])


def _crop(path: str | Path, frames: torch.Tensor, crop: tuple[int, int, int, int] | None) -> torch.Tensor:
    """The part (left, right, top, bottom) of frames [T, H, W, 3]."""
    if crop is None:
        return frames
    left, right, top, bottom = crop
    height, width = frames.shape[1:3]
    if right > width or bottom > height:
        raise ValueError(f"{path} is {height} x {width} (height x width), crop is {list(crop)}")
    return frames[:, top:bottom, left:right]


def installed_reader(reader: Reader) -> Reader:
    """`reader`, or "pyav" if its package is not installed, which is logged once per process."""
    return reader if reader == "pyav" or _is_installed(reader) else "pyav"


@cache
def _is_installed(reader: Reader) -> bool:
    """Whether the package of a reader can be loaded. If not, logs it once per process."""
    try:
        import_module("torchcodec.decoders" if reader == "torchcodec" else reader)
    except ModuleNotFoundError:
        problem = "is not installed"
    except (ImportError, OSError, RuntimeError) as error:  # for example, FFmpeg's libraries are missing
        problem = f"cannot be loaded ({str(error).strip().partition(chr(10))[0]})"
    else:
        return True
    logger.warning("reader %s %s: videos are read with PyAV", reader, problem)
    return False


def _read_with_decord(path: str | Path, numbers: Sequence[int]) -> torch.Tensor | None:
    """Frames [len(numbers), H, W, 3], or None of a file that decord cannot read, such as one of AV1."""
    import decord  # type: ignore[import-not-found]

    try:
        video = decord.VideoReader(str(path), ctx=decord.cpu(0))
        _check_count(path, len(video), numbers)
        return torch.from_numpy(video.get_batch(list(numbers)).asnumpy())
    except decord.DECORDError as error:
        return _fall_back_to_pyav(path, "decord", error)


def _read_with_torchcodec(path: str | Path, numbers: Sequence[int]) -> torch.Tensor | None:
    """Frames [len(numbers), H, W, 3], or None of a file that torchcodec cannot read."""
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

    try:
        video = VideoDecoder(str(path), dimension_order="NHWC", seek_mode="exact")
        _check_count(path, len(video), numbers)
        return video.get_frames_at(indices=list(numbers)).data
    except RuntimeError as error:
        return _fall_back_to_pyav(path, "torchcodec", error)


def _fall_back_to_pyav(path: str | Path, reader: Reader, error: Exception) -> None:
    reason = str(error).strip().rpartition("\n")[2]
    logger.debug("%s cannot be read by %s (%s): it is read with PyAV", path, reader, reason)
    _warn_of_fallback(reader)


@cache
def _warn_of_fallback(reader: Reader) -> None:
    logger.warning("not all videos can be read by %s: the others are read with PyAV", reader)


def _check_count(path: str | Path, frames: int, numbers: Sequence[int]) -> None:
    if numbers[-1] >= frames:
        raise TooShortError(path, frames=frames, asked=numbers[-1])
