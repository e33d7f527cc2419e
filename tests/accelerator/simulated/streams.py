"""Streams and events of the simulated card, which compute at once and check order.

Each stream counts its operations, and knows how far of every other stream it has waited for. Memory knows
which stream wrote it and which have read it: an operation on another stream that has not waited for that is
an error, and so is memory that is freed and taken again while a stream that was not waited for may still use
it. A non-blocking copy is made when somebody has waited for it: who reads its target earlier gets the old
values.
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch

from simulated.memory import Block


class OrderError(RuntimeError):
    """Two streams use the same memory, and neither waits for the other."""


class Stream:
    """A queue of operations. `seen`: how many of each other stream's operations have come to an end before
    what is put into this one now.
    """

    def __init__(self, device: object = None, priority: int = 0, **_: Any) -> None:  # noqa: ANN401, ARG002
        self.number = next(_numbers)
        self.priority = priority
        self.clock = 0
        self.seen: dict[Stream, int] = {}
        self.copies: list[tuple[int, Callable[[], None]]] = []
        self.freed: list[tuple[Stream, int]] = []  # who used memory of this stream that is free again
        _all.append(self)

    def __repr__(self) -> str:
        return f"stream {self.number}"

    @property
    def device(self) -> torch.device:
        return torch.device("npu", 0)

    def wait_stream(self, other: Self) -> None:
        self._learn(other, other.clock, other.seen)

    def wait_event(self, event: "Event") -> None:
        if event.stream is not None:
            self._learn(event.stream, event.time, event.seen)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        HOST._learn(self, self.clock, self.seen)
        _finish_copies()

    def query(self) -> bool:
        return _known(HOST, self) >= self.clock

    def _learn(self, other: "Stream", time: int, seen: "dict[Stream, int]") -> None:
        for stream, count in (*seen.items(), (other, time)):
            self.seen[stream] = max(self.seen.get(stream, 0), count)


_numbers = itertools.count()
_all: list[Stream] = []
# What the host has waited for, no stream has to wait for any more.
HOST = Stream()
DEFAULT = Stream()
COLLECTIVES = Stream()
_current = threading.local()


class Event:
    """A place in a stream."""

    def __init__(self, device: object = None, *, enable_timing: bool = False) -> None:  # noqa: ARG002
        self.stream: Stream | None = None
        self.time = 0
        self.seen: dict[Stream, int] = {}
        self.enable_timing = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or current()
        self.time, self.seen = self.stream.clock, dict(self.stream.seen)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current()).wait_event(self)

    def synchronize(self) -> None:
        HOST.wait_event(self)
        _finish_copies()

    def query(self) -> bool:
        return self.stream is None or _known(HOST, self.stream) >= self.time

    def elapsed_time(self, end: "Event") -> float:
        if not (self.query() and end.query()):
            raise OrderError("the time between two events is not known before both were waited for")
        return 1.0


def current() -> Stream:
    """The stream that this thread puts operations into."""
    return getattr(_current, "stream", DEFAULT)


def set_current(stream: Stream) -> None:
    _current.stream = stream


@contextmanager
def used(stream: Stream | None) -> Iterator[None]:
    """Put operations into this stream meanwhile."""
    before = current()
    set_current(stream or before)
    try:
        yield
    finally:
        set_current(before)


def synchronize_all() -> None:
    for stream in _all:
        HOST._learn(stream, stream.clock, stream.seen)
    _finish_copies()


def forget() -> None:
    """As at the start of the process, for the next test."""
    synchronize_all()
    _all[:] = [HOST, DEFAULT, COLLECTIVES]
    for stream in _all:
        stream.freed = []
    set_current(DEFAULT)


def begin_operation() -> Stream:
    """Of an operation that is put into the current stream."""
    stream = current()
    stream.clock += 1
    return stream


def touch(stream: Stream, block: Block, *, name: str, writes: bool) -> None:
    """Note that an operation of the stream reads or writes a block. Raises OrderError if it would have to
    wait for another stream, and does not.
    """
    if block.writer is not None:
        _check(stream, *block.writer, what="writes", name=name)
    if writes:
        for reader, time in block.readers.items():
            _check(stream, reader, time, what="reads", name=name)
        block.readers.clear()
        block.writer = stream, stream.clock
    else:
        block.readers[stream] = stream.clock
    for copy in block.arriving:
        copy()
    block.arriving.clear()


def start_copy(stream: Stream, copy: Callable[[], None], target: Block | None) -> None:
    """Have a copy made once somebody waits for the stream; `target`: its block, if that is on the card."""
    done = False

    def once() -> None:
        nonlocal done
        if not done:
            done = True
            copy()

    stream.copies.append((stream.clock, once))
    if target is not None:
        target.arriving.append(once)


def note_freed(block: Block) -> None:
    """Its memory is what the stream that it was made in takes next."""
    users = {**block.readers, **(dict([block.writer]) if block.writer else {})}
    home = block.born_on
    home.freed += [user for user in users.items() if user[0] not in (home, *block.recorded)]


def taken_too_early(stream: Stream) -> str | None:
    """What is wrong if the stream takes memory that was freed in it, None if nothing is."""
    users, stream.freed = stream.freed, []
    for user, time in users:
        if _known(stream, user) < time:
            return f"{stream} takes freed memory that {user} may use: record_stream, or wait for it"
    return None


def _check(stream: Stream, other: Stream, time: int, *, what: str, name: str) -> None:
    if other is not stream and _known(stream, other) < time:
        raise OrderError(f"{name} in {stream} does not wait for {other}, which {what} the same memory")


def _known(stream: Stream, other: Stream) -> int:
    return max(stream.seen.get(other, 0), HOST.seen.get(other, 0))


def _finish_copies() -> None:
    for stream in _all:
        known = HOST.seen.get(stream, 0)
        for time, copy in stream.copies:
            if time <= known:
                copy()
        stream.copies = [one for one in stream.copies if one[0] > known]
