"""Checkpoints of a training run: folders that appear whole or not at all, the oldest of which are removed.

    checkpoints/step-00001000/model.safetensors ema.safetensors optimizer.safetensors state.json

Of several processes each writes its pieces (parallel/shards.py); any number of them reads what any number
has written. Names of tensors are the model's own; the optimizer's are `exp_avg.NAME` and so on. What a
trainer keeps besides (clip statistics, counters) is in state.json.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from opensoraplan.disk import apply_umask, explain_disk_errors, flush
from opensoraplan.documents import read_json_object
from opensoraplan.parallel import distcp, shards
from opensoraplan.parallel.shards import Parts
from opensoraplan.settings import Settings
from opensoraplan.train.config import CheckpointSettings
from opensoraplan.train.log.metrics import FILE as METRICS
from opensoraplan.train.log.metrics import held_out_scores

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
STATE = "state.json"
DEFAULTS = CheckpointSettings()
_NAME = re.compile(r"step-(\d{8})")
_UNFINISHED = ".unfinished-"
_SUPERSEDED = ".superseded-"

State = TypeVar("State", bound=Settings)


@dataclass(frozen=True)
class Checkpoint:
    """What was read: `parts` maps model, ema, optimizer ... to tensors by name; `state` is plain JSON."""

    step: int
    parts: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def steps(output: Path) -> list[int]:
    """Steps of the run's finished checkpoints, rising."""
    folder = output / FOLDER
    names = (_NAME.fullmatch(entry.name) for entry in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name[1]) for name in names if name)


def describe_saved(output: Path) -> str:
    """What a checkpoint that cannot be written leaves, for messages."""
    there = steps(output)
    return f"the last checkpoint is of step {there[-1]}" if there else "there is no checkpoint before it"


def path_of(output: Path, step: int) -> Path:
    return output / FOLDER / f"step-{step:08d}"


def best(output: Path) -> int | None:
    """The step of the checkpoint with the lowest held-out loss, or of a VAE the highest PSNR; None if no
    step of a checkpoint was validated.
    """
    scores = held_out_scores(output / METRICS)
    validated = [step for step in steps(output) if step in scores]
    return min(validated, key=scores.__getitem__, default=None)


def find(output: Path, wanted: str) -> int:
    """The step that `wanted` names: "latest", "best" or a number. ValueError that lists
    the steps if there is none.
    """
    there = steps(output)
    if not there:
        raise ValueError(f"{output / FOLDER} has no checkpoint to resume from")
    if wanted == "latest":
        return there[-1]
    if wanted == "best":
        if (found := best(output)) is None:
            raise ValueError(
                f"none of the checkpoints {there} has a held-out loss: set validation.every of the run to a "
                "multiple of checkpoint.every, or name a step"
            )
        return found
    if not wanted.isdigit() or int(wanted) not in there:
        nearest = min(there, key=lambda step: abs(step - int(wanted))) if wanted.isdigit() else there[-1]
        raise ValueError(
            f"{output / FOLDER} has no checkpoint {wanted!r}: the nearest is {nearest} of {there}"
        )
    return int(wanted)


def save(
    output: Path,
    step: int,
    *,
    parts: Parts,
    state: Mapping[str, Any],
    settings: CheckpointSettings = DEFAULTS,
) -> Path:
    """Write a checkpoint, then remove those that the settings do not keep, and what `hide_later` hid.

    It is written under another name, flushed to the disk and renamed, so that a run killed at any moment
    leaves earlier checkpoints whole. Raises ValueError in plain words for a full or read-only disk; nothing
    is removed then.
    """
    wanted, unfinished = path_of(output, step), unfinished_path(output, step)
    with explain_disk_errors(wanted, whole=describe_saved(output)):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            for part, tensors in parts.items():
                shards.write(unfinished, part, shards.pieces(tensors))
            write_state(unfinished, step, state)
            finish(output, step)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    rotate(output, settings)
    return wanted


def unfinished_path(output: Path, step: int) -> Path:
    """Where a checkpoint is written, before `finish` gives it its name."""
    return _hidden_path(output, step, _UNFINISHED)


