"""Contact sheets of videos."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opensoraplan.data.sheet import contact_sheet
from opensoraplan.data.video import VideoWriter


def video(path: Path, *, frames: int, size: int) -> Path:
    """Frames of one grey each, brighter and brighter."""
    with VideoWriter(path, fps=12) as writer:
        grey = torch.linspace(0, 240, frames).to(torch.uint8)
        writer.write(grey.view(-1, 1, 1, 1).expand(-1, size, size, 3).contiguous())
    return path


def test_rows_are_videos_and_columns_their_frames_from_first_to_last(tmp_path: Path) -> None:
    videos = [video(tmp_path / "a.mp4", frames=9, size=32), video(tmp_path / "b.mp4", frames=2, size=48)]
    out = contact_sheet(videos, tmp_path / "new" / "sheet.png", columns=3)
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (32 + 2 + 48, 3 * 32 + 2 * 2, 3)
    first = [sheet[16, 16 + 34 * i, 0] for i in range(3)]
    assert first == pytest.approx([0, 120, 240], abs=6)
    second = [sheet[34 + 24, 24 + 50 * i, 0] for i in range(2)]
    assert second == pytest.approx([0, 240], abs=6)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    clip = video(tmp_path / "a.mp4", frames=1, size=32)
    first = contact_sheet([clip], tmp_path / "sheet.png")
    assert contact_sheet([clip], tmp_path / "sheet.png") != first


@pytest.mark.parametrize(
    ("videos", "out", "columns", "message"),
    [
        ([], "sheet.png", 7, "at least one video"),
        (["a.mp4"], "sheet.jpg", 7, "use .*sheet.png"),
        (["a.mp4"], "sheet.png", 0, "columns must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, videos: list[str], out: str, columns: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet([tmp_path / name for name in videos], tmp_path / out, columns=columns)
