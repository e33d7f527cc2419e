"""Checkpoints of a training run: folders that appear whole or not at all, the oldest of which are removed.

    checkpoints/step-00001000/model.safetensors ema.safetensors optimizer.safetensors state.json

Names of tensors are the model's own; the optimizer's are `exp_avg.NAME` and so on. What a trainer keeps
besides (clip statistics, counters) is in state.json.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensoraplan.disk import flush, plain_errors

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")
_UNFINISHED = ".unfinished-"
_SUPERSEDED = ".superseded-"

Tensors = Mapping[str, Tensor]


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


def path_of(output: Path, step: int) -> Path:
    return output / FOLDER / f"step-{step:08d}"


def find(output: Path, wanted: str) -> int:
    """The step that `wanted` names: "latest" or a number. ValueError that lists the steps if there is
    none.
    """
    there = steps(output)
    if not there:
        raise ValueError(f"{output / FOLDER} has no checkpoint to resume from")
    if wanted == "latest":
        return there[-1]
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
    parts: Mapping[str, Tensors],
    state: Mapping[str, Any],
    keep: int,
    keep_every: int | None = None,
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep` and every `keep_every`th, and what was
    `set_aside`.

    It is written under another name, flushed to the disk and renamed, so that a run killed at any moment
    leaves earlier checkpoints whole. Raises ValueError in plain words for a full or read-only disk; nothing
    is removed then.
    """
    wanted = path_of(output, step)
    unfinished = _renamed(output, step, _UNFINISHED)
    with plain_errors(wanted, whole="the checkpoints before it are whole"):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            for name, tensors in parts.items():
                contiguous = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
                save_file(contiguous, unfinished / f"{name}.safetensors", metadata={"format": "pt"})
            (unfinished / "state.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n")
            for file in unfinished.iterdir():
                flush(file)
            unfinished.rename(wanted)
            flush(wanted.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    _rotate(output, keep=keep, keep_every=keep_every)
    _remove_all(output, _SUPERSEDED)
    return wanted


def load(output: Path, step: int, *, only: Sequence[str] | None = None) -> Checkpoint:
    """Read checkpoint number `step` of a run, of its parts `only` those named that there are. Raises
    ValueError for one that is damaged.
    """
    folder = path_of(output, step)
    try:
        state = json.loads((folder / "state.json").read_text())
        files = [file for file in folder.glob("*.safetensors") if only is None or file.stem in only]
        parts = {file.stem: load_file(file) for file in files}
    except (OSError, ValueError, SafetensorError) as error:
        others = [other for other in steps(output) if other != step]
        raise ValueError(
            f"checkpoint {folder} cannot be read ({error}); others: {others or 'none'}"
        ) from None
    return Checkpoint(step=state.pop("step"), parts=parts, state=state)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Tensors) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `KIND.PARAMETER`; `parameters` are its own, by name."""
    return {
        f"{kind}.{name}": value
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def fill_optimizer(optimizer: torch.optim.Optimizer, parameters: Tensors, tensors: Tensors) -> None:
    """The inverse of `optimizer_tensors`: put saved state into a new optimizer of the same parameters."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        by_name.setdefault(name, {})[kind] = value
    optimizer.state.clear()
    for name, parameter in parameters.items():
        if name in by_name:
            optimizer.state[parameter] = {
                # A step count is on the CPU in AdamW, except in its fused form, which moves it by itself.
                kind: value.clone() if kind == "step" else value.to(parameter.device, copy=True)
                for kind, value in by_name[name].items()
            }


def set_aside(output: Path, *, after: int) -> None:
    """Hide the checkpoints of later steps than `after`, from where a run goes on; the next `save` removes
    them. Until then they are lost by no accident: their folders only have other names.
    """
    later = [step for step in steps(output) if step > after]
    for step in later:
        path_of(output, step).rename(_renamed(output, step, _SUPERSEDED))
    if later:
        logger.info(
            "going on from step %d: checkpoints of %s are set aside until the next one is saved", after, later
        )


def remove_unfinished(output: Path) -> None:
    """Clear away what a killed run was writing or removing."""
    _remove_all(output, _UNFINISHED)


def _rotate(output: Path, *, keep: int, keep_every: int | None) -> None:
    for step in steps(output)[:-keep]:
        if keep_every is None or step % keep_every:
            gone = _renamed(output, step, _UNFINISHED)  # so that no half-removed folder has the name
            path_of(output, step).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _renamed(output: Path, step: int, prefix: str) -> Path:
    path = path_of(output, step)
    return path.with_name(f"{prefix}{path.name}")


def _remove_all(output: Path, prefix: str) -> None:
    folder = output / FOLDER
    for entry in folder.glob(f"{prefix}*") if folder.is_dir() else ():
        shutil.rmtree(entry, ignore_errors=True)
