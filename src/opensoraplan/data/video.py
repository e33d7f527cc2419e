"""Video files by PyAV: frames by time stamp in, H.264 mp4 out, and the pixel transform between the two.

Not here: which clips to take, captions, batches. Frames are uint8 [T, H, W, 3] RGB, upright, otherwise as
stored: pixels that are not square are not stretched, interlaced frames not split, HDR not tone-mapped.
"""

import logging
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import av
import av.error
import numpy as np
import torch
import torch.nn.functional as F
from av.container import InputContainer, OutputContainer
from av.stream import Disposition, Stream
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

logger = logging.getLogger(__name__)

# swscale's bilinear, full chroma, accurate rounding: exact to half a level of 255, where its default, a fast
# path, comes out 1 to 2 levels too dark. As numbers, since PyAV names the last two only from version 18 on.
_SWSCALE = 0x2 | 0x2000 | 0x40000
# ITU-T H.273's code of BT.709 (primaries, transfer and matrix alike), and FFmpeg's of limited range.
_BT709 = 1
_LIMITED_RANGE = 1
# Rates that also exist a thousandth slower: 24 -> 24000/1001 = 23.976.
_NTSC_RATES = (12, 15, 24, 30, 48, 60, 120, 240)
# Matroska rounds time stamps to milliseconds: two that differ by half of one are the same instant.
_SAME_INSTANT = Fraction(1, 2000)


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its video.

    `frames` is an estimate, duration times rate (only where the container gives no duration they are
    counted); `count_frames` is exact. `fps` is the mean rate. `height` and `width` are those of the upright
    picture, in pixels. `duration` is in seconds. `codec` is FFmpeg's name of the format, such as "h264".
    """

    frames: int
    fps: Fraction
    height: int
    width: int
    duration: float
    codec: str


@dataclass(frozen=True)
class _Shot:
    """A decoded frame and the time that it is on screen, in seconds from the first frame."""

    start: Fraction
    end: Fraction
    frame: VideoFrame


def frame_rate(fps: float | Fraction) -> Fraction:
    """`fps` as an exact rate. A float that is meant as n * 1000/1001 (23.976, 29.97, ...) becomes just that.

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


def probe(path: str | Path) -> VideoInfo:
    """Describe the video in `path` (of several, the one that players choose). Decodes one frame.

    Raises FileNotFoundError, or ValueError for a file without readable video.
    """
    with _opened(path) as (container, stream):
        first = next(_timed(path, container, stream)).frame
        height, width = first.height, first.width
        if _orientation(first)[0]:
            height, width = width, height
        fps, codec = _mean_rate(stream), _codec(stream)
        seconds = _promised(container, stream)
    frames = count_frames(path) if seconds is None else max(1, round(seconds * fps))
    duration = float(frames / fps if seconds is None else seconds)
    return VideoInfo(frames=frames, fps=fps, height=height, width=width, duration=duration, codec=codec)


def count_frames(path: str | Path, *, fps: float | Fraction | None = None, limit: int | None = None) -> int:
    """How many frames `iter_frames(path, fps=fps)` yields, found by decoding; stops counting at `limit`.

    Raises FileNotFoundError, or ValueError for a file without readable video or damaged before `limit`.
    """
    rate = None if fps is None else frame_rate(fps)
    return sum(1 for _ in islice(_shots(path, rate=rate), limit))


def iter_frames(
    path: str | Path, *, start: int = 0, count: int | None = None, fps: float | Fraction | None = None
) -> Iterator[torch.Tensor]:
    """Yield `count` frames (None: all) from frame `start` on, in the order shown, each uint8 [H, W, 3].

    With `fps`, the video is first resampled by its time stamps: frame j is what is on screen j / fps seconds
    after the first frame appears, and `start` and `count` are in frames of the new rate. Rotation and
    mirroring that the file asks for are applied. A repeated frame is the same tensor again.

    Raises FileNotFoundError, and ValueError for a file without readable video, fewer frames than asked for, a
    size that changes on the way and, once all frames before the damage are out, for a damaged or cut-off
    file.
    """
    if start < 0 or (count is not None and count < 1):
        raise ValueError(f"start must be at least 0 and count at least 1, got start {start}, count {count}")
    return _pictures(path, start=start, count=count, rate=None if fps is None else frame_rate(fps))


