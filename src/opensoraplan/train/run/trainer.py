"""Training, whatever the method: a step of gradient accumulation, clipping and outliers, what is counted, and
what a checkpoint has. What `osp train` does.
"""

import copy
import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensoraplan.device import explain_full_memory, prepare, resolve_device
from opensoraplan.models.hashes import hash_plain
from opensoraplan.models.strict import plain_config
from opensoraplan.parallel.ranks import ALONE, Ranks, device_of_rank, joined
from opensoraplan.runtime.quantisation import weight_precision_of
from opensoraplan.train.config import RunSettings, TrainSettings
from opensoraplan.train.inputs.encoders import warn_of_other_encoders
from opensoraplan.train.inputs.loading import BadFileAccount
from opensoraplan.train.inputs.sources import check_clips
from opensoraplan.train.learner.adapter import BASE_SETTING, check_base
from opensoraplan.train.learner.gradient_clip import GradientOutlierError
from opensoraplan.train.learner.optimizer import check_optimizer
from opensoraplan.train.log.metrics import Averages
from opensoraplan.train.methods.flow import FlowMatching
from opensoraplan.train.methods.method import Method
from opensoraplan.train.methods.vae import VAETraining
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.files import refuse_other_files
from opensoraplan.train.run.folder import moved_since, open_run_together
from opensoraplan.train.run.loop import run_steps
from opensoraplan.train.run.state import DenoiserState, RunState
from opensoraplan.train.run.writers import ShardedWriter, Writer

logger = logging.getLogger(__name__)

# By the run's setting `method`.
METHODS: Mapping[str, Any] = {"flow": FlowMatching, "vae": VAETraining}
# How often the weights may be restored because of the same outliers.
_RESTORED = 2


def train(settings: RunSettings, *, resume: str | None = None) -> Path:
    """Train in the folder `settings.output` for `optimizer.steps` steps, or until a signal asks to stop.

    Returns the folder of the result: the last checkpoint of a denoiser, the finished VAE. Raises ValueError
    for settings, data and disks that cannot be, before anything heavy where possible, FloatingPointError for
    a run that diverges, RunStoppedError for a signal. What was learned until then is saved.
    """
    kind = METHODS[settings.method]
    kind.check(settings)
    check_optimizer(settings.optimizer)
    device = device_of_rank(resolve_device(settings.device))
    prepare(device, allow_tf32=settings.allow_tf32)
    with (
        _joined(settings, device) as ranks,
        open_run_together(settings.output, settings, resume=resume, ranks=ranks) as start,
    ):
        method: Method = kind(_with_base_of_run(settings, start), device=device, ranks=ranks)
        trainer = Trainer(method, settings, ranks, start=start)
        if start:
            trainer.load(start)
        with closing(trainer.batches):
            run_steps(trainer, settings, start=start, ranks=ranks)
        return method.finish()


def _with_base_of_run(settings: RunSettings, start: int) -> RunSettings:
    """The settings of a run that goes on after step `start`. Where memory.placement "auto" has chosen the
    precision of the frozen weights, what is learned depends on it: it stays.
    """
    if not start or not isinstance(settings, TrainSettings) or settings.adapter.base != "auto":
        return settings
    base = checkpoint.read_state(settings.output, start, DenoiserState).base
    adapter = settings.adapter.model_copy(update={} if base is None else {"base": base})
    return settings.model_copy(update={"adapter": adapter})


def _joined(settings: RunSettings, device: torch.device) -> AbstractContextManager[Ranks]:
    if not isinstance(settings, TrainSettings):
        return nullcontext(ALONE)
    return joined(settings.parallel, device, timeout=settings.parallel.timeout_s)


