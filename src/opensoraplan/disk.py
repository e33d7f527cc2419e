"""Atomic writing: files and folders appear complete or not at all, under free names or in place of others.
Turns errors of full disks into plain messages.

Unfinished files are in a hidden folder next to their destination, `.osp-HEX.partial`, which their process has
claimed. If that process dies, the next one that writes there removes the folder.
"""

import errno
import itertools
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from safetensors import SafetensorError

from opensoraplan.claims import claim, clear_dead_claims

# Without file locks, an unfinished folder counts as abandoned after this many seconds without a change.
_ABANDONED = 3600
# Prefix of the names of unfinished files and claims.
OWN = ".osp-"
_PARTIAL = f"{OWN}*.partial"


def user_cache_folder() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME/opensoraplan, or the system's usual place. It need not exist.
    Raises RuntimeError for a user without a home.
    """
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    if given := os.environ.get(variable):
        return Path(given) / "opensoraplan"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "opensoraplan"


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # Windows flushes neither folders nor files that are open for reading only
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def make_folder(folder: Path) -> Iterator[None]:
    """Make a folder with its parents. If the block raises, remove the new ones that are still empty. Raises
    OSError if the folder cannot be made.
    """
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in new:
            with suppress(OSError):
                place.rmdir()
        raise


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder`, to make files in that are moved to their places when they are whole. It is
    removed at the end of the block with what is left in it. Raises OSError if it cannot be made.
    """
    _clear_dead_once(folder.absolute())
    place = folder / f"{OWN}{secrets.token_hex(8)}.partial"
    own = claim(place)
    assert own is not None, "a random name that another process has, too"
    with own:
        try:
            place.mkdir()
            yield place
        finally:
            _remove(place)


def _remove(place: Path) -> None:
    """Remove a folder with its content, even if a signal arrives meanwhile."""
    try:
        shutil.rmtree(place, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(place, ignore_errors=True)
        raise


def clear_dead(folder: Path) -> None:
    """Remove unfinished files and claims of dead processes from `folder`."""
    for place in folder.glob(_PARTIAL):
        with suppress(OSError):  # somebody else's, or gone
            own = claim(place)
            if own is None:
                continue
            with own:
                if own.is_certain or time.time() - place.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(place, ignore_errors=True)
    clear_dead_claims(folder)


# Cached, since `work_folder` would search a large folder for each file that is written to it.
_clear_dead_once = cache(clear_dead)


def apply_umask(path: Path) -> None:
    """Give a new file, or the files of a new folder, the permissions that the umask gives to new files:
    safetensors makes files that only the user may read.
    """
    # A probe file, since reading the umask means changing it for all threads.
    probe = (path if path.is_dir() else path.parent) / f"{OWN}{secrets.token_hex(8)}"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    usual = os.fstat(descriptor).st_mode & 0o666
    os.close(descriptor)
    probe.unlink()
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(usual)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file elsewhere, flush it to the disk, and rename it to `path`.

    Several processes may write the same file: the last one to finish wins. Raises OSError that names `path`.
    """
    with name_path_in_errors(path), work_folder(path.parent) as place:
        temporary = place / path.name
        write(temporary)
        apply_umask(temporary)
        flush(temporary)
        temporary.replace(path)


def numbered_paths(path: Path) -> Iterator[Path]:
    """clip.mp4, clip_1.mp4, clip_2.mp4, ..."""
    yield path
    for number in itertools.count(1):
        yield path.with_name(f"{path.stem}_{number}{path.suffix}")


def publish(temporary: Path, wanted: Path) -> Path:
    """Move a finished file to the first of the `numbered_paths` of `wanted` that does not exist. Returns it.

    Never overwrites, and no two callers get the same name. Both paths must be in one file system.
    """
    names = numbered_paths(wanted)
    while True:
        path = next(names)
        with suppress(FileExistsError):
            _move_to_new(temporary, path)
            return path


def write_new(wanted: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` make a file, and give it the name `wanted` or, if that is taken, one with a number. Returns
    the name; nothing is left of an attempt that fails. Raises OSError that names `wanted`.
    """
    with name_path_in_errors(wanted), work_folder(wanted.parent) as place:
        temporary = place / wanted.name
        write(temporary)
        apply_umask(temporary)
        return publish(temporary, wanted)


def _move_to_new(temporary: Path, path: Path) -> None:
    """Move a file to `path`, or raise FileExistsError if it exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        _move_without_link(temporary, path)
    else:
        temporary.unlink()


def _move_without_link(temporary: Path, path: Path) -> None:
    """`_move_to_new` for file systems without hard links: an empty file reserves the name."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        temporary.replace(path)
    except OSError:
        path.unlink()
        raise


@contextmanager
def name_path_in_errors(path: Path) -> Iterator[None]:
    """Make disk errors in the block name `path` instead of a temporary file or nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not (error.filename is None or OWN in str(error.filename)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@contextmanager
def explain_disk_errors(path: Path, *, whole: str) -> Iterator[None]:
    """Raise ValueError for a disk that is full or cannot be written to; `whole` says what is safe still."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        raise ValueError(f"cannot write {path}: {what}; {whole}") from None
