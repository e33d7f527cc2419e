"""Which samples make up each step: one shape per global batch, as a pure function of the step.

Not here: reading them (dataset.py), which samples there are (selection.py), worker processes.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Shape = tuple[int, int, int]


class Draw(NamedTuple):
    """One sample's turn: sample `index` in pass `epoch` over the data, at place `slot` of the global batch of
    `step`. Whatever is random about it is drawn from these numbers and a seed.
    """

    index: int
    epoch: int
    step: int
    slot: int


class BucketSampler:
    """Global batches of one shape each. What a step holds depends on `shapes`, `global_batch`, `seed` and the
    step only, so that a run resumes anywhere, on any number of ranks.

    `shapes` has (frames, height, width) of each sample; images are shapes of one frame. In an epoch every
    sample comes at most once, in an order of its own; of each shape, the remainder that fills no global batch
    is left out, other samples in each epoch.

    Raises ValueError if no shape has enough samples for a global batch; shapes that have not are never drawn,
    which a warning says.
    """

    def __init__(self, shapes: Sequence[Shape], *, global_batch: int, seed: int) -> None:
        if not shapes:
            raise ValueError("there are no samples to draw from")
        self._size = global_batch
        self._seed = seed
        codes: dict[Shape, int] = {}
        coded = np.fromiter((codes.setdefault(shape, len(codes)) for shape in shapes), np.int32, len(shapes))
        order = np.argsort(coded, kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(coded))[:-1])
        # By shape, so that the order of the samples decides nothing but their indices.
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
        """How many samples a step has."""
        return self._size

    @property
    def dropped_per_epoch(self) -> dict[Shape, int]:
        """How many samples of each shape an epoch leaves out, where it leaves out any."""
        return dict(self._dropped)

    def epoch_of(self, step: int) -> int:
        """The epoch of a step, both counted from 0."""
        return step // self._steps

    def global_batch(self, step: int) -> list[Draw]:
        """All samples of a step, which is counted from 0; they have one shape."""
        epoch = self.epoch_of(step)
        if epoch != self._epoch:
            self._batches = self._shuffled(epoch)
            self._epoch = epoch
        row = self._batches[step % self._steps].tolist()
        return [Draw(index, epoch, step, slot) for slot, index in enumerate(row)]

    def share(self, step: int, *, rank: int, ranks: int, accumulate: int) -> list[list[Draw]]:
        """The `accumulate` micro-batches of one of `ranks` processes, all of equal size.

        Together the ranks have exactly the global batch. Raises ValueError if it cannot be divided so.
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
        """What would be valid instead."""
        below, above = self._size // parts * parts, (self._size // parts + 1) * parts
        batches = " or ".join(str(size) for size in (below, above) if size)
        divisors = [number for number in range(1, self._size + 1) if self._size % number == 0]
        fewer = max(number for number in divisors if number < parts)
        more = min((number for number in divisors if number > parts), default=None)
        products = f"{fewer}" if more is None else f"{fewer} or {more}"
        return f"use a global batch of {batches}, or ranks x micro-batches = {products}"

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        """The samples of each step of an epoch, [steps, global batch]."""
        # RandomState's streams are frozen (NEP 19): a run also resumes with another numpy.
        chance = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self._seed, epoch])))
        batches = [
            chance.permutation(part)[: len(part) // self._size * self._size].reshape(-1, self._size)
            for _, part in self._buckets
        ]
        return np.concatenate(batches)[chance.permutation(self._steps)]


def _counts(shapes: Iterable[tuple[Shape, int]]) -> str:
    return ", ".join(f"{count} of {'x'.join(map(str, shape))}" for shape, count in shapes)
