"""Two things at a time where one does not need the other: the next is begun while this one is used."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def one_ahead(make: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[Made]:
    """Yield make(each of `given`) in turn. A thread makes one while the next is taken from `given`, and while
    the one before is used.
    """
    with ThreadPoolExecutor(1) as thread:
        following: Future[Made] | None = None
        for one in given:
            now, following = following, thread.submit(make, one)
            if now is not None:
                yield now.result()
        if following is not None:
            yield following.result()
