"""What the command finds around it: signals, streams that are closed or cannot write every letter, terminals
too narrow for a word, cores that are busy.
"""

import _thread
import codecs
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

# Signals that ask the command to stop. The terminal that it was started in sends SIGHUP when it is closed.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Seconds until a signal is sent again that Python has dropped.
_AGAIN_S = 0.05
# Columns that help needs: at one it is wrapped for ever.
_NARROWEST = 40
# What help draws its boxes with.
_ASCII = str.maketrans("╭╮╰╯─│├┤┬┴┼━┃", "++++-|+++++-|")


class StopError(KeyboardInterrupt):
    """A signal asks the command to stop. After a plain KeyboardInterrupt that went through code in a string,
    as dataclasses have some, Python ends by SIGINT, even if the error was caught.
    """


class Stop:
    """`signal`: the first that asked the command to stop, if any did."""

    def __init__(self, program: str) -> None:
        self.signal: signal.Signals | None = None
        self._program = program
        self._unraisable = sys.unraisablehook

    def ask(self, number: int, _frame: FrameType | None) -> None:
        """End what is going on as Ctrl-C does, whatever the signal."""
        if not _can_have_begun():  # and libraries that are being imported may abort if they are interrupted
            with suppress(OSError):
                os.write(2, f"{self._program}: stopped\n".encode())
            os._exit(128 + number)
        if self.signal is None:
            self.signal = signal.Signals(number)
        elif number != signal.SIGINT:
            return  # it is being done; a second Ctrl-C is for those who cannot wait
        raise StopError

    def ask_again(self, dropped: Any) -> None:  # noqa: ANN401 (sys.UnraisableHookArgs, in stubs only)
        """Take what Python drops, as it does in callbacks of imports and where objects are removed. If it was
        a StopError, ask once more when that is over.
        """
        if not isinstance(dropped.exc_value, StopError) or self.signal is None:
            self._unraisable(dropped)
            return
        number, self.signal = self.signal, None
        threading.Timer(_AGAIN_S, _thread.interrupt_main, (number,)).start()


def _can_have_begun() -> bool:
    """Whether any work may be under way: none is without torch."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


@contextmanager
def settled(program: str) -> Iterator[Stop]:
    """In the block signals raise KeyboardInterrupt, and the streams take whatever is written."""
    _open_missing_streams()
    codecs.register_error("osp", _without_letters)
    streams = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _reopened(sys.stdout, 1, errors="osp", name="stdout")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _reopened(sys.stderr, 2, errors="backslashreplace", name=None)
    if _columns() < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST)
    stop = Stop(program)
    before, unraisable = {}, sys.unraisablehook
    sys.unraisablehook = stop.ask_again
    for number in STOPPING if threading.current_thread() is threading.main_thread() else ():
        # Not one that is to be ignored: nohup says so, and a shell to what runs in the background.
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = signal.signal(number, stop.ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = unraisable
        sys.stdout, sys.stderr = streams


def limit_spinning() -> None:
    """Set how threads of GNU OpenMP wait for each other, unless the user has. Call it before importing torch.

    By default they spin for a long time, which makes small models ten times slower on busy cores
    (`docs/log.md`). A short spin costs nothing on idle cores; on busy ones it is best not to spin at all.
    """
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return
    with suppress(OSError, AttributeError):  # Windows has no load average
        if os.getloadavg()[0] > len(os.sched_getaffinity(0)):
            os.environ["OMP_WAIT_POLICY"] = "passive"
            return
    os.environ["GOMP_SPINCOUNT"] = "10000"


def _columns() -> int:
    """The width that help would be wrapped at."""
    try:
        return int(os.environ.get("COLUMNS", "")) or os.get_terminal_size(1).columns
    except (ValueError, OSError):  # help takes 80
        return _NARROWEST


def _open_missing_streams() -> None:
    """A stream that the caller has closed gets what is opened next, be it a video: fill its place."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _without_letters(error: UnicodeError) -> tuple[str, int]:
    """How letters are written that stdout cannot encode."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_ASCII)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


class _Stream(io.FileIO):
    """A standard stream whose reader may go away. What is written after that is lost, which is no error, or,
    if the stream has a `title`, the first time an OSError that names it.
    """

    def __init__(self, descriptor: int, title: str | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._title = title

    def write(self, data: Any) -> int:  # noqa: ANN401 (as its base class has it)
        try:
            return super().write(data)
        except OSError as error:
            with open(os.devnull, "w") as nowhere:  # for libraries that write by themselves, too
                os.dup2(nowhere.fileno(), self.fileno())
            if self._title is not None:
                raise OSError(error.errno, error.strerror, self._title) from None
            return memoryview(data).nbytes


def _reopened(stream: TextIO | None, descriptor: int, *, errors: str, name: str | None) -> TextIO:
    """The same stream by `_Stream`. `stream` is None if the caller had closed it."""
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Stream(descriptor, name)),
        encoding="utf-8" if stream is None else stream.encoding,
        errors=errors,
        line_buffering=name is None or os.isatty(descriptor),
    )
