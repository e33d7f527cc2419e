"""The command `osp`, from its first moment to its exit code. What takes time to import is imported only once
signals are dealt with.

A user's mistake ends in one line on stderr and exit code 2; a traceback is a bug of ours.
"""

import os
import signal
import sys

TYPE_CHECKING = False  # typing takes longer to import than all else here
if TYPE_CHECKING:
    from collections.abc import Callable

    from opensoraplan.cli.surroundings import Stop

# Where a shell says that nobody reads stdout any more: 128 and SIGPIPE.
_NOBODY_READS = 141


def main(job: "Callable[[list[str]], None] | None" = None, *, program: str = "osp") -> None:
    """Run the command, or another program's `job` of its command line in the same surroundings. Mistakes of
    the user end with exit code 2 and one message, anything else is a bug.
    """
    before = signal.getsignal(signal.SIGINT)
    is_usual = before is signal.default_int_handler
    if is_usual:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # for now: it ends without a traceback
    try:
        from opensoraplan.cli.surroundings import limit_spinning, settled

        limit_spinning()
        with settled(program) as stop:
            code = _run(job, program, stop)
    finally:
        if is_usual:
            signal.signal(signal.SIGINT, before)
    if code:
        sys.exit(code)


def _run(job: "Callable[[list[str]], None] | None", program: str, stop: "Stop") -> int:
    """Run the verb, or the job; what ends it becomes a message and an exit code."""
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
        if stop.signal is not None:  # whatever became of it: an import may turn it into an error of its own
            sys.stderr.write(f"{program}: stopped\n")
            return 128 + stop.signal
        if isinstance(error, BrokenPipeError) and error.filename == "stdout":
            return _NOBODY_READS
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
    # transformers reads this when it is imported. Its bars would break into ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _message(error: BaseException) -> str | None:
    """What to say of an error that a user can help; None for a bug of ours."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, ValueError | OSError | FloatingPointError | MemoryError):
        return str(error)
    if isinstance(error, RuntimeError):
        from opensoraplan.device import is_out_of_memory

        if is_out_of_memory(error):
            return f"memory is full: {str(error).partition(chr(10))[0]}"
    return None
