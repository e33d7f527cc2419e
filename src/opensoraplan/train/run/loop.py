"""The loop of a training run: steps, and what is logged, validated and saved when it is time; how a signal or
an error ends it.
"""

import copy
import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from opensoraplan.parallel.ranks import ALONE, JointError, Ranks, explain, why_lost
from opensoraplan.train.config import RunSettings
from opensoraplan.train.inputs.loading import BadFileAccount
from opensoraplan.train.learner.gradient_clip import GradientOutlierError
from opensoraplan.train.learner.learner import check_finite
from opensoraplan.train.log.metrics import FILE as METRICS
from opensoraplan.train.log.metrics import VALIDATED, Averages, Metrics, Silence, Trackers, was_logged
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.folder import write_config
from opensoraplan.train.run.writers import Writer

logger = logging.getLogger(__name__)


class RunStoppedError(Exception):
    """A signal ended a run before its last step; what it has learned is saved. The text says how to go on."""

    def __init__(self, by: signal.Signals, *, step: int, steps: int, saved: Path) -> None:
        super().__init__(
            f"{by.name}: stopped after step {step} of {steps}, saved in {saved}: "
            "continue with --resume latest"
        )
        self.signal = by


class ValidationStoppedError(Exception):
    """A validation was broken off, since the run is asked to stop."""


class StepTrainer(Protocol):
    """What a trainer does in its loop. Steps count from 1.

    `learned`: the weights and their averages. `not_finite`: how many steps in a row, up to the last one, had
    a gradient that is not finite. `intact`: what is saved, without the two counts, is that of a whole step,
    also when a step raises; what users can help is raised while it is. `validate` calls `check`, which may
    raise ValidationStoppedError, every few seconds, at the same moments in all processes.
    """

    averages: Averages
    bad_files: BadFileAccount
    writer: Writer
    intact: bool
    not_finite: int

    def learned_tensors(self) -> Iterable[Tensor]: ...
    def step(self, step: int) -> None: ...
    def report(self) -> Mapping[str, float]: ...
    def validate(self, step: int, check: Callable[[], None]) -> Mapping[str, float]: ...
    def save(self, step: int) -> None: ...


def run_steps(trainer: StepTrainer, settings: RunSettings, *, start: int, ranks: Ranks = ALONE) -> None:
    """Do the steps after `start`; log, save and validate (if `validation.every` says so) when it is time.

    SIGTERM and Ctrl-C end it after the step under way, which is saved, or in the middle of a validation:
    RunStoppedError. A validation that did not come to its end is made up for when the run goes on. Any other
    error is raised with the last whole step saved. Of several processes, those that read and encode clips
    fail and save together; after other errors, as after the death of one, the last checkpoint is what is
    left, since the others cannot save without it. The message says which it was.
    """
    total = settings.optimizer.steps
    with _open_metrics(settings, start=start, ranks=ranks) as metrics, stop_on_signal() as stop:

        def begin() -> None:
            write_config(settings)
            checkpoint.hide_later(settings.output, after=start)

        ranks.agree(begin)  # no sooner: up to here a run that cannot begin after all has changed nothing
        loop = _Loop(trainer, settings, ranks, metrics, stop, done=start)
        if start:
            with _prefix_rank(start, ranks):
                loop.make_up_for_validation()
        while loop.done < total and not loop.stopping:
            with _prefix_rank(loop.done + 1, ranks):
                loop.step()
        loop.check_end()
        if loop.done < total or loop.owes_validation:
            where = checkpoint.path_of(settings.output, loop.done)
            by = stop.signal or signal.SIGTERM  # the signal may have come to another process
            raise RunStoppedError(by, step=loop.done, steps=total, saved=where)