def read_frames(
    path: str | Path, *, start: int = 0, count: int | None = None, fps: float | Fraction | None = None
) -> torch.Tensor:
    """Frames of a video in one tensor, uint8 [T, H, W, 3]. Arguments and errors: see `iter_frames`."""
    return torch.stack(list(iter_frames(path, start=start, count=count, fps=fps)))


def fit(frames: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """Cut uint8 frames [T, H, W, 3] to the aspect of `height` x `width` around their centre and resize them.

    Returns float32 [3, T, height, width] in [-1, 1]. This is the original's training transform: bicubic with
    both `antialias` and `align_corners` of torch on (which scales by (in - 1) / (out - 1), yet keeps pixel
    centres, and so differs from either alone). Overshoots of the filter are clamped. Frames of that size keep
    their values.
    """
    _check_pixels(frames)
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be positive, got {height} x {width}")
    crop = _centre_crop(frames, height=height, width=width)
    result = torch.empty(3, len(crop), height, width, device=frames.device)
    # Frame by frame: a whole clip in float at the source's size may be many times the result.
    for index, frame in enumerate(crop):
        pixels = frame.permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=True)
        result[:, index] = pixels[0].clamp(0, 1) * 2 - 1
    return result


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Float video [3, T, H, W] in [-1, 1] (else clamped) as uint8 frames [T, H, W, 3], rounded to nearest."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


class VideoWriter:
    """Writes an mp4 that plays everywhere (H.264, yuv420p, BT.709, index in front), chunk by chunk.

        with VideoWriter("clip.mp4", fps=24) as writer:
            writer.write(frames)  # uint8 [t, H, W, 3], as often as wanted
        writer.path  # clip.mp4, or clip_1.mp4 if there was a clip.mp4

    The file appears under its name when the block ends well; after an exception nothing is left of it. `crf`
    is x264's quality, from 1 (best) to 51. `title` and `comment` are stored as mp4 metadata. `path` is the
    name asked for and, after the block, the name given. Raises ValueError for a name, fps, crf or frames
    that cannot be; on entry, FileNotFoundError, PermissionError and the like for a folder that cannot be
    written to.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float | Fraction,
        crf: int = 18,
        title: str | None = None,
        comment: str | None = None,
    ) -> None:
        # crf 0 is lossless, in a profile that most players lack.
        if not 1 <= crf <= 51:
            raise ValueError(f"crf must be in 1 .. 51, got {crf}")
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(
                f"video is written as .mp4, got {self.path}: use {self.path.with_suffix('.mp4')}"
            )
        self._rate = frame_rate(fps)
        self._crf = crf
        self._metadata = {"title": title, "comment": comment}
        self._temporary = temporary_path(self.path)
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None
        self._written = 0

    def __enter__(self) -> Self:
        # Made now, so that a folder that cannot be written to is found before any work.
        _claim(self._temporary)
        return self

    def write(self, frames: torch.Tensor) -> None:
        """Append frames, uint8 [t, H, W, 3]; all chunks of one video have the same even H and W."""
        _check_pixels(frames)
        height, width = frames.shape[1:3]
        if self._container is None or self._stream is None:
            self._container, self._stream = self._start(height=height, width=width)
        first = (self._stream.height, self._stream.width)
        if (height, width) != first:
            raise ValueError(f"{self.path}: frames of {height} x {width} after {first[0]} x {first[1]}")
        for picture in frames.cpu().numpy():
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace=_BT709,
                dst_color_range=_LIMITED_RANGE,
                interpolation=_SWSCALE,
            )
            frame.time_base = 1 / self._rate
            frame.pts = self._written
            self._container.mux(self._stream.encode(frame))
            self._written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            elif self._container is not None:
                with suppress(av.error.FFmpegError):
                    self._container.close()
        finally:
            self._temporary.unlink(missing_ok=True)

    def _start(self, *, height: int, width: int) -> tuple[OutputContainer, VideoStream]:
        if height % 2 or width % 2:
            down, up = (
                " x ".join(str(max(2, (side + odd) // 2 * 2)) for side in (height, width)) for odd in (0, 1)
            )
            raise ValueError(
                f"H.264 needs even sides, got height x width {height} x {width}: use {down} or {up}"
            )
        container = av.open(
            str(self._temporary), "w", format="mp4", container_options={"movflags": "+faststart"}
        )
        container.metadata.update({key: text for key, text in self._metadata.items() if text is not None})
        stream = container.add_stream("libx264", rate=self._rate, options={"crf": str(self._crf)})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        codec = cast(VideoCodecContext, stream.codec_context)
        codec.time_base = 1 / self._rate
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        return container, stream

    def _finish(self) -> None:
        if self._container is None or self._stream is None or not self._written:
            raise ValueError(f"{self.path}: no frames were written")
        with self._container:
            self._container.mux(self._stream.encode(None))
        self.path = publish(self._temporary, self.path)


def temporary_path(wanted: Path) -> Path:
    """A fresh hidden name in the folder of `wanted`, with its suffix, to write to before `publish`."""
    # Without the stem, which may already be as long as a name can be.
    return wanted.with_name(f".osp-{secrets.token_hex(8)}{wanted.suffix}")


def publish(temporary: Path, wanted: Path) -> Path:
    """Move a finished file to `wanted` or, if that exists, to `wanted` with _1, _2, ... before its suffix.

    Returns the name taken. Never overwrites, and no two callers get the same name. Both are in one file
    system.
    """
    path = wanted
    number = 0
    while True:
        try:
            _move_to_new(temporary, path)
        except FileExistsError:
            number += 1
            path = wanted.with_name(f"{wanted.stem}_{number}{wanted.suffix}")
        else:
            return path


def _move_to_new(temporary: Path, path: Path) -> None:
    """Move a file to a name that must be new, or raise FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        _move_without_link(temporary, path)
    else:
        temporary.unlink()


