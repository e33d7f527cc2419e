"""The table and the CSV behind `osp data check`."""

import csv
import os
import resource
from pathlib import Path

import pytest

from opensoraplan.data.check import table_of, write_csv
from opensoraplan.data.record import Record
from opensoraplan.data.selection import Selection, SelectionSettings, select

SETTINGS = SelectionSettings(
    num_frames=17, min_num_frames=9, drop_short_ratio=0.0, force_resolution=False, max_hxw=64 * 64
)


def record(name: str, *, frames: int = 24, fps: float = 24.0, caption: str = "x") -> Record:
    captions = (caption,) if caption else ()
    return Record(Path("clips") / name, captions, num_frames=frames, fps=fps, height=64, width=64)


@pytest.fixture
def selection() -> Selection:
    records = [
        record("a.mp4"),
        record("b.mp4", fps=12.0),
        record("c.jpg"),
        *(record(f"short{number}.mp4", frames=5) for number in range(5)),
        record("d.mp4", caption=""),
        record("e.mp4", frames=9),
        record("f.mp4", frames=48, fps=48.0),
    ]
    return select(records, SETTINGS)


def test_table(selection: Selection) -> None:
    # 17 + 9 + 17 frames at 24 a second, of 1 s, 9/24 s and 1 s; the image has no length.
    assert table_of(selection).splitlines() == [
        "  records  11",
        "  kept      4  3 videos and 1 images: 44 frames, 0.000498 h of 0.00066 h",
        "  dropped   7",
        "",
        "Dropped",
        "  too short   5  no valid number of frames (8k + 1) from min_num_frames on fits into it",
        "      clips/short0.mp4: 5 frames give 1, min_num_frames is 9",
        "      clips/short1.mp4: 5 frames give 1, min_num_frames is 9",
        "      clips/short2.mp4: 5 frames give 1, min_num_frames is 9",
        "  low fps     1  fewer frames a second than train_fps",
        "      clips/b.mp4: 12 fps, train_fps is 24",
        "  no caption  1  neither cap, caption or text, nor a .txt file of the same name",
        "      clips/d.mp4: no caption",
        "",
        "Shapes",
        "  T x H x W     samples",
        "  17 x 64 x 64        2  50.0%",
        "  1 x 64 x 64         1  25.0%",
        "  9 x 64 x 64         1  25.0%",
    ]


def test_table_when_all_or_nothing_is_kept() -> None:
    whole = table_of(select([record("a.mp4")], SETTINGS))
    assert "Dropped" not in whole
    assert "17 x 64 x 64" in whole
    nothing = table_of(select([record("a.mp4", caption="")], SETTINGS, allow_empty=True))
    assert "Shapes" not in nothing
    assert "no caption" in nothing


def test_csv_has_every_record_in_order(selection: Selection, tmp_path: Path) -> None:
    path = write_csv(selection, tmp_path / "table.csv")
    assert path == tmp_path / "table.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows][:4] == [
        os.path.join("clips", name) for name in ("a.mp4", "b.mp4", "c.jpg", "short0.mp4")
    ]
    assert len(rows) == 11
    assert list(rows[0].values()) == [rows[0]["path"], "kept", "", "", "17", "64", "64"]
    assert list(rows[1].values())[1:] == ["dropped", "low fps", "12 fps, train_fps is 24", "", "", ""]
    assert os.listdir(tmp_path) == ["table.csv"]


def test_csv_overwrites_nothing(selection: Selection, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("mine")
    assert write_csv(selection, tmp_path / "table.csv") == tmp_path / "table_1.csv"
    assert (tmp_path / "table.csv").read_text() == "mine"
    with pytest.raises(ValueError, match=r"written as \.csv, got .*table\.xlsx: use .*table\.csv"):
        write_csv(selection, tmp_path / "table.xlsx")
    with pytest.raises(FileNotFoundError):
        write_csv(selection, tmp_path / "gone" / "table.csv")
    assert sorted(os.listdir(tmp_path)) == ["table.csv", "table_1.csv"]


def test_csv_on_a_full_disk_leaves_nothing(selection: Selection, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond 100 bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_csv(selection, tmp_path / "table.csv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_csv_takes_names_that_are_not_utf8(tmp_path: Path) -> None:
    odd = Record(Path(os.fsdecode(b"gr\xf6\xdfe.mp4")), ("x",), error="gone")
    path = write_csv(select([odd], SETTINGS, allow_empty=True), tmp_path / "table.csv")
    assert "gr\\udcf6\\udcdfe.mp4" in path.read_text()