class _Loop:
    """What `run_steps` does, and how far it is: the last step done, whether its validation is still to be
    made, and whether the run is asked to stop.
    """

    def __init__(
        self,
        trainer: StepTrainer,
        settings: RunSettings,
        ranks: Ranks,
        metrics: Metrics | Silence,
        stop: "StopRequested",
        *,
        done: int,
    ) -> None:
        self.trainer = trainer
        self.settings = settings
        self.ranks = ranks
        self.metrics = metrics
        self.done = self.saved = done
        self.stopping = False
        self.owes_validation = False
        self._stop = stop

    def step(self) -> None:
        """Do the next step and what is due after it."""
        trainer, step = self.trainer, self.done + 1
        with _save_on_error(trainer, self.done, saved=self.saved, ranks=self.ranks):
            trainer.step(step)
        self.done = step
        if self._is_due(self.settings.log.every):
            self.metrics.log(step, trainer.report())
        else:
            self.metrics.advance(step)
        self.stopping = self.ranks.any(bool(self._stop))
        # Before validation, which may take long and fail.
        if self.stopping or self._is_due(self.settings.checkpoint.every):
            self._save()
        self._validate()
        if self.stopping:
            self._save()
        if self.stopping or step == self.settings.optimizer.steps:
            trainer.writer.wait()

    def make_up_for_validation(self) -> None:
        """Validate the step that the run goes on from, if it was to be and did not come to an end."""
        path = self.settings.output / METRICS
        if not self.ranks.agree(lambda: was_logged(path, self.done, VALIDATED)):
            self._validate()

    def _is_due(self, every: int) -> bool:
        return self.done == self.settings.optimizer.steps or self.done % every == 0

    def _save(self) -> None:
        if self.saved < self.done:
            check_finite(self.trainer.learned_tensors(), self.ranks)
            self.trainer.save(self.done)
            self.saved = self.done

    def check_end(self) -> None:
        """Raise FloatingPointError for a run that has diverged by its last step. A single outlier is none."""
        diverged = self.trainer.not_finite
        if diverged >= 2 or diverged == self.done > 0:
            raise FloatingPointError(
                f"the run has failed: the gradients of its last steps ({diverged}) are not finite. Start "
                "a new one with a lower optimizer.lr; osp export writes the weights from before these steps"
            )

    def _validate(self) -> None:
        every = self.settings.validation.every
        if not every or not self._is_due(every):
            return
        self.owes_validation = True
        if self.stopping:
            return
        began = time.monotonic()
        try:
            with _save_on_error(self.trainer, self.done, saved=self.saved, ranks=self.ranks):
                found = self.trainer.validate(self.done, self._check)
        except ValidationStoppedError:
            logger.warning("the validation of step %d is postponed until the run is resumed", self.done)
        else:
            self.owes_validation = False
            self.metrics.log(self.done, {**found, VALIDATED: round(time.monotonic() - began, 3)})

    def _check(self) -> None:
        self.stopping = self.ranks.any(bool(self._stop))
        if self.stopping:
            raise ValidationStoppedError


@contextmanager
def _save_on_error(trainer: StepTrainer, step: int, *, saved: int, ranks: Ranks) -> Iterator[None]:
    """If the block raises, save `step`, the last one done, unless it is `saved`. Of several processes, which
    can only save together, this needs an error that all of them raise.
    """
    counts = copy.deepcopy((trainer.averages, trainer.bad_files))
    try:
        yield
    except ValidationStoppedError:
        raise
    except Exception as error:
        if ranks.count == 1 or isinstance(error, GradientOutlierError | JointError):
            trainer.averages, trainer.bad_files = counts
            _try_to_save(trainer, step, saved=saved, ranks=ranks)
        raise


def _try_to_save(trainer: StepTrainer, step: int, *, saved: int, ranks: Ranks) -> None:
    """Save `step`, unless it is `saved`, after an error, which says more than one that comes of this."""
    try:
        if step > saved and trainer.intact:
            check_finite(trainer.learned_tensors(), ranks)
            trainer.save(step)
        trainer.writer.wait()
    except Exception as error:
        logger.warning("step %d cannot be saved: %s", step, explain(error))
        return
    if step > saved and not trainer.intact:
        logger.warning("the error occurred during the optimizer step: step %d cannot be saved", step)
    elif step > saved:
        logger.warning("the run ends early; step %d is saved: continue with --resume latest", step)


@contextmanager
def _prefix_rank(step: int, ranks: Ranks) -> Iterator[None]:
    """Errors in one of several processes say which it was and at which step, those of collectives that hang
    or have lost another process, too. Outliers of the gradient are the same in all.
    """
    kinds = (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError)
    try:
        yield
    except GradientOutlierError:
        raise
    except JointError as error:
        raise JointError(f"step {step}: {error}") from error
    except kinds as error:
        if ranks.count == 1:
            raise
        lost = why_lost(error)
        kind = ConnectionError if lost else next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"rank {ranks.rank} of {ranks.count}, step {step}: {lost or error}") from error


def _open_metrics(settings: RunSettings, *, start: int, ranks: Ranks) -> Metrics | Silence:
    """The log of a run that goes on after step `start`; of several processes, the first has it."""
    if not ranks.first:
        return Silence()
    return Metrics(
        settings.output,
        steps=settings.optimizer.steps,
        start=start,
        shown=("loss", "psnr", "grad_norm", "samples/s"),
        trackers=Trackers(
            settings.log.tensorboard, settings.log.wandb_project, settings.model_dump(mode="json")
        ),
    )


class StopRequested:
    """True once a signal inside `stop_on_signal` asked to stop; a second SIGINT interrupts."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequested]:
    """Inside the block SIGTERM, SIGINT and SIGHUP only ask to stop, so that the step under way can be saved.
    What is to be ignored stays so: nohup wants it for SIGHUP.
    """
    stop = StopRequested()

    def ask(number: int, _frame: object) -> None:
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = signal.Signals(number)
        logger.warning("%s: stopping after this step, with a checkpoint", stop.signal.name)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
    before = {
        number: signal.signal(number, ask)
        for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
