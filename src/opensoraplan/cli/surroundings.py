"""The command's process: signals, standard streams that are closed or cannot encode every character, narrow
terminals, busy cores.
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

# Signals that stop the command. A terminal sends SIGHUP when it is closed.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# Seconds until a signal that Python has dropped is sent again.
_AGAIN_S = 0.05
# Fewest columns for help: with a single one, tyro never finishes wrapping.
_NARROWEST = 40
# ASCII in place of the boxes of help.
_ASCII = str.maketrans("╭╮╰╯─│├┤┬┴┼━┃", "++++-|+++++-|")


class StopError(KeyboardInterrupt):
    """A signal stops the command. Not a plain KeyboardInterrupt: if that passes through code compiled from a
    string, as in dataclasses, Python ends by SIGINT even if the error is caught.
    """


class Stop:
    """Handler of the signals that stop the command. `signal`: the first one received, if any."""

    def __init__(self, program: str) -> None:
        self.signal: signal.Signals | None = None
        self._program = program
        self._unraisable = sys.unraisablehook

    def ask(self, number: int, _frame: FrameType | None) -> None:
        """Raise StopError, whatever the signal."""
        if not _work_may_have_started():  # libraries may abort if their import is interrupted
            with suppress(OSError):
                os.write(2, f"{self._program}: stopped\n".encode())
            os._exit(128 + number)
        if self.signal is None:
            self.signal = signal.Signals(number)
        elif number != signal.SIGINT:
            return  # already stopping; only a second Ctrl-C interrupts that
        raise StopError

    def ask_again(self, dropped: Any) -> None:  # noqa: ANN401 (sys.UnraisableHookArgs, in stubs only)
        """Handle exceptions that Python drops, as in callbacks of imports and in destructors. If it was a
        StopError, send its signal again a moment later.
        """
        if not isinstance(dropped.exc_value, StopError) or self.signal is None:
            self._unraisable(dropped)
            return
        number, self.signal = self.signal, None
        threading.Timer(_AGAIN_S, _thread.interrupt_main, (number,)).start()


def _work_may_have_started() -> bool:
    """Whether work may have started: it needs torch."""
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


@contextmanager
def guard_signals_and_streams(program: str) -> Iterator[Stop]:
    """In the block, signals raise StopError, and the standard streams accept every character."""
    _open_missing_streams()
    codecs.register_error("osp", _replace_unencodable)
    streams = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _reopen(sys.stdout, 1, errors="osp", name="stdout")
    if sys.stderr is sys.__stderr__:
        sys.stderr = _reopen(sys.stderr, 2, errors="backslashreplace", name=None)
    if _columns() < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST)
    stop = Stop(program)
    before, unraisable = {}, sys.unraisablehook
    sys.unraisablehook = stop.ask_again
    for number in STOPPING if threading.current_thread() is threading.main_thread() else ():
        # Signals that nohup, or a shell for background jobs, has set to be ignored stay ignored.
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
    """Limit how long threads of GNU OpenMP spin while they wait, unless the user has set it. Call this
    before importing torch.

    By default they spin so long that small models are ten times slower on busy cores (`docs/log.md`). A short
    spin costs nothing on idle cores; on busy cores it is best not to spin at all.
    """
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return
    with suppress(OSError, AttributeError):  # Windows has no load average
        if os.getloadavg()[0] > len(os.sched_getaffinity(0)):
            os.environ["OMP_WAIT_POLICY"] = "passive"
            return
    os.environ["GOMP_SPINCOUNT"] = "10000"


def _columns() -> int:
    """The width that help is wrapped at."""
    try:
        return int(os.environ.get("COLUMNS", "")) or os.get_terminal_size(1).columns
    except (ValueError, OSError):  # help takes 80
        return _NARROWEST


def _open_missing_streams() -> None:
    """Open /dev/null in place of closed standard streams: the next file opened would get their descriptor."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    """Replacement for characters that stdout cannot encode."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_ASCII)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


class _StandardStream(io.FileIO):
    """A standard stream whose reader may go away. Later writes are lost; if the stream has a `title`, the
    first one raises an OSError that names it.
    """

    def __init__(self, descriptor: int, title: str | None) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._title = title

    def write(self, data: Any) -> int:  # noqa: ANN401 (as its base class has it)
        try:
            return super().write(data)
        except OSError as error:
            with open(os.devnull, "w") as nowhere:  # also for libraries that write to the descriptor
                os.dup2(nowhere.fileno(), self.fileno())
            if self._title is not None:
                raise OSError(error.errno, error.strerror, self._title) from None
            return memoryview(data).nbytes


def _reopen(stream: TextIO | None, descriptor: int, *, errors: str, name: str | None) -> TextIO:
    """Reopen a standard stream as `_Stream`. `stream` is None if the caller had closed it."""
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_StandardStream(descriptor, name)),
        encoding="utf-8" if stream is None else stream.encoding,
        errors=errors,
        line_buffering=name is None or os.isatty(descriptor),
    )
