"""The tasks that a denoiser is trained on: which frames of a clip it is given, and which it has to make.

A task depends on (seed, step, slot) of a sample only. Frames here are latent frames, of which a clip has T;
a last frame that is given is one more behind them, encoded as a picture of its own.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensoraplan.data.buckets import Draw
from opensoraplan.train.config import ConditionSettings


@dataclass(frozen=True, eq=False)
class Tasks:
    """Of B samples: the frames that are `given` [B, T or T + 1], those of them that are only `padding`, and
    the samples [B] whose other frames have sigmas `of_their_own`. All on the CPU until `to`.
    """

    given: Tensor
    padding: Tensor | None
    of_their_own: Tensor

    def to(self, device: torch.device) -> "Tasks":
        padding = None if self.padding is None else self.padding.to(device)
        return Tasks(self.given.to(device), padding, self.of_their_own.to(device))


def draw_tasks(draws: Sequence[Draw], frames: int, settings: ConditionSettings, *, seed: int) -> Tasks | None:
    """The tasks of the samples at `draws`, which have so many latent frames; None if all are text to video
    without sigmas of their own.
    """
    if not settings.used:
        return None
    given, last, own = [], [], []
    for place in draws:
        rng = random.Random(f"{seed} {place.step} {place.slot} task")
        first, ends = _draw(rng, frames, settings)
        given.append([frame < first for frame in range(frames)])
        last.append(ends)
        own.append(frames - first > 1 and rng.random() < settings.independent)
    in_clip, of_their_own = torch.tensor(given), torch.tensor(own)
    if not any(last):
        return Tasks(in_clip, None, of_their_own)
    behind = torch.tensor(last)[:, None]
    padding = torch.cat([torch.zeros_like(in_clip), ~behind], dim=1)
    both = torch.cat([in_clip, torch.ones_like(behind)], dim=1)
    return Tasks(both, padding if padding.any() else None, of_their_own)


def _draw(rng: random.Random, frames: int, settings: ConditionSettings) -> tuple[int, bool]:
    """How many frames are given at the beginning, and whether a last one is."""
    kind = rng.random()
    if frames == 1 or kind >= settings.first + settings.prefix + settings.first_last:
        return 0, False
    if kind < settings.first_last:
        return 1, True
    if kind < settings.first_last + settings.prefix and frames > 2:
        return rng.randint(2, frames - 1), False
    return 1, False
