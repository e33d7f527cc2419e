"""The job behind `osp reconstruct`: encodes and decodes a real video, measures PSNR and SSIM, and writes both
side by side. data/video.py reads and writes video, models/vae.py has the models.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from opensoraplan.data.video import (
    VideoInfo,
    VideoWriter,
    count_frames,
    fit,
    iter_frames,
    iter_timed_frames,
    probe,
    to_uint8,
)
from opensoraplan.disk import make_folder
from opensoraplan.fidelity import Fidelity
from opensoraplan.models.vae import VideoVAE
from opensoraplan.runtime.placement import fit_decoding
from opensoraplan.shapes import Strides, check_frames, check_sides, latent_shape, nearest_frames

logger = logging.getLogger(__name__)

# SSIM uses a Gaussian window of 11 pixels; 16 is the smallest multiple of 8 that holds one.
_SMALLEST_SIDE = 16

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reconstruction:
    """`psnr` in dB and mean `ssim` over `frames` x `height` x `width`; `path` of the mp4."""

    psnr: float
    ssim: float
    frames: int
    height: int
    width: int
    path: Path


@dataclass(frozen=True)
class Excerpt:
    """What is taken of a video. `frames`: 8k + 1; None takes as many as there are. `height`, `width`:
    multiples of 8, at least 16; None takes the source's, or follows from the other one, rounded down; frames
    are cropped to this aspect ratio. `fps` resamples the source; without it, frames keep their times, also at
    a variable rate.
    """

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | Fraction | None = None


@torch.no_grad()
def reconstruct(
    path: str | Path,
    *,
    vae: VideoVAE,
    out: str | Path,
    excerpt: Excerpt = Excerpt(),
    progress: Progress | None = None,
) -> Reconstruction:
    """Encode an excerpt of the video at `path` to the mode of its latents, decode that, compare.

    Computes on the device and in the dtype of `vae`. `out`: the mp4, source left and result right; its folder
    is made, and a number is added if the name is taken. Both metrics compare 8-bit pixels. The source is read
    twice, so that only latents are kept in memory. `progress(step, done, total)` gets "encode" or "decode"
    and numbers of frames.

    Raises FileNotFoundError, and ValueError for a file without readable video, too few frames, impossible
    sizes, and a result that is not finite.
    """
    source = _Source.open(path, excerpt, strides=vae.strides)
    frames, height, width = source.frames, source.height, source.width
    grid = latent_shape(frames, height, width, strides=vae.strides, patch=1)
    fit_decoding(vae, [grid], vae.device, more=False)  # it encodes as many, for which nothing is predicted

    out = Path(out)
    fidelity = Fidelity()
    title = f"{Path(path).name}: source, WF-VAE"
    with (
        make_folder(out.parent),
        VideoWriter(out, fps=source.rate, title=title, timed=source.timed) as writer,
    ):
        latents = _encode(source, vae, progress)
        for before, after, times in _decode(latents, source, vae, progress):
            fidelity.update(before, after)
            writer.write(torch.cat([before, after], dim=2), times=times)
    result = Reconstruction(fidelity.psnr, fidelity.ssim, frames, height, width, writer.path)
    logger.info(
        "%s: %d frames of %d x %d, PSNR %.2f dB, SSIM %.4f -> %s",
        *(path, frames, height, width, result.psnr, result.ssim, result.path),
    )
    return result


@dataclass(frozen=True)
class _Source:
    """A video, and what is taken of it; `fps` None keeps its frames."""

    path: str | Path
    info: VideoInfo
    frames: int
    height: int
    width: int
    fps: float | Fraction | None

    @classmethod
    def open(cls, path: str | Path, excerpt: Excerpt, *, strides: Strides) -> Self:
        """Raises as `reconstruct`."""
        if excerpt.frames is not None:
            check_frames(excerpt.frames, strides=strides)
        info = probe(path)
        height, width = _size(info, height=excerpt.height, width=excerpt.width, stride=strides.spatial)
        frames = _length(path, frames=excerpt.frames, fps=excerpt.fps, strides=strides)
        return cls(path, info, frames, height, width, excerpt.fps)

    @property
    def timed(self) -> bool:
        """Whether frames keep times of their own."""
        return self.info.variable and self.fps is None

    @property
    def rate(self) -> float | Fraction:
        return self.info.fps if self.fps is None else self.fps

    def pictures(self) -> Iterator[Tensor]:
        return iter_frames(self.path, count=self.frames, fps=self.fps)

    def fitted(self, pictures: Iterator[Tensor], count: int) -> Tensor:
        """The next `count` pictures at most, [3, t, H, W] in [-1, 1]."""
        return fit(torch.stack(list(islice(pictures, count))), height=self.height, width=self.width)


def _encode(source: _Source, vae: VideoVAE, progress: Progress | None) -> Tensor:
    """The mode of the source's latents [1, C, t, h, w]."""
    pictures, step = source.pictures(), vae.strides.temporal
    pieces = (source.fitted(pictures, step) for _ in range(0, source.frames, step))
    counted = _report_progress(pieces, "encode", source.frames, progress)
    moments = vae.iter_encode(piece[None].to(vae.device, vae.dtype) for piece in counted)
    return torch.cat(list(moments), dim=2).chunk(2, dim=1)[0]  # a Gaussian's mode is its mean


