"""Micro-batches in the order that a sampler gives, read ahead by worker processes; and the account of what
they could not read.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from opensoraplan.data.buckets import BucketSampler, Draw
from opensoraplan.data.dataset import BadFiles
from opensoraplan.parallel.ranks import Ranks

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
    """Whole micro-batches. An error that tells a user what is wrong with the data is an item like any other:
    raised in a worker process, it would reach the user as a traceback in text.
    """

    def __init__(self, dataset: Dataset[Item], collate: Callable[[list[Item]], Batch]) -> None:
        self._dataset = dataset
        self._collate = collate

    def __getitem__(self, draws: list[Draw]) -> Batch | Exception:
        try:
            return self._collate([self._dataset[draw] for draw in draws])
        except (ValueError, OSError) as error:
            return error


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
) -> Iterator[Batch]:
    """Yield the micro-batches whose draws `order` gives, in that order.

    `workers` processes read ahead, each one batch at least, and up to four as long as all of them, of
    `batch_bytes` at most, take less than 2 GB; 0 reads in this process. Raises what the dataset raises,
    ValueError and OSError as they are with any number of workers.
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
    with explained_workers():
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch


@contextmanager
def explained_workers() -> Iterator[None]:
    """Turn torch's error for a worker process that has died into a ValueError that says what may help."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(
            f"{error}. A worker that reads clips has died: /dev/shm or memory may be full (lower "
            "data.workers or data.batch_size), or a file breaks the video library (try another data.reader)"
        ) from error


def _ahead(workers: int, batch_bytes: int) -> int:
    return max(1, min(_MOST_AHEAD, _AHEAD_BYTES // (workers * batch_bytes)))


def _as_it_is(batch: Batch) -> Batch:
    return batch


def ignore_signals(_worker: int) -> None:
    """A signal to the whole process group asks the main process to stop; its workers end when it does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


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