class Trainer:
    """A method at work in its run. See `StepTrainer` in loop.py for what its loop asks of it."""

    def __init__(self, method: Method, settings: RunSettings, ranks: Ranks, *, start: int) -> None:
        self.method = method
        self.settings = settings
        self.ranks = ranks
        self.learner = method.learners[0]
        self.bad_files = BadFileAccount(settings.data.max_bad_files)
        # The account may be another one by then.
        self.batches = method.batches(start, lambda failures: self.bad_files.add(failures))
        self.outliers_in_a_row = 0
        self.not_finite = 0
        self.intact = True
        self.averages = Averages()
        self.writer = Writer(settings.output, settings.checkpoint)
        if ranks.mesh is not None:
            self.writer = ShardedWriter(settings.output, settings.checkpoint, ranks)

    def step(self, step: int) -> None:
        """Do optimizer step number `step`, from 1."""
        if self.method.fits:
            self._accumulate_until_it_fits(step)
        else:
            self._accumulate(step, self.batches)
        self._update(step)

    def _accumulate_until_it_fits(self, step: int) -> None:
        """As `_accumulate`; where memory is full, the method goes leaner and the step begins anew."""
        taken: list[Any] = []
        while True:
            before = copy.deepcopy(self.averages)
            try:
                with self.method.speed.attempt():
                    self._accumulate(step, chain(taken.copy(), _noted(self.batches, taken)))
                return
            except _InputsDoNotFitError:
                raise
            except MemoryError as error:
                full = MemoryError(str(error))
            gc.collect()  # no frame of the failed step, and no cycle, is to keep its tensors
            self.averages = before
            if not self.method.go_leaner():
                raise full

    def _accumulate(self, step: int, batches: Iterator[Any]) -> None:
        """Add up the gradients of the step's micro-batches."""
        accumulate = self.settings.optimizer.accumulate
        self.learner.begin_step(step)
        for micro in range(accumulate):
            batch = next(batches)
            with explain_full_memory(self.method.memory_advice(batch)):
                loss = self.method.loss(batch, step=step, micro=micro, averages=self.averages)
                self.learner.backward(loss / accumulate)

    def _update(self, step: int) -> None:
        """Take the gradients in, unless their norm is an outlier."""
        norm, clipping = self.learner.clip_gradients()
        self.not_finite = 0 if math.isfinite(norm) else self.not_finite + 1
        self.averages.add("grad_norm", norm)
        self.averages.add("clip_threshold", clipping.threshold)
        self.averages.add("lr", self.learner.rate)
        self.averages.add("clipped", float(clipping.action == "clipped"))
        self.averages.add("skipped", float(clipping.action == "skip"))
        if clipping.action == "skip":
            self._skip(step, norm)
            return
        self.outliers_in_a_row = 0
        self.intact = False
        self.learner.finish_step(step)
        self.method.finish_step(step, self.averages)
        self.intact = True

    def _skip(self, step: int, norm: float) -> None:
        """Leave the step out; after several in a row, go back to the last good state or raise
        GradientOutlierError, as the method's policy says.
        """
        outliers, policy = self.outliers_in_a_row + 1, self.method.outliers
        logger.warning("step %d: gradient norm %.4g is an outlier: the step is skipped", step, norm)
        if outliers % policy.patience == 0:
            self.writer.wait()  # or processes see different checkpoints while one is being finished
            good = self.ranks.agree(self._last_before_outliers) if policy.restores else None
            if good is None or outliers > _RESTORED * policy.patience:
                restored = ", and no checkpoint is older than these" if policy.restores else ""
                raise GradientOutlierError(
                    f"step {step}: {outliers} gradient norms in a row are outliers, the last one {norm:.4g}"
                    f"{restored}: {policy.advice}"
                )
            logger.warning("%d outliers in a row: restored the weights of step %d", outliers, good)
            self._restore(good)
        self.outliers_in_a_row = outliers

    def _last_before_outliers(self) -> int | None:
        """The newest checkpoint that was not made between outliers."""
        output = self.settings.output
        for step in reversed(checkpoint.steps(output)):
            if checkpoint.read_state(output, step, self.method.state).outliers_in_a_row == 0:
                return step
        return None

    def report(self) -> dict[str, float]:
        """What is logged of the steps since the last report."""
        self.bad_files.share(self.ranks)
        counts = {"bad_files": float(len(self.bad_files))}
        return self.averages.take(self.ranks) | self.method.speed.take(self.ranks) | counts

    def learned_tensors(self) -> Iterator[Tensor]:
        """The weights and their averages."""
        return self.learner.learned_tensors()

    def save(self, step: int) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        self.bad_files.share(self.ranks)
        state = {
            "model_config": plain_config(self.learner.module),
            "base": weight_precision_of(self.learner.module),
            **self.learner.state_dict(),
            "outliers_in_a_row": self.outliers_in_a_row,
            "global_batch": self.method.global_batch,
            "clips": self.method.clips,
            "encoders": dict(self.method.encoders),
            "averages": self.averages.state_dict(self.ranks),
            "bad_files": self.bad_files.state_dict(),
        }
        with self.method.speed.apart():
            self.writer.save(step, parts=self._parts(), state=state)

    def _parts(self) -> dict[str, Mapping[str, Tensor]]:
        """All tensors that a checkpoint has; reading one fills them in place."""
        return {
            name: tensors for learner in self.method.learners for name, tensors in learner.parts().items()
        }

    def load(self, step: int) -> None:
        """Go on from a checkpoint of the same run, made by any number of processes."""
        saved = checkpoint.read_state(self.settings.output, step, self.method.state)
        check_base(saved.encoders, self.method.encoders)
        self._check_moved(saved)
        with self.method.speed.apart():
            state = self._restore(step)
        check_clips(state.clips, self.method.clips, others=self.settings.data.other_clips)
        warn_of_other_encoders(state.encoders, self.method.encoders)
        self.outliers_in_a_row = state.outliers_in_a_row
        if state.averages is not None:
            self.bad_files.load_state_dict(state.bad_files)
            if self.ranks.data_rank == 0:  # sums are of all processes: one goes on with them
                self.averages.load_state_dict(state.averages.model_dump())

    def _check_moved(self, saved: RunState) -> None:
        """Raise ValueError if the settings name files in other places than before, and others."""
        before, now = dict(saved.encoders), dict(self.method.encoders)
        if BASE_SETTING not in now:  # it is trained itself: of the path only the config is used
            before[BASE_SETTING] = hash_plain(saved.architecture)
            now[BASE_SETTING] = hash_plain(plain_config(self.learner.module))
        refuse_other_files(moved_since(self.settings), before, now)

    def _restore(self, step: int) -> RunState:
        """Take over what was learned until then, without what is counted; returns the checkpoint's state."""
        state = checkpoint.read_state(self.settings.output, step, self.method.state)
        self._check_global_batch(state.global_batch)
        self.intact = False
        checkpoint.read_into(self.settings.output, step, self._parts())
        for learner in self.method.learners:
            learner.load_state_dict(state.model_dump())
        self.intact = True
        return state

    def _check_global_batch(self, before: int | None) -> None:
        """Raise ValueError unless steps have as many samples as when the checkpoint was made."""
        now, ranks = self.method.global_batch, self.ranks.data_ranks
        if before in (None, now):
            return
        if before % ranks:
            possible = [n for n in range(1, before + 1) if before % n == 0]
            advice = f"use a number of processes with different samples that divides it: {possible}"
        else:
            advice = f"set data.batch_size x optimizer.accumulate to {before // ranks}"
        raise ValueError(
            f"the run has {before} samples a step, and would have {now} with {ranks} processes x "
            f"data.batch_size {self.settings.data.batch_size} x optimizer.accumulate "
            f"{self.settings.optimizer.accumulate}: {advice}"
        )

    def validate(self, step: int, check: Callable[[], None]) -> Mapping[str, float]:
        """What is logged of the averaged weights on held-out data."""
        advice = explain_full_memory(self.method.validation_advice)
        with advice, self.method.speed.apart(), self.learner.use_ema():
            return self.method.validate(step, check)


class _InputsDoNotFitError(MemoryError):
    """Memory is full while a batch is made, which no leaner step helps."""


def _noted(batches: Iterator[Any], taken: list[Any]) -> Iterator[Any]:
    """The batches, each of which is put into the list when it is taken."""
    try:
        for batch in batches:
            taken.append(batch)
            yield batch
    except MemoryError as error:
        raise _InputsDoNotFitError(str(error)) from None
