"""Contact sheets: frames of videos side by side in one picture, to look at many at a glance."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from opensoraplan.data.video import count_frames, read_numbered
from opensoraplan.disk import write_new

# White between frames, in pixels.
_GAP = 2


def contact_sheet(videos: Sequence[Path], out: Path, *, columns: int = 7) -> Path:
    """Write a .png with a row for each video: `columns` frames of it, from the first to the last.

    Each row has the size of its video's frames. Returns the path, numbered if `out` exists. Raises
    ValueError for a file without readable video, no videos, or another suffix.
    """
    if not videos:
        raise ValueError("a contact sheet needs at least one video")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if out.suffix.lower() != ".png":
        raise ValueError(f"a contact sheet is a .png, got {out}: use {out.with_suffix('.png')}")
    rows = [_row(video, columns=columns) for video in videos]
    height = sum(row.shape[0] + _GAP for row in rows) - _GAP
    width = max(row.shape[1] for row in rows)
    sheet = torch.full((height, width, 3), 255, dtype=torch.uint8)
    top = 0
    for row in rows:
        sheet[top : top + row.shape[0], : row.shape[1]] = row
        top += row.shape[0] + _GAP
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(sheet.numpy())
    return write_new(out, lambda file: picture.save(file, format="PNG"))


def _row(video: Path, *, columns: int) -> Tensor:
    """Frames of a video side by side, uint8 [H, W, 3]."""
    count = count_frames(video)
    wanted = min(columns, count)
    places = [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]
    frames = read_numbered(video, places)
    gap = torch.full((frames.shape[1], _GAP, 3), 255, dtype=torch.uint8)
    parts = [part for frame in frames for part in (frame, gap)]
    return torch.cat(parts[:-1], dim=1)
