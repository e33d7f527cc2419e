"""Prefetching: the next result is computed in a thread while the current one is used."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def map_ahead(make: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[Made]:
    """Yield make(item) for each item of `given`, in order. A thread computes a result while the caller uses
    the one before and the next item is taken from `given`.
    """
    with ThreadPoolExecutor(1) as thread:
        following: Future[Made] | None = None
        for one in given:
            now, following = following, thread.submit(make, one)
            if now is not None:
                yield now.result()
        if following is not None:
            yield following.result()
