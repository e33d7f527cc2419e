"""Files that are written whole or under free names: by several at once, and after one that was killed."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensoraplan.disk import _move_without_link, clear_dead, make_folder, write_new, write_whole


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"

    def slow(temporary: Path) -> None:
        temporary.write_text("the last to finish")
        write_whole(path, lambda file: file.write_text("another"))
        assert path.read_text() == "another"

    write_whole(path, slow)
    assert path.read_text() == "the last to finish"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_what_a_dead_writer_left_is_cleared(tmp_path: Path) -> None:
    """A writer that is killed in the middle leaves its work; one that lives keeps it."""
    code = """
import sys, time
from pathlib import Path
from opensoraplan.disk import write_whole
def write(path):
    path.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
write_whole(Path(sys.argv[1]), write)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "file.txt")]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as alive,
        subprocess.Popen(command, stdout=subprocess.PIPE) as dead,
    ):
        try:
            for process in (alive, dead):
                assert process.stdout is not None
                assert process.stdout.readline() == b"writing\n"
            (tmp_path / ".osp-probed.json").write_text("somebody's")
            dead.kill()
            dead.wait()
            assert len(list(tmp_path.rglob("file.txt"))) == 2
            clear_dead(tmp_path)
            (left,) = tmp_path.rglob("file.txt")
            assert left.read_text() == "half"
            write_whole(tmp_path / "file.txt", lambda file: file.write_text("whole"))
            assert left.exists()
            assert len(os.listdir(tmp_path)) == 4  # theirs, the file, and another's claim and work
        finally:
            alive.kill()
    clear_dead(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".osp-probed.json", "file.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_who_may_read_a_file_is_for_the_umask_to_say(tmp_path: Path, umask: int) -> None:
    tmp_path.chmod(0o775)  # a folder that a group shares
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "a", lambda file: save_file({"x": torch.zeros(1)}, file))
        write_new(tmp_path / "b", lambda file: save_file({"x": torch.zeros(1)}, file))
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"]
    assert modes == [0o666 & ~umask] * 2


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.json'"):
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


def test_folders_that_were_made_go_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for folder in ("new/deep", "old/deep", "old/full"):
        with suppress(ValueError), make_folder(tmp_path / folder):
            if folder == "old/full":
                (tmp_path / folder / "file").touch()
            raise ValueError
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "old",
        "old/full",
        "old/full/file",
    ]
