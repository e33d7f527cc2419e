"""Which samples make up each step: one shape per global batch, as a pure function of the step.

Not here: reading them (dataset.py), which samples there are (selection.py), worker processes.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

VideoShape = tuple[int, int, int]


class Draw(NamedTuple):
    """One use of a sample: sample `index` in epoch `epoch`, at position `slot` of the global batch of `step`.
    Its random choices depend only on these numbers and a seed.
    """

    index: int
    epoch: int
    step: int
    slot: int


class BucketSampler:
    """Global batches of one shape each. The samples of a step depend only on `shapes`, `global_batch`, `seed`
    and the step, so that a run can resume at any step, on any number of ranks.

    `shapes` has (frames, height, width) of each sample; images have one frame. In an epoch every sample comes
    at most once, shuffled anew; of each shape, the remainder that does not fill a global batch is left out,
    other samples in each epoch.

    Raises ValueError if no shape has enough samples for a global batch. Warns of single shapes that have too
    few, which are never drawn.
    """

    def __init__(self, shapes: Sequence[VideoShape], *, global_batch: int, seed: int) -> None:
        if not shapes:
            raise ValueError("there are no samples to draw from")
        self._size = global_batch
        self._seed = seed
        codes: dict[VideoShape, int] = {}
        coded = np.fromiter((codes.setdefault(shape, len(codes)) for shape in shapes), np.int32, len(shapes))
        order = np.argsort(coded, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(coded))[:-1])
        # Sorted by shape, so that the order of the samples changes only their indices.
        buckets = sorted(zip(codes, parts, strict=True), key=lambda bucket: bucket[0])
        self._buckets = [(shape, part) for shape, part in buckets if len(part) >= global_batch]
        rare = [(shape, len(part)) for shape, part in buckets if len(part) < global_batch]
        if not self._buckets:
            raise ValueError(
                f"no shape (frames x height x width) has the {global_batch} samples of a global batch: "
                f"{_counts(rare)}; use a global batch of at most {max(count for _, count in rare)}"
            )
        if rare:
            logger.warning("shapes with fewer samples than a global batch are dropped: %s", _counts(rare))
        self._dropped = dict(rare) | {
            shape: len(part) % global_batch for shape, part in self._buckets if len(part) % global_batch
        }
        self._steps = sum(len(part) // global_batch for _, part in self._buckets)
        self._epoch = -1
        self._batches: NDArray[np.int64] = np.empty((0, global_batch), np.int64)

    @property
    def size(self) -> int:
        """Number of samples in a step."""
        return self._size

    @property
    def dropped_per_epoch(self) -> dict[VideoShape, int]:
        """Number of samples of each shape that an epoch leaves out, without zeros."""
        return dict(self._dropped)

    def epoch_of(self, step: int) -> int:
        """The epoch of a step, both counted from 0."""
        return step // self._steps

    def global_batch(self, step: int) -> list[Draw]:
        """All samples of a step, counted from 0; they have one shape."""
        epoch = self.epoch_of(step)
        if epoch != self._epoch:
            self._batches = self._shuffle(epoch)
            self._epoch = epoch
        row = self._batches[step % self._steps].tolist()
        return [Draw(index, epoch, step, slot) for slot, index in enumerate(row)]

    def share(self, step: int, *, rank: int, ranks: int, accumulate: int) -> list[list[Draw]]:
        """The `accumulate` micro-batches of one of `ranks` processes, all of equal size.

        Together, all ranks have exactly the global batch. Raises ValueError if it cannot be divided equally.
        """
        parts = ranks * accumulate
        if self._size % parts:
            raise ValueError(
                f"a global batch of {self._size} cannot be divided by {ranks} ranks x {accumulate} "
                f"micro-batches: {self._nearest(parts)}"
            )
        draws = self.global_batch(step)
        each = self._size // parts
        starts = range(rank * each, self._size, ranks * each)
        return [draws[start : start + each] for start in starts]

    def _nearest(self, parts: int) -> str:
        """Advice: the nearest valid numbers."""
        below, above = self._size // parts * parts, (self._size // parts + 1) * parts
        batches = " or ".join(str(size) for size in (below, above) if size)
        divisors = [number for number in range(1, self._size + 1) if self._size % number == 0]
        fewer = max(number for number in divisors if number < parts)
        more = min((number for number in divisors if number > parts), default=None)
        products = f"{fewer}" if more is None else f"{fewer} or {more}"
        return f"use a global batch of {batches}, or ranks x micro-batches = {products}"

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        """The samples of each step of an epoch, [steps, global batch]."""
        # RandomState never changes its numbers (NEP 19): a run can resume with another version of numpy.
        chance = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self._seed, epoch])))
        batches = [
            chance.permutation(part)[: len(part) // self._size * self._size].reshape(-1, self._size)
            for _, part in self._buckets
        ]
        return np.concatenate(batches)[chance.permutation(self._steps)]


def _counts(shapes: Iterable[tuple[VideoShape, int]]) -> str:
    return ", ".join(f"{count} of {'x'.join(map(str, shape))}" for shape, count in shapes)
