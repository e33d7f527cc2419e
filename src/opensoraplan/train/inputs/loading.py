"""Micro-batches in the order that a sampler gives, read ahead by worker processes; and the account of what
they could not read.
"""

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from opensoraplan.data.buckets import BucketSampler, Draw
from opensoraplan.data.dataset import BadFiles
from opensoraplan.parallel.ranks import Ranks, sendable

Item = TypeVar("Item")
Batch = TypeVar("Batch")

# Batches that a worker has ready, and what those of all workers may take. A clip of the release's size is 0.9
# GB.
_MOST_AHEAD, _AHEAD_BYTES = 4, 2 * 10**9


class _MicroBatches(torch.utils.data.Sampler[list[Draw]]):
    """The draws of micro-batches, begun anew by each loader."""

    def __init__(self, order: Callable[[], Iterator[list[Draw]]]) -> None:
        self._order = order

    def __iter__(self) -> Iterator[list[Draw]]:
        return self._order()


class _Batches(Dataset[Batch | Exception], Generic[Item, Batch]):
    """Whole micro-batches. An error is an item like any other: raised in a worker process, torch would make a
    traceback in text of it.
    """

    def __init__(self, dataset: Dataset[Item], collate: Callable[[list[Item]], Batch]) -> None:
        self._dataset = dataset
        self._collate = collate

    def __getitem__(self, draws: list[Draw]) -> Batch | Exception:
        try:
            return self._collate([self._dataset[draw] for draw in draws])
        except Exception as error:
            if get_worker_info() is not None:
                error.add_note(traceback.format_exc())  # which does not travel by itself
            return sendable(error)


def shares_of_steps(sampler: BucketSampler, steps: range, *, accumulate: int) -> Iterator[list[Draw]]:
    """The micro-batches of each of these steps, for one process alone."""
    for step in steps:
        yield from sampler.share(step, rank=0, ranks=1, accumulate=accumulate)


def micro_batches(
    dataset: Dataset[Item],
    order: Callable[[], Iterator[list[Draw]]],
    *,
    workers: int,
    collate: Callable[[list[Item]], Batch],
    batch_bytes: int,
) -> Generator[Batch, None, None]:
    """Yield the micro-batches whose draws `order` gives, in that order.

    `workers` processes read ahead, each one batch at least, and up to four as long as all of them, of
    `batch_bytes` at most, take less than 2 GB; 0 reads in this process. Raises what the dataset raises,
    the same with any number of workers, and ValueError for a worker that died. Close the generator to
    end the workers.
    """
    loader = DataLoader(
        _Batches(dataset, collate),
        sampler=_MicroBatches(order),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=_ahead(workers, batch_bytes) if workers else None,
        worker_init_fn=ignore_signals,
    )
    with closing(iterate(loader)) as items:
        for batch in items:
            if isinstance(batch, Exception):
                raise batch
            yield batch


def iterate(loader: DataLoader[Item]) -> Generator[Item, None, None]:
    """Yield what a loader yields. Its workers end with the generator, by SIGKILL, since they may ignore all
    else: Python would wait for them for ever at exit.

    Raises ValueError, with what may help, when a worker has died: at the next item and never in between, as
    torch's signal handler does, so that a death does not interrupt the update of weights.
    """
    others = multiprocessing.active_children()
    items = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    with _default_handler(signal.SIGCHLD):
        try:
            while True:
                _check_alive(workers)
                try:
                    item = next(items)
                except StopIteration:
                    return
                except Exception:
                    # The connection to a dying process breaks shortly before its end is known.
                    connection.wait([worker.sentinel for worker in workers], timeout=1)
                    _check_alive(workers)
                    raise
                yield item
        finally:
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.join()


def _check_alive(workers: Sequence[BaseProcess]) -> None:
    """Raise ValueError for a worker that has ended, which none does by itself."""
    codes = [worker.exitcode for worker in workers if worker.exitcode is not None]
    if codes:
        by = signal.Signals(-codes[0]).name if codes[0] < 0 else f"exit code {codes[0]}"
        raise ValueError(
            f"a worker process that reads clips has died ({by}): memory or /dev/shm may be full (lower "
            "data.workers or data.batch_size), or a file crashes the video library (try another data.reader)"
        )


@contextmanager
def _default_handler(number: signal.Signals) -> Iterator[None]:
    """No Python function handles this signal inside the block. In other threads than the main one, which
    cannot choose, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


def _ahead(workers: int, batch_bytes: int) -> int:
    return max(1, min(_MOST_AHEAD, _AHEAD_BYTES // (workers * batch_bytes)))


def _as_it_is(batch: Batch) -> Batch:
    return batch


def ignore_signals(_worker: int) -> None:
    """A signal to the whole process group asks the main process to stop; its workers end when it does."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class BadFileAccount(BadFiles):
    """An account of unreadable files that a resumed run goes on with."""

    def state_dict(self) -> dict[str, str]:
        """What is wrong with each file, by its path, for JSON."""
        return {str(path): message for path, message in self._messages.items()}

    def share(self, ranks: Ranks) -> None:
        """Take over what other processes could not read; all of them call this. Raises ValueError in all if
        together it is too much.
        """
        self.load_state_dict(ranks.merged(self.state_dict()))
        self.add(())

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Go on from what `state_dict` gave."""
        self._messages = {Path(path): message for path, message in state.items()}
