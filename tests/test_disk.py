"""Files that are written whole: by several at once, and after one that was killed."""

import os
import time
from pathlib import Path

from opensoraplan.disk import write_whole


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"

    def slow(temporary: Path) -> None:
        temporary.write_text("the last to finish")
        write_whole(path, lambda file: file.write_text("another"))
        assert path.read_text() == "another"

    write_whole(path, slow)
    assert path.read_text() == "the last to finish"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_only_its_own_and_old_leftovers_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "a[1]*.txt"
    old, young = tmp_path / f".{path.name}.dead.tmp", tmp_path / f".{path.name}.live.tmp"
    other = tmp_path / ".a1b.txt.dead.tmp"
    for leftover in (old, young, other):
        leftover.write_text("part")
    hours_ago = time.time() - 2 * 3600
    for leftover in (old, other):
        os.utime(leftover, (hours_ago, hours_ago))
    write_whole(path, lambda file: file.write_text("whole"))
    assert sorted(tmp_path.iterdir()) == sorted((path, young, other))