def _move_without_link(temporary: Path, path: Path) -> None:
    """`_move_to_new` where the file system has no hard links: an empty file holds the name for a moment."""
    _claim(path)
    try:
        temporary.replace(path)
    except OSError:
        path.unlink()
        raise


def _claim(path: Path) -> None:
    """Make an empty file that must be new, with the permissions that any new file gets."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def _check_pixels(frames: torch.Tensor) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")


def _centre_crop(frames: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """The largest part of frames [T, H, W, 3] around their centre with the aspect of `height` x `width`."""
    full_height, full_width = frames.shape[1:3]
    crop_height = min(full_height, max(1, full_width * height // width))
    crop_width = min(full_width, max(1, full_height * width // height))
    top = round((full_height - crop_height) / 2)
    left = round((full_width - crop_width) / 2)
    return frames[:, top : top + crop_height, left : left + crop_width]


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its main video stream, closed afterwards."""
    if not Path(path).exists():
        raise FileNotFoundError(f"video {path} does not exist")
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
        yield container, cast(VideoStream, stream)


def _is_cover(stream: Stream) -> bool:
    """Whether this is the cover picture of a song, which is a video stream, too."""
    return bool(stream.disposition & Disposition.attached_pic)


def _codec(stream: VideoStream) -> str:
    return stream.codec_context.codec.canonical_name


def _mean_rate(stream: VideoStream) -> Fraction:
    return stream.average_rate or stream.guessed_rate or stream.base_rate or Fraction(25)


