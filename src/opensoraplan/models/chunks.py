"""A clip in chunks of frames, and a frame in overlapping tiles: what is encoded or decoded at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opensoraplan.shapes import check_frames

_MOST_NUMBERS = 2**31 - 1

if TYPE_CHECKING:
    from opensoraplan.models.wfvae import StreamState


def frame_chunks(pieces: Iterable[Tensor], step: int | None) -> Iterator[Tensor]:
    """A clip in pieces [B, 3, t, H, W] of any length -> frame 0 and `step` more, then `step` at a time,
    then what is left (None: the whole clip). Raises ValueError before the last chunk if the clip is not
    8k + 1 frames long.
    """
    waiting: list[Tensor] = []
    frames = 0
    size = step + 1 if step else None
    for piece in pieces:
        frames += piece.shape[2]
        waiting.append(piece)
        while size and sum(w.shape[2] for w in waiting) >= size:
            ready = _cat(waiting)
            yield ready[:, :, :size]
            waiting, size = [ready[:, :, size:]], step
    check_frames(frames)
    if any(w.shape[2] for w in waiting):
        yield _cat(waiting)


def _cat(pieces: list[Tensor]) -> Tensor:
    """As torch.cat, but without a copy of a single piece."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def latent_chunks(frames: int, step: int | None) -> Iterator[tuple[int, int, int]]:
    """(start, stop, look-ahead) of the chunks in which latent frames are decoded: frame 0 and `step` more,
    then `step` at a time, each with one more to look ahead at, except at the end. None: the whole clip.
    """
    start, done = 0, frames if step is None else step + 1
    while step is not None and done < frames:
        yield start, done + 1, 1
        start, done = done, done + step
    yield start, frames, 0


def latents_at_a_time(wanted: int, *, frame: int) -> int:
    """How many latent frames to encode or decode at a time: `wanted`, or fewer where the input of a
    convolution of the widest layer, of `frame` numbers a frame, would have more numbers than 32 bits count,
    beyond which cards convolve slowly or not at all.
    """
    most = (_MOST_NUMBERS // frame - 3) // 4  # two frames in front, frame 0, and four for each
    return max(1, min(wanted, most))


@dataclass
class Tile:
    """A window of H and W, with its own stream."""

    rows: slice
    columns: slice
    stream: "StreamState | None"


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover `size` with at least `overlap` between neighbours; the last one
    ends at `size`.
    """
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def blend(
    outputs: list[Tensor], tiles: list[Tile], size: tuple[int, int], overlap: int, zoom: float
) -> Tensor:
    """Join the outputs of tiles into [.., H * zoom, W * zoom], weighted by ramps over
    `overlap` (before zoom).
    """
    height, width = (int(side * zoom) for side in size)
    total = outputs[0].new_zeros(*outputs[0].shape[:-2], height, width)
    weight = outputs[0].new_zeros(height, width)
    for output, tile in zip(outputs, tiles, strict=True):
        top, left = int(tile.rows.start * zoom), int(tile.columns.start * zoom)
        rows = edge_ramp(output.shape[-2], top, height, int(overlap * zoom), output)
        columns = edge_ramp(output.shape[-1], left, width, int(overlap * zoom), output)
        window = (..., slice(top, top + len(rows)), slice(left, left + len(columns)))
        share = rows[:, None] * columns
        total[window] += output * share
        weight[window] += share
    return total / weight


def edge_ramp(length: int, start: int, size: int, overlap: int, like: Tensor) -> Tensor:
    """Weights [length] of a tile at `start` of `size`: 1, falling towards each edge that has a neighbour."""
    ramp = torch.linspace(0, 1, overlap + 2, dtype=like.dtype, device=like.device)[1:-1]
    weights = like.new_ones(length)
    if start > 0:
        weights[:overlap] *= ramp
    if start + length < size:
        weights[-overlap:] *= ramp.flip(0)
    return weights
