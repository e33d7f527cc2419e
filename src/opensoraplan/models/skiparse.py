"""Skiparse: the orders in which a sparse stage keeps its tokens, and what attention needs to know of each.

Shapes: B batch, S video tokens, L text tokens, H heads, d head width, n the rate of a stage. Inside a stage
the video stream is [n, B, S/n, D]: n subsequences that attend only within themselves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opensoraplan.models.attention import additive_mask

ROPE_THETA = 10000.0
ROPE_SPLIT = (4, 6, 6)  # of 16: shares of a head's channels that turn with t, y and x

# A token index is i = a * n^2 + m * n + r. Single-skip attends within each r, ordered by (a, m); group-skip
# within each m, ordered by (a, r). Swapping r and m is its own inverse, so going from one to the other is one
# permutation.


def to_single_skip(x: Tensor, n: int) -> Tensor:
    """[B, S, ...] -> [n, B, S'/n, ...], S padded at its end with zeros to S', a multiple of n^2."""
    if n == 1:  # with the strides of a new tensor, which compiled blocks look at
        return x.contiguous().unsqueeze(0)
    padding = -x.shape[1] % n**2
    if padding:
        x = torch.cat([x, x.new_zeros(x.shape[0], padding, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, n)).movedim(2, 0).contiguous()


def swap_skip(x: Tensor) -> Tensor:
    """Single-skip to group-skip order and back: [n, B, S'/n, ...] -> the same shape."""
    n = x.shape[0]
    return x if n == 1 else x.unflatten(2, (-1, n)).transpose(0, 3).flatten(2, 3)


def from_group_skip(x: Tensor, tokens: int) -> Tensor:
    """[n, B, S'/n, ...] in group-skip order -> [B, S, ...], the padding dropped."""
    n = x.shape[0]
    return x.unflatten(2, (-1, n)).movedim(0, 2).flatten(1, 3)[:, :tokens]


def check_rates(rates: Sequence[int] | None, *, stages: int) -> None:
    """Raise ValueError unless there is a positive Skiparse rate for each stage (or None: dense)."""
    if rates is not None and (len(rates) != stages or any(n < 1 for n in rates)):
        raise ValueError(f"sparse_n needs {stages} rates, each at least 1, got {list(rates)}")


class Layout(NamedTuple):
    """What a block needs to know of one order of the tokens."""

    cos: Tensor  # [n, 1, S'/n, 1, d/2]
    sin: Tensor
    # [n * B, 1, 1, S'/n + L], True where attention may look, or floats to add; None where nothing is masked
    key_mask: Tensor | None
    rows: Tensor | None = None  # of the condition, for runs of tokens: see adaln.py


def rotary_tables(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, S, 1, d/2] in fp32 of every token's position (t, y, x), counted from 0."""
    angles = []
    for axis, (size, width) in enumerate(zip(grid, rotary_widths(head_dim), strict=True)):
        channel = torch.arange(0, width, 2, dtype=torch.float32, device=device)
        position = torch.arange(size, dtype=torch.float32, device=device)
        angle = torch.outer(position, ROPE_THETA ** (-channel / width))
        shape = [1, 1, 1, width // 2]
        shape[axis] = size
        angles.append(angle.view(shape).expand(*grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)[None, :, None]
    return angle.cos(), angle.sin()


def rotary_widths(head_dim: int) -> list[int]:
    return [head_dim * share // sum(ROPE_SPLIT) for share in ROPE_SPLIT]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [n, B, S/n, H, d] (fp32), by half-split rotation inside each of the three parts of a head."""
    widths = rotary_widths(x.shape[-1])
    halves = [width // 2 for width in widths]
    turned = []
    for part, c, s in zip(x.split(widths, -1), cos.split(halves, -1), sin.split(halves, -1), strict=True):
        first, second = part.chunk(2, dim=-1)
        turned += [first * c - second * s, second * c + first * s]
    return torch.cat(turned, dim=-1)


def make_layouts(
    n: int,
    tables: tuple[Tensor, Tensor],
    video_mask: Tensor | None,
    text_mask: Tensor | None,
    text_shape: Sequence[int],
    *,
    additive: torch.dtype | None = None,
) -> tuple[Layout, Layout]:
    """The single-skip and the group-skip layout of rate n: rotary tables, and key masks where anything is
    masked; with `additive`, of that dtype, to be added to scores.
    """
    cos, sin = (to_single_skip(table, n) for table in tables)
    tokens, device = tables[0].shape[1], cos.device
    single_mask = group_mask = None
    if video_mask is not None or text_mask is not None or tokens % n**2:
        batch, length = text_shape
        if video_mask is None:
            video_mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        if text_mask is None:
            text_mask = torch.ones(batch, length, dtype=torch.bool, device=device)
        text_keys = text_mask.expand(n, batch, length)
        single = to_single_skip(video_mask, n)  # padding becomes False
        single_mask, group_mask = (
            torch.cat([video_keys, text_keys], dim=-1).flatten(0, 1)[:, None, None]
            for video_keys in (single, swap_skip(single))
        )
        if additive is not None:
            single_mask, group_mask = (additive_mask(mask, additive) for mask in (single_mask, group_mask))
    return Layout(cos, sin, single_mask), Layout(swap_skip(cos), swap_skip(sin), group_mask)


def order_rows(n: int, rows: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """The rows [B, S] of tokens, the same for each `run` of them, in single-skip and in group-skip order:
    [1, B, U] with a row for each run where runs are whole n^2 groups, which keep their order; else for each
    token, [n, B, S'/n].
    """
    if run % n**2 == 0:
        of_runs = rows[:, ::run].unsqueeze(0)
        return of_runs, of_runs
    single = to_single_skip(rows, n)
    return single, swap_skip(single)