def _decode(
    latents: Tensor, source: _Source, vae: VideoVAE, progress: Progress | None
) -> Iterator[tuple[Tensor, Tensor, list[tuple[Fraction, Fraction]] | None]]:
    """Pictures of the source and what came back of them, uint8 [t, H, W, 3], and their times if they have any
    of their own.
    """
    times: list[tuple[Fraction, Fraction]] = []
    again = _note_times(source.path, source.frames, times) if source.timed else source.pictures()
    pieces = (decoded[0] for decoded in vae.iter_decode(latents))
    for piece in _report_progress(pieces, "decode", source.frames, progress):
        if not piece.isfinite().all():
            raise ValueError(f"{source.path}: the VAE's result is not finite in {vae.dtype}; use float32")
        before = to_uint8(source.fitted(again, piece.shape[1])).to(piece.device)
        yield before, to_uint8(piece), times[-len(before) :] if source.timed else None


def _note_times(path: str | Path, count: int, times: list[tuple[Fraction, Fraction]]) -> Iterator[Tensor]:
    """Yield the frames of a video, and append the times of each to `times`."""
    for picture, time in iter_timed_frames(path, count=count):
        times.append(time)
        yield picture


def _size(info: VideoInfo, *, height: int | None, width: int | None, stride: int) -> tuple[int, int]:
    """The sides to work at, those given or from the source, multiples of `stride`; ValueError if
    they cannot be.
    """

    def down(side: int) -> int:
        return side // stride * stride

    if height is None:
        height = down(info.height if width is None else width * info.height // info.width)
        width = down(info.width) if width is None else width
    elif width is None:
        width = down(height * info.width // info.height)
    check_sides(height, width, multiple=stride)
    if min(height, width) < _SMALLEST_SIDE:
        raise ValueError(f"SSIM needs sides of at least {_SMALLEST_SIDE}, got {height} x {width}")
    return height, width


def _length(path: str | Path, *, frames: int | None, fps: float | Fraction | None, strides: Strides) -> int:
    """The number of frames to take, 8k + 1. Raises ValueError if the video has fewer than asked for."""
    there = count_frames(path, fps=fps, limit=frames)
    below, _ = nearest_frames(there, strides=strides)
    if frames is None:
        if below < there:
            logger.info("%s: the last %d of %d frames are left out", path, there - below, there)
        return below
    if there < frames:
        raise ValueError(f"{path} has {there} frames, asked for {frames}: use {below} or fewer")
    return frames


def _report_progress(
    pieces: Iterable[Tensor], step: str, total: int, progress: Progress | None
) -> Iterator[Tensor]:
    """Yield pieces [3, t, H, W] and report each finished one to `progress`."""
    done = 0
    for piece in pieces:
        yield piece
        done += piece.shape[1]
        if progress is not None:
            progress(step, done, total)
