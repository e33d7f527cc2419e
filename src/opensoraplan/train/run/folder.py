"""The folder of a training run: opened for a new run, or to resume one.

config.json      the resolved settings        metrics.jsonl   what was logged
checkpoints/     see checkpoint.py
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from opensoraplan.claims import hold_claim
from opensoraplan.disk import clear_dead, explain_disk_errors, make_folder, write_whole
from opensoraplan.parallel.ranks import Ranks
from opensoraplan.train.config import RunSettings
from opensoraplan.train.log.metrics import FILE as METRICS
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.files import moved_paths, read_settings, refuse_changes

logger = logging.getLogger(__name__)

CONFIG = "config.json"


@contextmanager
def open_run_together(
    output: Path, settings: RunSettings, *, resume: str | None, ranks: Ranks
) -> Iterator[int]:
    """`open_run` by the first of several processes, for all of them."""
    with ExitStack() as stack:
        yield ranks.agree(lambda: stack.enter_context(open_run(output, settings, resume=resume)))


@contextmanager
def open_run(output: Path, settings: RunSettings, *, resume: str | None) -> Iterator[int]:
    """Begin a run in `output`, or go on with the one that is there; yields the step to go on from (0: anew).

    `resume`: None, "latest" or a step. Without it a folder that has a run is refused; with it, a run whose
    settings differ in what would change its results is refused with the differences, and so is a step beyond
    `optimizer.steps`. "latest" without a checkpoint begins anew, so that one command line serves for every
    start of a job. The folder is claimed against a second process. A folder in which nothing was trained yet
    counts as empty, and nothing is written to it here: the loop does when the run begins. If the block
    raises before that, a new folder is removed.
    """
    config = output / CONFIG
    step, total = 0, settings.optimizer.steps
    began_before = _has_trained(output)
    if began_before:
        if resume is None:
            raise ValueError(
                f"{output} already has a training run: continue with --resume latest, or use another output"
            )
        refuse_changes(read_settings(config), settings)
        if resume != "latest" or checkpoint.steps(output):
            step = checkpoint.find(output, resume)
        if step > total:
            earlier = [there for there in checkpoint.steps(output) if there <= total]
            raise ValueError(
                f"step {step} of {output} is beyond optimizer.steps {total}: raise optimizer.steps, "
                f"or --resume an earlier step (available: {earlier or 'none'})"
            )
    else:
        _refuse_foreign(config)
        if resume not in (None, "latest"):
            checkpoint.find(output, resume)  # raises: there is none
    with ExitStack() as stack:
        try:
            stack.enter_context(make_folder(output))
        except OSError as error:
            raise ValueError(f"cannot write to {output}: {error.strerror}") from None
        stack.enter_context(hold_claim(output / "run", doing=f"training in {output}"))
        checkpoint.remove_unfinished(output)
        clear_dead(output)
        if step:
            logger.info("%s: resuming after step %d of %d", output, step, total)
        yield step


def _refuse_foreign(config: Path) -> None:
    """Raise ValueError for a file of that name which no run has written: it would be replaced."""
    if not config.exists():
        return
    try:
        read_settings(config)
    except ValueError:
        raise ValueError(
            f"{config} is not the {CONFIG} of a training run, and would be overwritten: use another output"
        ) from None


def _has_trained(output: Path) -> bool:
    """Whether a run has done anything there that should not be lost."""
    metrics = output / METRICS
    return bool(checkpoint.steps(output)) or (metrics.exists() and metrics.stat().st_size > 0)


def moved_since(settings: RunSettings) -> dict[str, str]:
    """`moved_paths` from the run's own settings, as its folder has them until it goes on, to these."""
    return moved_paths(read_settings(settings.output / CONFIG), settings)


def write_config(settings: RunSettings) -> None:
    config, text = settings.output / CONFIG, settings.model_dump_json(indent=1) + "\n"
    with explain_disk_errors(config, whole="nothing was begun"):
        write_whole(config, lambda path: path.write_text(text))
