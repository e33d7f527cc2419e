"""Entry point of the command `osp`: signals, streams, exit codes. Slow imports come after signal
handlers are installed.

A user's mistake gives one line on stderr and exit code 2; a traceback is a bug of ours.
"""

import os
import signal
import sys

TYPE_CHECKING = False  # importing typing would take longer than everything else here
if TYPE_CHECKING:
    from collections.abc import Callable

    from opensoraplan.cli.surroundings import Stop

# A shell's exit code for a command that SIGPIPE ended: 128 + 13.
_BROKEN_PIPE = 141


def main(job: "Callable[[list[str]], None] | None" = None, *, program: str = "osp") -> None:
    """Run the command, or another program's `job`, which gets the command line. Mistakes of the user end with
    one message and exit code 2; anything else is a bug.
    """
    before = signal.getsignal(signal.SIGINT)
    is_usual = before is signal.default_int_handler
    if is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # during imports, Ctrl-C ends without a traceback
    try:
        from opensoraplan.cli.surroundings import guard_signals_and_streams, limit_spinning

        limit_spinning()
        with guard_signals_and_streams(program) as stop:
            code = _run(job, program, stop)
    finally:
        if is_usual:
            signal.signal(signal.SIGINT, before)
    if code:
        sys.exit(code)


def _run(job: "Callable[[list[str]], None] | None", program: str, stop: "Stop") -> int:
    """Run the verb, or the job. Turns errors into a message and an exit code."""
    try:
        try:
            _set_up_logging()
            if job is None:
                from opensoraplan.cli.verbs import run as job

            job(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        if stop.signal is not None:  # whatever the error is: imports may turn the interrupt into another one
            sys.stderr.write(f"{program}: stopped\n")
            return 128 + stop.signal
        if isinstance(error, BrokenPipeError) and error.filename == "stdout":
            return _BROKEN_PIPE
        message = _message(error)
        if message is None:
            raise
        sys.stderr.write(f"{program}: error: {message}\n")
        return 2
    return 0


def _set_up_logging() -> None:
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("opensoraplan").setLevel(logging.INFO)
    # transformers reads this when it is imported. Its progress bars would interrupt ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _message(error: BaseException) -> str | None:
    """The message for an error that the user can do something about; None for a bug of ours."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, ValueError | OSError | FloatingPointError | MemoryError):
        return str(error)
    if isinstance(error, RuntimeError):
        from opensoraplan.device import is_out_of_memory

        if is_out_of_memory(error):
            return f"memory is full: {str(error).partition(chr(10))[0]}"
    return None
