"""Micro-batches in the order that a sampler gives, read ahead by worker processes."""

import signal
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from opensoraplan.data.buckets import BucketSampler, Draw

Item = TypeVar("Item")
Batch = TypeVar("Batch")


class _MicroBatches(torch.utils.data.Sampler[list[Draw]]):
    """The draws of each micro-batch of steps `start` to `stop` of one process."""

    def __init__(self, sampler: BucketSampler, *, start: int, stop: int, accumulate: int) -> None:
        self._sampler = sampler
        self._steps = range(start, stop)
        self._accumulate = accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in self._steps:
            yield from self._sampler.share(step, rank=0, ranks=1, accumulate=self._accumulate)


def micro_batches(
    dataset: Dataset[Item],
    sampler: BucketSampler,
    *,
    start: int,
    stop: int,
    accumulate: int,
    workers: int,
    collate: Callable[[list[Item]], Batch],
) -> Iterator[Batch]:
    """Yield `accumulate` micro-batches for each step from `start` to before `stop`, always in this order.

    `workers` processes read ahead; 0 reads in this one. What a batch holds depends on its step only.
    """
    order = _MicroBatches(sampler, start=start, stop=stop, accumulate=accumulate)
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_signals,
    )
    yield from loader


def ignore_signals(_worker: int) -> None:
    """A signal to the whole process group asks the main process to stop; its workers end when it does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