def write_state(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    (folder / STATE).write_text(json.dumps({"step": step, **state}, indent=1) + "\n")


def finish(output: Path, step: int) -> None:
    """Flush what was written to `unfinished_path` to the disk, and rename it."""
    unfinished, wanted = unfinished_path(output, step), path_of(output, step)
    apply_umask(unfinished)
    for path in unfinished.rglob("*"):
        flush(path)
    unfinished.rename(wanted)
    flush(wanted.parent)


def load(output: Path, step: int, *, only: Sequence[str] | None = None) -> Checkpoint:
    """Read checkpoint number `step` of a run, of its parts `only` those named that there are. Raises
    ValueError for one that is damaged.
    """
    folder = path_of(output, step)
    with _explain_damage(output, step):
        state = _read_state(output, step)
        del state["step"]
        if (folder / distcp.FOLDER).is_dir():
            return Checkpoint(step, distcp.read_whole(folder / distcp.FOLDER, only=only), state)
        with shards.open_parts(folder, only) as parts:
            read = {part: {name: of.whole(name) for name in of.names()} for part, of in parts.items()}
        return Checkpoint(step, read, state)


def read_state(output: Path, step: int, kind: type[State]) -> State:
    """What a checkpoint has beside tensors. Raises ValueError, with file and field, for a damaged one."""
    with _explain_damage(output, step):
        return kind.read(_read_state(output, step), where=str(path_of(output, step) / STATE), strict=True)


def _read_state(output: Path, step: int) -> dict[str, Any]:
    path = path_of(output, step) / STATE
    state = read_json_object(path)
    if state.get("step") != step:
        raise ValueError(f"{path}: step is {state.get('step')!r}, not {step}")
    return state


def read_into(output: Path, step: int, parts: Parts) -> None:
    """Fill the tensors of `parts` in place, sharded ones with what this rank has of them, from a
    checkpoint that any number of ranks wrote. All ranks call this. Raises ValueError, with the file,
    for one that is damaged.
    """
    folder = path_of(output, step)
    with _explain_damage(output, step):
        if (folder / distcp.FOLDER).is_dir():
            distcp.read_into(folder / distcp.FOLDER, parts)
            return
        with shards.open_parts(folder, parts) as found:
            # All of them, before anything is filled: one that is missing or cut off must not leave a mixture.
            for part, tensors in parts.items():
                with shards.named(folder / f"{part}.safetensors"):
                    if part not in found:
                        raise ValueError("there is no such file")
                    for name, tensor in tensors.items():
                        found[part].check(name, tensor)
            for part, tensors in parts.items():
                for name, tensor in tensors.items():
                    found[part].fill(name, tensor)


@contextmanager
def _explain_damage(output: Path, step: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        others = [other for other in steps(output) if other != step]
        raise ValueError(
            f"checkpoint {path_of(output, step)} cannot be read ({error}); others: {others or 'none'}"
        ) from None


def hide_later(output: Path, *, after: int) -> None:
    """Hide the checkpoints of later steps than `after`, from where a run goes on; the next `save` removes
    them. Until then they are lost by no accident: their folders only have other names.
    """
    later = [step for step in steps(output) if step > after]
    for step in later:
        path_of(output, step).rename(_hidden_path(output, step, _SUPERSEDED))
    if later:
        logger.info(
            "resuming from step %d: the later checkpoints %s are set aside until the next one is saved",
            after,
            later,
        )


def remove_unfinished(output: Path) -> None:
    """Clear away what a killed run was writing or removing."""
    _remove_all(output, _UNFINISHED)


def rotate(output: Path, settings: CheckpointSettings) -> None:
    """Remove the checkpoints that the settings do not keep, and what `hide_later` hid."""
    _remove_all(output, _SUPERSEDED)
    kept_best = best(output) if settings.keep_best else None
    for step in steps(output)[: -settings.keep]:
        if step != kept_best and (settings.keep_every is None or step % settings.keep_every):
            gone = _hidden_path(output, step, _UNFINISHED)  # so that no half-removed folder has the name
            path_of(output, step).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _hidden_path(output: Path, step: int, prefix: str) -> Path:
    path = path_of(output, step)
    return path.with_name(f"{prefix}{path.name}")


def _remove_all(output: Path, prefix: str) -> None:
    folder = output / FOLDER
    for entry in folder.glob(f"{prefix}*") if folder.is_dir() else ():
        shutil.rmtree(entry, ignore_errors=True)
