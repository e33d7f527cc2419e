"""Processes that run a function together, as ranks of one job, again and again without being started anew."""

import datetime
import itertools
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from command import FORKS

TIMEOUT = 300


class Ranks:
    """`count` processes; calling this runs a function of a module in the first `ranks` of them.

    Each of them calls `begin` at its start. They talk through torch's `backend`.
    """

    def __init__(
        self, count: int, *, backend: str = "gloo", begin: Callable[[], object] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._jobs = itertools.count()
        self._ask = [FORKS.SimpleQueue() for _ in range(count)]
        self._answers = FORKS.Queue()
        self._processes = [
            FORKS.Process(target=_serve, args=(rank, ask, self._answers, backend, begin), daemon=True)
            for rank, ask in enumerate(self._ask)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *args: Any, ranks: int) -> list[Any]:  # noqa: ANN401
        """What `function(*args)` returns on each rank; AssertionError with the traceback of one."""
        meeting = Path(self._folder.name) / str(next(self._jobs))
        for rank in range(ranks):
            self._ask[rank].put((function, args, ranks, str(meeting)))
        results: dict[int, Any] = {}
        while len(results) < ranks:
            job, rank, result, failure = self._answers.get(timeout=TIMEOUT)
            if job != str(meeting):  # of a job that failed in another rank first
                continue
            assert failure is None, f"rank {rank} of {ranks}: {failure}"
            results[rank] = result
        return [results[rank] for rank in range(ranks)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._folder.cleanup()


def _serve(
    rank: int,
    ask: Any,  # noqa: ANN401 (a queue)
    answers: Any,  # noqa: ANN401
    backend: str,
    begin: Callable[[], object] | None,
) -> None:
    torch.set_num_threads(1)
    if begin is not None:
        begin()
    while True:
        function, args, ranks, meeting = ask.get()
        dist.init_process_group(
            backend,
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=TIMEOUT),
        )
        try:
            answers.put((meeting, rank, function(*args), None))
        except Exception:
            answers.put((meeting, rank, None, traceback.format_exc()))
        finally:
            dist.destroy_process_group()
