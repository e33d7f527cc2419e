"""Files and folders that appear whole or not at all, in place of others or under free names. Full disks told
in plain words.

What is being made lies in a hidden folder beside its later place, `.osp-HEX.partial`. Its process has claimed
it; when that is dead, the next process that makes something beside it removes it.
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

# Seconds without a change after which nobody works there any more, where the file system has no locks.
_ABANDONED = 3600
# How the names begin of unfinished files and claims.
OWN = ".osp-"
_PARTIAL = f"{OWN}*.partial"


def user_cache_folder() -> Path:
    """Where things are kept that can be made again: $XDG_CACHE_HOME/opensoraplan, or the system's usual
    place. It need not exist. Raises RuntimeError for a user without a home.
    """
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    if given := os.environ.get(variable):
        return Path(given) / "opensoraplan"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "opensoraplan"


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # which flushes neither folders nor what is open for reading only
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder with its parents; if the block raises, remove those that are new, unless something is in
    them by then. Raises OSError if it cannot be made.
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
def workplace(folder: Path) -> Iterator[Path]:
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
    """Remove a folder with what is in it, also if a signal comes in the middle of that."""
    try:
        shutil.rmtree(place, ignore_errors=True)
    except KeyboardInterrupt:
        shutil.rmtree(place, ignore_errors=True)
        raise


def clear_dead(folder: Path) -> None:
    """Remove what processes that died left in `folder`: unfinished files, and claims."""
    for place in folder.glob(_PARTIAL):
        with suppress(OSError):  # somebody else's, or gone
            own = claim(place)
            if own is None:
                continue
            with own:
                if own.is_certain or time.time() - place.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(place, ignore_errors=True)
    clear_dead_claims(folder)


# Every file of a large folder is written by `workplace`, which need not look through it each time.
_clear_dead_once = cache(clear_dead)


def permit(path: Path) -> None:
    """Let those read a new file, or the files of a new folder, who may read what this process makes as usual:
    the umask says who. safetensors lets the user alone read what it writes.
    """
    # The umask itself cannot be asked without being changed, for other threads, too.
    probe = (path if path.is_dir() else path.parent) / f"{OWN}{secrets.token_hex(8)}"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    usual = os.fstat(descriptor).st_mode & 0o666
    os.close(descriptor)
    probe.unlink()
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(usual)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file in another place, flush it to the disk, and rename it to `path`.

    Several may write the same file at once: the last to finish wins. Raises OSError that names `path`.
    """
    with named_errors(path), workplace(path.parent) as place:
        temporary = place / path.name
        write(temporary)
        permit(temporary)
        flush(temporary)
        temporary.replace(path)


def numbered(path: Path) -> Iterator[Path]:
    """clip.mp4, clip_1.mp4, clip_2.mp4, ..."""
    yield path
    for number in itertools.count(1):
        yield path.with_name(f"{path.stem}_{number}{path.suffix}")


def publish(temporary: Path, wanted: Path) -> Path:
    """Move a finished file to the first of the `numbered` names of `wanted` that does not exist.

    Returns the name taken. Never overwrites, and no two callers get the same name. Both are in one file
    system.
    """
    names = numbered(wanted)
    while True:
        path = next(names)
        with suppress(FileExistsError):
            _move_to_new(temporary, path)
            return path


def write_new(wanted: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` make a file, and give it the name `wanted` or, if that is taken, one with a number. Returns
    the name; nothing is left of an attempt that fails. Raises OSError that names `wanted`.
    """
    with named_errors(wanted), workplace(wanted.parent) as place:
        temporary = place / wanted.name
        write(temporary)
        permit(temporary)
        return publish(temporary, wanted)


def _move_to_new(temporary: Path, path: Path) -> None:
    """Move a file to a name that must be new, or raise FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        _move_without_link(temporary, path)
    else:
        temporary.unlink()


def _move_without_link(temporary: Path, path: Path) -> None:
    """`_move_to_new` where the file system has no hard links: an empty file holds the name for a moment."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        temporary.replace(path)
    except OSError:
        path.unlink()
        raise


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Errors of the disk in the block become OSErrors that name `path`, not a temporary file or nothing."""
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
def plain_errors(path: Path, *, whole: str) -> Iterator[None]:
    """Raise ValueError for a disk that is full or cannot be written to; `whole` says what is safe still."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        raise ValueError(f"cannot write {path}: {what}; {whole}") from None
