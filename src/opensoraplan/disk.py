"""Files that appear whole or not at all, and disks that are full told in plain words."""

import errno
import glob
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

# Seconds without a write after which a temporary file is no live writer's.
_ABANDONED = 3600


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


@contextmanager
def plain_errors(path: Path, *, whole: str) -> Iterator[None]:
    """Raise ValueError for a disk that is full or cannot be written to; `whole` says what is safe still."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "the disk is full" if full else str(error)
        raise ValueError(f"cannot write {path}: {what}; {whole}") from None
