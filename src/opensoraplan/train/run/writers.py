"""Who writes a run's checkpoints: one process, or all ranks in the background. See checkpoint.py."""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from opensoraplan.disk import explain_disk_errors, flush
from opensoraplan.parallel.ranks import Ranks, sendable
from opensoraplan.parallel.shards import Parts, Piece, pieces, write
from opensoraplan.train.config import CheckpointSettings
from opensoraplan.train.run import checkpoint


class Writer:
    """Writes checkpoints of a run of one process."""

    def __init__(self, output: Path, settings: CheckpointSettings) -> None:
        self.output = output
        self.settings = settings

    def save(self, step: int, *, parts: Parts, state: Mapping[str, Any]) -> None:
        checkpoint.save(self.output, step, parts=parts, state=state, settings=self.settings)

    def wait(self) -> None:
        """Return when all that was begun is on the disk."""


class ShardedWriter(Writer):
    """Writes them in the background, each rank its pieces. All ranks call each method."""

    def __init__(self, output: Path, settings: CheckpointSettings, ranks: Ranks) -> None:
        super().__init__(output, settings)
        self._ranks = ranks
        # Training's own collectives go on meanwhile, perhaps on devices: writing has a group of its own.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=ranks.patience))
        self._background = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def save(self, step: int, *, parts: Parts, state: Mapping[str, Any]) -> None:
        """Begin to write what is copied before this returns. What failed the last time is raised here."""
        self.wait()
        self._ranks.agree(lambda: self._prepare_folder(step, state))
        own = {
            part: {name: piece.copied() for name, piece in pieces(tensors, rank=self._ranks.rank).items()}
            for part, tensors in parts.items()
        }
        self._pending = self._background.submit(self._write, step, own)

    def wait(self) -> None:
        """Return when what was begun is on the disk under its name. Raises ValueError for a full disk."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _prepare_folder(self, step: int, state: Mapping[str, Any]) -> None:
        unfinished = checkpoint.unfinished_path(self.output, step)
        with explain_disk_errors(unfinished, whole=checkpoint.describe_saved(self.output)):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            checkpoint.write_state(unfinished, step, state)

    def _write(self, step: int, own: Mapping[str, Mapping[str, Piece]]) -> None:
        try:
            self._run_on_all_ranks(step, lambda: self._write_pieces(step, own))
            self._run_on_all_ranks(step, lambda: self._finish(step))
        except ValueError:
            if self._ranks.first:
                shutil.rmtree(checkpoint.unfinished_path(self.output, step), ignore_errors=True)
            raise

    def _write_pieces(self, step: int, own: Mapping[str, Mapping[str, Piece]]) -> None:
        for part, of_part in own.items():
            folder = checkpoint.unfinished_path(self.output, step)
            flush(write(folder, part, of_part, rank=self._ranks.rank, count=self._ranks.count))

    def _finish(self, step: int) -> None:
        if self._ranks.first:
            checkpoint.finish(self.output, step)
            checkpoint.rotate(self.output, self.settings)

    def _run_on_all_ranks(self, step: int, do: Callable[[], None]) -> None:
        """Have every rank do its share; what fails in any is raised in all."""
        failed: Exception | None = None
        try:
            with explain_disk_errors(
                checkpoint.path_of(self.output, step), whole=checkpoint.describe_saved(self.output)
            ):
                do()
        except Exception as error:
            failed = sendable(error)
        all_failed: list[Exception | None] = [None] * self._ranks.count
        dist.all_gather_object(all_failed, failed, group=self._group)
        for error in all_failed:
            if error is not None:
                raise error
