"""Memory of the simulated card: blocks that are counted while they live, and a cap."""

import threading
from collections.abc import Callable
from typing import Any

import torch

# Bytes that an allocation is rounded up to, as the allocators of cards do it.
GRAIN = 512


class Block:
    """One allocation: the host's storage that stands for it, and who has used it (see streams.py).

    It hangs on the device's storage, and dies with it.
    """

    def __init__(self, memory: "Memory", host: torch.UntypedStorage, born_on: Any) -> None:  # noqa: ANN401
        self.host = host
        self.born_on = born_on
        self.writer: tuple[Any, int] | None = None
        self.readers: dict[Any, int] = {}
        self.recorded: set[Any] = set()  # streams that `record_stream` named
        self.arriving: list[Callable[[], None]] = []  # copies into it that have not come to an end
        self._memory = memory
        self.size = 0
        memory.take(host.nbytes())  # may raise, and then nothing is to be given back
        self.size = host.nbytes()

    def resize(self, size: int) -> None:
        """As of `storage.resize_`: FSDP takes the memory of gathered weights so, and gives it back."""
        self._memory.give_back(self)
        self.size = 0
        self.writer, self.readers = None, {}
        self._memory.take(size)
        self.host.resize_(size)
        self.size = size

    def __del__(self) -> None:
        self._memory.give_back(self)


class Memory:
    """What is allocated now and at most, and how much there is: beyond it torch's own error comes."""

    def __init__(self) -> None:
        self.capacity = 64 * 10**9
        self.now = self.peak = 0
        self.on_free: Callable[[Block], None] = lambda _block: None
        self._lock = threading.RLock()  # a block may die while another one is made

    def take(self, size: int) -> None:
        size = _rounded(size)
        with self._lock:
            if self.now + size > self.capacity:
                raise torch.OutOfMemoryError(
                    f"NPU out of memory. Tried to allocate {size} bytes; of {self.capacity} there are "
                    f"{self.capacity - self.now} free"
                )
            self.now += size
            self.peak = max(self.peak, self.now)

    def give_back(self, block: Block) -> None:
        with self._lock:
            self.now -= _rounded(block.size)
        if block.size:
            self.on_free(block)


def _rounded(size: int) -> int:
    return -(-size // GRAIN) * GRAIN
