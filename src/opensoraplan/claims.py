"""Claims let several processes share work: each claims a piece, and the claims of a dead
process are released.

A claim is a lock on a hidden file, which the kernel releases when the process ends for whatever reason. It
also excludes other threads. On a file system without locks, every claim is granted.
"""

import errno
import hashlib
import logging
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:
    msvcrt = None

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

LOCKS = ".osp-*.lock"
# Error numbers for a lock that another process holds.
_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK)
# Windows does not let others read a locked byte, so lock one far after the few that are written.
_LOCKED_BYTE = 1 << 30
# Seconds between checks of what other processes are still working on.
_POLL_S = 0.5


class Claim:
    """A claim that this process holds until `release`, the end of the `with` block, or the end
    of the process.

    `is_certain`: False on a file system without locks, where another process may hold the same claim.
    """

    def __init__(self, lock: Path, descriptor: int, *, is_certain: bool) -> None:
        self.is_certain = is_certain
        self._lock = lock
        self._descriptor: int | None = descriptor
        _held.add(self)

    def release(self) -> None:
        """Release the claim and remove its file. May be called twice."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        with suppress(OSError):  # Windows removes no open file: it is removed by the next who clears up
            self._lock.unlink()
        os.close(descriptor)

    def drop(self) -> None:
        """Drop the copy of the claim that a forked process has; the parent process keeps it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def claim(path: Path) -> Claim | None:
    """Claim `path`, which need not exist, in an existing folder. Returns None if another process, or other
    code in this one, has claimed it. Raises OSError if the folder cannot be written to.
    """
    return _claim_lock(lock_of(path))


@contextmanager
def hold_claim(path: Path, *, doing: str) -> Iterator[None]:
    """Hold a claim of `path` during the block. Raises ValueError if another process has claimed it; `doing`
    says what it does there, for example "training in runs/a".
    """
    own = claim(path)
    if own is None:
        raise ValueError(f"another process ({holder(path)}) is {doing}: wait for it or stop it")
    with own:
        if not own.is_certain:
            logger.warning("%s does not support file locks: do not use it from two processes", path.parent)
        yield


def is_claimed(path: Path) -> bool:
    """Whether `path` is claimed now."""
    own = claim(path)
    if own is not None:
        own.release()
    return own is None


def lock_of(path: Path) -> Path:
    """The hidden lock file for a claim of `path`. Its name is short even if that of `path` is long."""
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return path.with_name(f".osp-{digest}.lock")


def holder(path: Path) -> str:
    """Which process has claimed `path`, in words."""
    try:
        process, host = lock_of(path).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return "unknown"
    return f"{process} on {host}"


def clear_dead_claims(folder: Path) -> None:
    """Remove the lock files of processes that died."""
    for lock in folder.glob(LOCKS):
        with suppress(OSError):  # somebody else's, or gone
            dead = _claim_lock(lock)
            if dead is not None and dead.is_certain:
                dead.release()
            elif dead is not None:
                dead.drop()


def share_out(items: Iterable[Item], work: Callable[[Item], bool], *, what: str) -> None:
    """Call `work` for each item. It returns False for an item that another process is working on; these are
    tried again after all others, until every item is done. `what`: name of the items, for the log.
    """
    share_in_passes(items, lambda left: [item for item in left if not work(item)], what=what)


def share_in_passes(items: Iterable[Item], work: Callable[[list[Item]], list[Item]], *, what: str) -> None:
    """As `share_out`, but `work` gets all items at once and returns those that other processes work on."""
    left = list(items)
    waiting = False
    while left:
        others = work(left)
        if others and len(others) == len(left):
            if not waiting:
                logger.info("waiting for %d %s that other processes are making", len(others), what)
            waiting = True
            time.sleep(_POLL_S)
        left = others


def _claim_lock(lock: Path) -> Claim | None:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        is_certain = _try_lock(descriptor)
        if is_certain is not None and _is_still(descriptor, lock):
            with suppress(OSError):  # a full disk is no reason to share no work
                os.truncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
            return Claim(lock, descriptor, is_certain=is_certain)
        os.close(descriptor)
        if is_certain is None:
            return None
        # The last holder has removed the file since it was opened here: lock the new one.


def _try_lock(descriptor: int) -> bool | None:
    """Returns True if locked, False if the file system has no locks, None if another process has the lock."""
    try:
        if fcntl is not None:
            # Not lockf: it does not exclude this process, and reading the file would release the lock.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            return False
    except OSError as error:
        return None if error.errno in _TAKEN else False
    return True


def _is_still(descriptor: int, lock: Path) -> bool:
    """Whether the open file still has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


# Claims that a forked process, as of a data loader, must not keep: it may outlive its parent.
_held: weakref.WeakSet[Claim] = weakref.WeakSet()


def _drop_all() -> None:
    for one in list(_held):
        one.drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_all)
