"""The report of `osp data check` on a selection: a table, and a CSV with every
record. selection.py decides.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from opensoraplan.data.selection import EXAMPLES, Selection
from opensoraplan.disk import write_new


def table_of(selection: Selection) -> str:
    """The table: what is kept, what is dropped by reason with examples, and the shapes of what is kept."""
    kept, dropped = len(selection.kept), len(selection.dropped)
    blocks = [
        _align(
            [
                ("records", str(kept + dropped), ""),
                ("kept", str(kept), _totals(selection)),
                ("dropped", str(dropped), ""),
            ]
        )
    ]
    if dropped:
        blocks.append("Dropped\n" + "\n".join(_dropped_lines(selection)))
    if kept:
        shapes = sorted(selection.shapes.items(), key=lambda item: (-item[1], item[0]))
        rows = [("T x H x W", "samples", "")] + [
            (" x ".join(map(str, shape)), str(count), f"{count / kept:.1%}") for shape, count in shapes
        ]
        blocks.append("Shapes\n" + _align(rows))
    return "\n\n".join(blocks)


def write_csv(selection: Selection, path: str | Path) -> Path:
    """One row a record in the manifest's order: path, kept or dropped, reason, detail, frames, height, width.

    Nothing is overwritten: if `path` exists, the file gets _1, _2, ... before its suffix. Returns its name;
    it appears only when complete. Raises ValueError for another suffix than .csv and FileNotFoundError,
    PermissionError and the like for a folder that cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() != ".csv":
        raise ValueError(f"the table is written as .csv, got {path}: use {path.with_suffix('.csv')}")

    def write(temporary: Path) -> None:
        # Names of files may hold bytes that are not UTF-8.
        with temporary.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "status", "reason", "detail", "frames", "height", "width"))
            writer.writerows(_csv_rows(selection))

    return write_new(path, write)


def _csv_rows(selection: Selection) -> Iterator[tuple[str | int, ...]]:
    rows: list[tuple[int, tuple[str | int, ...]]] = [
        (sample.index, (str(sample.record.path), "kept", "", "", *sample.shape)) for sample in selection.kept
    ]
    rows += [
        (drop.index, (str(drop.record.path), "dropped", drop.reason.value, drop.detail, "", "", ""))
        for drop in selection.dropped
    ]
    for _, row in sorted(rows):
        yield row


def _totals(selection: Selection) -> str:
    """Frames and hours of one epoch, and of the clips that they are taken from."""
    frames = sum(sample.num_frames for sample in selection.kept)
    videos = [sample for sample in selection.kept if not sample.record.is_image]
    seconds = sum(sample.num_frames for sample in videos) / selection.settings.train_fps
    of = sum((video.record.num_frames or 0) / video.record.fps for video in videos if video.record.fps)
    return (
        f"{len(videos)} videos and {len(selection.kept) - len(videos)} images: {frames} frames, "
        f"{seconds / 3600:.3g} h of {of / 3600:.3g} h"
    )


def _dropped_lines(selection: Selection) -> Iterator[str]:
    reasons = selection.reasons()
    name_width = max(len(reason) for reason in reasons)
    count_width = max(len(str(len(drops))) for drops in reasons.values())
    for reason, drops in reasons.items():
        yield f"  {reason:<{name_width}}  {len(drops):>{count_width}}  {reason.sentence}"
        for drop in drops[:EXAMPLES]:
            # The detail of an unreadable file names it already.
            path = str(drop.record.path)
            yield "      " + (drop.detail if path in drop.detail else f"{path}: {drop.detail}")


def _align(rows: Sequence[tuple[str, str, str]]) -> str:
    """Rows of a name, a number and a remark, each number flush right."""
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"  {name:<{widths[0]}}  {number:>{widths[1]}}  {remark}".rstrip() for name, number, remark in rows
    )
