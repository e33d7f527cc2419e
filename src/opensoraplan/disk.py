"""Files that appear whole or not at all, in place of others or under free names. Full disks told in plain
words.
"""

import errno
import glob
import itertools
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

# Seconds without a write after which a temporary file is no live writer's.
_ABANDONED = 3600


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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file of another name, flush it to the disk, and rename it to `path`.

    Several may write the same file at once: the last to finish wins. What a killed writer of it left behind
    is removed once it is an hour old. Errors pass: see `plain_errors`.
    """
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        # Another writer may rename or remove it at any moment.
        with suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > _ABANDONED:
                old.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        flush(temporary)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_path(wanted: Path) -> Path:
    """A fresh hidden name in the folder of `wanted`, with its suffix, to write to before `publish`."""
    # Without the stem, which may already be as long as a name can be.
    return wanted.with_name(f".osp-{secrets.token_hex(8)}{wanted.suffix}")


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
    the name; nothing is left of an attempt that fails.
    """
    temporary = temporary_path(wanted)
    try:
        write(temporary)
        return publish(temporary, wanted)
    finally:
        temporary.unlink(missing_ok=True)


def claim(path: Path) -> None:
    """Make an empty file that must be new, with the permissions that any new file gets."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


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
    claim(path)
    try:
        temporary.replace(path)
    except OSError:
        path.unlink()
        raise


@contextmanager
def plain_errors(path: Path, *, whole: str) -> Iterator[None]:
    """Raise ValueError for a disk that is full or cannot be written to; `whole` says what is safe still."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "the disk is full" if full else str(error)
        raise ValueError(f"cannot write {path}: {what}; {whole}") from None
