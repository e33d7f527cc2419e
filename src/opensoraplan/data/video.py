"""Writes video with PyAV (H.264 mp4), and has the pixel transform of training. Re-exports what reads video.

Not here: how video is read (reading.py, probing.py), which clips to take, captions, batches.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import av
import av.error
import numpy as np
import torch
import torch.nn.functional as F
from av.container import OutputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL.Image import Image

from opensoraplan.data.probing import VideoInfo, probe
from opensoraplan.data.reading import (
    SWSCALE,
    Reader,
    TooShortError,
    count_frames,
    frame_rate,
    installed_reader,
    iter_frames,
    iter_timed_frames,
    read_frames,
    read_numbered,
)
from opensoraplan.data.sizes import Framing
from opensoraplan.disk import name_path_in_errors, publish, work_folder

__all__ = [
    "Reader",
    "TooShortError",
    "VideoInfo",
    "VideoWriter",
    "count_frames",
    "fit",
    "frame_rate",
    "installed_reader",
    "iter_frames",
    "iter_timed_frames",
    "probe",
    "read_frames",
    "read_numbered",
    "scale_and_cut",
    "to_uint8",
]

# ITU-T H.273's code of BT.709 (primaries, transfer and matrix alike), and FFmpeg's of limited range.
_BT709 = 1
_LIMITED_RANGE = 1
# Time base of videos with a variable rate, in seconds: frames of all usual rates last a whole number of it.
_TIMED_TICK = Fraction(1, 90_000)


def fit(frames: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """Centre-crop uint8 frames [T, H, W, 3] to the aspect ratio of `height` x `width` and resize them.

    Returns float32 [3, T, height, width] in [-1, 1]. This is the original's training transform: bicubic with
    both `antialias` and `align_corners` of torch on (which scales by (in - 1) / (out - 1), yet keeps pixel
    centres, and so differs from either alone). Overshoots of the filter are clamped. Frames of that size
    keep their values.
    """
    _check_pixels(frames)
    crop = _centre_crop(frames, height=height, width=width)
    return _resize(crop, Framing((height, width), top=0, left=0, height=height, width=width))


def scale_and_cut(frames: torch.Tensor, framing: Framing) -> torch.Tensor:
    """Resize whole uint8 frames [T, H, W, 3] to `framing.resized` and keep the part of them that it names.

    Returns float32 [3, T, height, width] in [-1, 1]. This is the original's training transform where sizes
    are not forced (MaxHWStrideResizeVideo, SpatialStrideCropVideo); values are as in `fit`.
    """
    _check_pixels(frames)
    return _resize(frames, framing)


def _resize(frames: torch.Tensor, framing: Framing) -> torch.Tensor:
    """A part of the resized frames as float32 [3, T, height, width] in [-1, 1]."""
    rows = slice(framing.top, framing.top + framing.height)
    columns = slice(framing.left, framing.left + framing.width)
    result = torch.empty(3, len(frames), framing.height, framing.width, device=frames.device)
    # Frame by frame: a whole clip in float at the source's size may be many times the result.
    for index, frame in enumerate(frames):
        pixels = frame.permute(2, 0, 1)[None].float() / 255  # [1, 3, H, W]
        pixels = F.interpolate(pixels, framing.resized, mode="bicubic", antialias=True, align_corners=True)
        result[:, index] = pixels[0, :, rows, columns].clamp(0, 1) * 2 - 1
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
    is x264's quality, from 1 (best) to 51. `title` and `comment` are stored as mp4 metadata. With `timed`,
    frames come with the times that they are on screen, and `fps` is only their mean. `path` is the name asked
    for and, after the block, the name given. Raises ValueError for a name, fps, crf or frames that cannot be;
    on entry, FileNotFoundError, PermissionError and the like for a folder that cannot be written to.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float | Fraction,
        crf: int = 18,
        title: str | None = None,
        comment: str | None = None,
        timed: bool = False,
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
        self._tick = _TIMED_TICK if timed else 1 / self._rate
        self._crf = crf
        self._metadata = {"title": title, "comment": comment}
        self._stack = ExitStack()
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None
        self._written = 0
        self._durations: dict[int, int] = {}

    def __enter__(self) -> Self:
        # Made now, so that a folder that cannot be written to is an error before any work.
        with name_path_in_errors(self.path):
            self._temporary = self._stack.enter_context(work_folder(self.path.parent)) / self.path.name
        return self

    def write(
        self, frames: torch.Tensor, *, times: Sequence[tuple[Fraction, Fraction]] | None = None
    ) -> None:
        """Append frames, uint8 [t, H, W, 3]; all chunks of one video have the same even H and W. `times`, for
        a writer that is `timed`: when each of them appears and disappears, in seconds.
        """
        _check_pixels(frames)
        height, width = frames.shape[1:3]
        if self._container is None or self._stream is None:
            self._container, self._stream = self._start(height=height, width=width)
        first = (self._stream.height, self._stream.width)
        if (height, width) != first:
            raise ValueError(f"{self.path}: frames of {height} x {width} after {first[0]} x {first[1]}")
        for index, picture in enumerate(frames.cpu().numpy()):
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace=_BT709,
                dst_color_range=_LIMITED_RANGE,
                interpolation=SWSCALE,
                threads=1,  # see reading.py
            )
            frame.time_base, frame.pts = self._tick, self._written
            if times is not None:
                start, end = (round(time / self._tick) for time in times[index])
                frame.pts, self._durations[start] = start, end - start
            with name_path_in_errors(self.path):  # where the disk is found full
                self._mux(self._stream.encode(frame))
            self._written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with name_path_in_errors(self.path), self._stack:
            if kind is None:
                self._finish()
            elif self._container is not None:
                with suppress(av.error.FFmpegError):
                    self._container.close()

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
        codec.time_base = self._tick
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        return container, stream

    def _mux(self, packets: Sequence[Packet]) -> None:
        assert self._container is not None
        for packet in packets:
            # x264 gives the last frame the usual duration.
            if packet.pts in self._durations:
                packet.duration = self._durations.pop(packet.pts)
            self._container.mux(packet)

    def _finish(self) -> None:
        if self._container is None or self._stream is None or not self._written:
            raise ValueError(f"{self.path}: no frames were written")
        with self._container:
            self._mux(self._stream.encode(None))
        self.path = publish(self._temporary, self.path)


def write_video(frames: Sequence[Image], path: str | Path, *, fps: float) -> Path:
    """Write PIL images of one size, such as `pipe(...).frames[0]`, as an mp4. Returns its path, which has a
    number if the name was taken. Raises what `VideoWriter` raises.
    """
    with VideoWriter(path, fps=fps) as writer:
        for frame in frames:
            writer.write(torch.from_numpy(np.asarray(frame.convert("RGB")).copy())[None])
    return writer.path


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