def _promised(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """How many seconds of video there are according to the file, if it says."""
    if stream.duration is not None and stream.time_base is not None:
        return stream.duration * stream.time_base
    return None if container.duration is None else Fraction(container.duration, av.time_base)


def _decoded(path: str | Path, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """All frames of a stream in the order shown. At damage: those before it, then ValueError."""
    stream.thread_type = "AUTO"
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
        for frame in codec.decode(None):
            frames += 1
            yield frame
        raise ValueError(f"{path} is damaged or cut off after {frames} frames: {damage}")


def _timed(path: str | Path, container: InputContainer, stream: VideoStream) -> Iterator[_Shot]:
    """The frames of a stream with the times that they are on screen; at least one, or ValueError."""
    origin = None
    end = Fraction(0)
    for frame in _decoded(path, container, stream):
        tick = frame.time_base or stream.time_base or Fraction(0)
        # Raw streams have no time stamps: each frame follows the one before.
        stamp = frame.pts * tick if frame.pts is not None else end + (origin or 0)
        if origin is None:
            origin = stamp
        start = stamp - origin
        end = start + (frame.duration * tick or 1 / _mean_rate(stream))
        yield _Shot(start=start, end=end, frame=frame)
    if origin is None:
        raise ValueError(f"{path} has a video stream ({_codec(stream)}) without frames")
    promised = _promised(container, stream)
    whose = stream.duration is not None or len(container.streams) == 1
    if whose and promised is not None and end < promised * Fraction(9, 10):
        # No error: a last frame may rightly stay on screen for long, and Matroska counts no frames.
        logger.warning("%s: frames end after %.2f s of %.2f s; is it cut off?", path, end, promised)


def _resampled(shots: Iterable[_Shot], rate: Fraction) -> Iterator[_Shot]:
    """What is on screen at 0, 1 / rate, 2 / rate, ... seconds; at least one frame if there is any."""
    shown = None
    index = 0
    for shot in shots:
        while shown is not None and index / rate + _SAME_INSTANT < shot.start:
            yield shown
            index += 1
        shown = shot
    # Twice the tolerance, since start and duration of the last frame are both rounded.
    while shown is not None and (index == 0 or index / rate + 2 * _SAME_INSTANT < shown.end):
        yield shown
        index += 1


def _shots(path: str | Path, *, rate: Fraction | None) -> Iterator[_Shot]:
    """All frames of a file, resampled if there is a rate, not yet converted to RGB."""
    with _opened(path) as (container, stream):
        shots = _timed(path, container, stream)
        yield from shots if rate is None else _resampled(shots, rate)


def _pictures(
    path: str | Path, *, start: int, count: int | None, rate: Fraction | None
) -> Iterator[torch.Tensor]:
    """`iter_frames` after its checks."""
    stop = None if count is None else start + count
    seen = 0
    frame, picture = None, torch.empty(0)
    for shot in islice(_shots(path, rate=rate), stop):
        seen += 1
        if seen <= start:
            continue
        if shot.frame is not frame:
            before, picture = picture, _rgb(shot.frame)
            if frame is not None and before.shape != picture.shape:
                sizes = " to ".join(
                    f"{height} x {width}" for height, width, _ in (before.shape, picture.shape)
                )
                raise ValueError(f"{path} changes its size from {sizes} at frame {seen - 1}")
            frame = shot.frame
        yield picture
    if seen < (start + 1 if stop is None else stop):
        wanted = f"frame {start} on" if stop is None else f"frames {start} to {stop - 1}"
        at = "" if rate is None else f" at {float(rate):g} a second"
        raise ValueError(f"{path} has {seen} frames{at}, asked for {wanted}")


def _rgb(frame: VideoFrame) -> torch.Tensor:
    """A decoded frame as an upright picture in its own memory, uint8 [H, W, 3]."""
    picture = frame.to_ndarray(format="rgb24", interpolation=_SWSCALE)
    transposed, down, across = _orientation(frame)
    if transposed:
        picture = picture.transpose(1, 0, 2)
    return torch.from_numpy(picture[:: -1 if down else 1, :: -1 if across else 1].copy())


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """What turns a frame upright: transpose it?, then reverse its rows?, and its columns?"""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return False, False, False
    # x' = a x + c y, y' = b x + d y in fixed point (ISO/IEC 14496-12); the rest of the matrix moves and
    # projects.
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    if max(abs(b), abs(c)) * 50 < min(abs(a), abs(d)):
        return False, d < 0, a < 0
    if max(abs(a), abs(d)) * 50 < min(abs(b), abs(c)):
        return True, b < 0, c < 0
    raise ValueError(
        f"the video is to be turned by {frame.rotation} degrees; only multiples of 90 are possible"
    )
