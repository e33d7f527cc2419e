"""Who writes a run's checkpoints: one process, or all ranks in the background. See checkpoint.py."""

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from opensoraplan.disk import plain_errors
from opensoraplan.parallel import shards
from opensoraplan.parallel.ranks import Ranks
from opensoraplan.parallel.shards import Parts
from opensoraplan.train.config import CheckpointSettings
from opensoraplan.train.run import checkpoint


class Writer:
    """Writes checkpoints of a run of one process."""

    def __init__(self, output: Path, settings: CheckpointSettings) -> None:
        self.output = output
        self.keep = settings.keep
        self.keep_every = settings.keep_every

    def save(self, step: int, *, parts: Parts, state: Mapping[str, Any]) -> None:
        checkpoint.save(
            self.output, step, parts=parts, state=state, keep=self.keep, keep_every=self.keep_every
        )

    def wait(self) -> None:
        """Return when all that was begun is on the disk."""


class ShardedWriter(Writer):
    """Writes them in the background, each rank its shards. All ranks call each method."""

    def __init__(self, output: Path, settings: CheckpointSettings, ranks: Ranks) -> None:
        super().__init__(output, settings)
        self._ranks = ranks
        # Training's own collectives go on meanwhile, perhaps on devices: writing has a group of its own.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=ranks.patience))
        self._finishing = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def save(self, step: int, *, parts: Parts, state: Mapping[str, Any]) -> None:
        """Begin to write. What failed the last time is raised here."""
        self.wait()
        unfinished = checkpoint.unfinished_path(self.output, step)
        self._ranks.agree(lambda: self._begin(unfinished, step, state))
        written = shards.write(unfinished, parts, group=self._group)
        self._pending = self._finishing.submit(self._finish, step, written)

    def wait(self) -> None:
        """Return when what was begun is on the disk under its name. Raises ValueError for a full disk."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
            dist.barrier(self._group)

    def _begin(self, unfinished: Path, step: int, state: Mapping[str, Any]) -> None:
        with plain_errors(unfinished, whole=checkpoint.describe_saved(self.output)):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            checkpoint.write_state(unfinished, step, state)

    def _finish(self, step: int, written: Future[Any]) -> None:
        try:
            with plain_errors(
                checkpoint.path_of(self.output, step), whole=checkpoint.describe_saved(self.output)
            ):
                shards.finish(written)
                if self._ranks.first:
                    checkpoint.finish(self.output, step)
                    checkpoint.rotate(self.output, keep=self.keep, keep_every=self.keep_every)
        except ValueError:
            if self._ranks.first:
                shutil.rmtree(checkpoint.unfinished_path(self.output, step), ignore_errors=True)
            raise
