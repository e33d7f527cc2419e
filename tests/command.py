"""The command in the process of the tests, and in processes of its own."""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from opensoraplan import cli

# What a process takes to begin and to end; a hang takes for ever.
TIMEOUT = 120
# Processes are forked from one that has imported all that takes long.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("opensoraplan.cli.verbs", "opensoraplan.train.run.trainer", "opensoraplan.generate.session"),
        *("opensoraplan.parallel.apply", "torch._dynamo"),
    ]
)


class Outcome(NamedTuple):
    """How a command ended. `log` is what else it said on stderr."""

    code: int
    out: str
    err: str
    log: str


Command = Callable[..., Outcome]


def mistake(outcome: Outcome) -> str:
    """The one message of a command that failed as it should."""
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    assert outcome.err.count("osp: error: ") == 1, outcome.err
    return outcome.err.partition("osp: error: ")[2].strip()


class Running:
    """A command in a process of its own. It begins where torch and this package are imported already, which
    takes several seconds of a process that is started by Python.
    """

    def __init__(
        self,
        *words: object,
        folder: Path,
        program: Callable[[], None] = cli.main,
        environment: Mapping[str, str] | None = None,
        umask: int = 0o022,
    ) -> None:
        """`environment` is added to that of the tests."""
        self._folder = tempfile.TemporaryDirectory()
        self._said = Path(self._folder.name) / "said"
        variables = {**os.environ, **(environment or {})}
        job = ([*map(str, words)], folder, self._said, variables, program, umask)
        self._process = FORKS.Process(target=_run, args=job)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code, or minus the signal that ended it; None of a command under way."""
        return self._process.exitcode

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it if it is under way, and wait for the end."""
        self._process.kill()
        self._process.join(TIMEOUT)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Its exit code; AssertionError if it does not end."""
        self._process.join(timeout)
        assert self.code is not None, self.said()
        return self.code

    def said(self) -> str:
        """What it has written to stderr until now."""
        return self._said.read_text() if self._said.exists() else ""

    def wait_until(self, is_so: Callable[[], object]) -> None:
        """Wait for something that the command is to bring about."""
        end = time.monotonic() + TIMEOUT
        while not is_so():
            assert self.code is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)


def _run(
    words: list[str],
    folder: Path,
    said: Path,
    environment: Mapping[str, str],
    program: Callable[[], None],
    umask: int,
) -> None:
    import torch

    with said.open("wb") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.umask(umask)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # this process has inherited another than Python's
    sys.argv = ["osp", *words]
    program()
