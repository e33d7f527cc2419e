"""The folder of a training run and its life: begun once, resumed, stopped by a signal. For every trainer.

config.json      the resolved settings        metrics.jsonl   what was logged
checkpoints/     see checkpoint.py            .lock           held while the run goes on
"""

import fcntl
import logging
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from opensoraplan.disk import plain_errors, write_whole
from opensoraplan.settings import Settings
from opensoraplan.train import checkpoint
from opensoraplan.train.config import TrainSettings, VAETrainSettings
from opensoraplan.train.files import refuse_changes
from opensoraplan.train.metrics import FILE as METRICS
from opensoraplan.train.metrics import Metrics

logger = logging.getLogger(__name__)

CONFIG = "config.json"


@contextmanager
def begun(output: Path, settings: Settings, *, resume: str | None) -> Iterator[int]:
    """Begin a run in `output`, or go on with the one that is there; yields the step to go on from (0: anew).

    `resume`: None, "latest" or a step. Without it a folder that has a run is refused; with it, a run whose
    settings differ in what would change its results is refused with the differences. "latest" without a
    checkpoint begins anew, so that one command line serves for every start of a job. The folder is locked
    against a second process. A folder in which nothing was trained yet counts as empty.
    """
    config = output / CONFIG
    step = 0
    if checkpoint.steps(output) or (output / METRICS).exists():
        if resume is None:
            raise ValueError(
                f"{output} has a training run already: go on with --resume latest, or choose another output"
            )
        refuse_changes(type(settings).read_file(config), settings)
        if resume != "latest" or checkpoint.steps(output):
            step = checkpoint.find(output, resume)
    elif resume not in (None, "latest"):
        checkpoint.find(output, resume)  # raises: there is none
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {output}: {error.strerror}") from None
    with _locked(output):
        checkpoint.remove_unfinished(output)
        text = settings.model_dump_json(indent=1) + "\n"
        with plain_errors(config, whole="nothing was begun"):
            write_whole(config, lambda path: path.write_text(text))
        if resume is not None:
            logger.info("%s: going on after step %d", output, step)
        yield step


def open_metrics(settings: TrainSettings | VAETrainSettings, *, start: int) -> Metrics:
    """The log of a run that goes on after step `start`."""
    return Metrics(
        settings.output,
        steps=settings.optimizer.steps,
        start=start,
        shown=("loss", "psnr", "grad_norm", "samples/s"),
        tensorboard=settings.log.tensorboard,
        wandb_project=settings.log.wandb_project,
        config=settings.model_dump(mode="json"),
    )


class Job(Protocol):
    """What a trainer does in its loop. Steps count from 1."""

    def step(self, step: int) -> None: ...
    def report(self) -> Mapping[str, float]: ...
    def validate(self, step: int) -> Mapping[str, float]: ...
    def save(self, step: int) -> None: ...


def run_steps(job: Job, settings: TrainSettings | VAETrainSettings, *, start: int) -> int:
    """Do the steps after `start`; log, validate (if `validation.every` says so) and save when it is time.

    SIGTERM and Ctrl-C end it after the step under way, which is saved. Returns the last step saved.
    """
    total, saved = settings.optimizer.steps, start

    def due(step: int, every: int) -> bool:
        return step == total or step % every == 0

    with open_metrics(settings, start=start) as metrics, stop_on_signal() as stop:
        for step in range(start + 1, total + 1):
            job.step(step)
            if due(step, settings.log.every):
                metrics.log(step, job.report())
            else:
                metrics.advance(step)
            if settings.validation.every and due(step, settings.validation.every):
                metrics.log(step, job.validate(step))
            if stop or due(step, settings.checkpoint.every):
                job.save(step)
                saved = step
            if stop:
                break
    return saved


class StopRequested:
    """True once the process got SIGTERM or SIGINT inside `stop_on_signal`; a second SIGINT interrupts."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequested]:
    """Inside the block SIGTERM and SIGINT only ask to stop, so that the step under way can be saved."""
    stop = StopRequested()

    def ask(number: int, _frame: object) -> None:
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = signal.Signals(number)
        logger.warning("%s: stopping after this step, with a checkpoint", stop.signal.name)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is training in {output}: wait for it or stop it") from None
        yield
