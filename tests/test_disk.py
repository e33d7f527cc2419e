"""Files that are written whole or under free names: by several at once, and after one that was killed."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from opensoraplan.disk import _move_without_link, write_new, write_whole


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


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_new(tmp_path / "a.json", half)
    assert os.listdir(tmp_path) == []


def test_publishing_at_once_never_overwrites(tmp_path: Path) -> None:
    def publish_one(text: str) -> Path:
        return write_new(tmp_path / "file.json", lambda file: file.write_text(text))

    texts = [str(i) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(publish_one, texts))
    assert [path.read_text() for path in paths] == texts
    assert {path.name for path in paths} == {"file.json", *(f"file_{i}.json" for i in range(1, 24))}
    assert len(os.listdir(tmp_path)) == 24


def test_moving_without_hard_links(tmp_path: Path) -> None:
    temporary, target = tmp_path / "temporary", tmp_path / "target"
    temporary.write_text("new")
    _move_without_link(temporary, target)
    assert (target.read_text(), temporary.exists()) == ("new", False)
    temporary.write_text("newer")
    with pytest.raises(FileExistsError):
        _move_without_link(temporary, target)
    assert (target.read_text(), temporary.read_text()) == ("new", "newer")
    with pytest.raises(FileNotFoundError):
        _move_without_link(tmp_path / "missing", tmp_path / "other")
    assert not (tmp_path / "other").exists()
