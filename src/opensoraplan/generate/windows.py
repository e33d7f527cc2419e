"""The windows of a video: the frames that are generated first, and those that go on from the last ones, again
and again, of a video that is extended.

The latents of all windows are decoded as one video, in which the decoder goes on from its own state: there is
no seam. A window goes on from the last frames of the window before it, which are decoded, and encoded anew as
the beginning of a video, as denoisers are trained to go on from.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from opensoraplan.generate.saved import Record, SavedLatents
from opensoraplan.given_frames import GivenFrames
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.pipeline_pixels import GivenLatents
from opensoraplan.requests import Request


class Snapshot(NamedTuple):
    """A video so far: latents [1, C, T, H, W] after `step` steps of all windows, the last step's velocity, of
    the same shape (0 in finished windows), and the latents that the newest window goes on from.
    """

    latents: Tensor
    step: int
    velocity: Tensor | None = None
    prefix: Tensor | None = None

    @classmethod
    def of(cls, start: SavedLatents) -> "Snapshot":
        return cls(start.latents, start.step, start.velocity, start.prefix)

    def saved(self, request: Request, record: Record, **others: Any) -> SavedLatents:  # noqa: ANN401
        """What the video resumes from, with `others` of its fields. Only adams needs a velocity, within a
        window.
        """
        velocity = self.velocity if request.solver == "adams" and self.step % request.steps else None
        return SavedLatents(self.latents, self.step, record, velocity=velocity, prefix=self.prefix, **others)


@dataclass(frozen=True, eq=False)
class Window:
    """A window to generate: its number and its `frames`, of which the latents `given` are. `before`: latents
    of all windows before it. After `step` of its steps: its `latents`, and the last step's `velocity`.
    """

    number: int
    frames: int
    given: GivenLatents
    before: Tensor | None = None
    step: int = 0
    latents: Tensor | None = None
    velocity: Tensor | None = None

    def video(self, latents: Tensor) -> Tensor:
        """The latents of the video so far, with those of this window."""
        if self.before is None or self.given.first is None:
            return latents
        return torch.cat([self.before.to(latents), latents[:, :, self.given.first.shape[2] :]], dim=2)

    def snapshot(self, latents: Tensor, step: int, velocity: Tensor, *, steps: int) -> Snapshot:
        """The video after `step` of this window's `steps` steps, or calls of a scheduler that has more."""
        so_far, step = self.video(latents), min(step, steps)
        if self.before is None or self.given.first is None:
            return Snapshot(so_far, step, velocity)
        of_window = velocity[:, :, self.given.first.shape[2] :]
        moved = F.pad(of_window, (0, 0, 0, 0, self.before.shape[2], 0))
        return Snapshot(so_far, self.number * steps + step, moved, self.given.first)


def next_window(
    pipeline: OpenSoraPlanPipeline,
    request: Request,
    given: Callable[[], GivenFrames],
    so_far: Snapshot | None,
) -> Window:
    """The window of a request's video that is to be generated now, or to be finished. `given`: the frames
    that the whole video begins and ends with.
    """
    strides = pipeline.vae.strides
    number, step = (0, 0) if so_far is None else divmod(so_far.step, request.steps)
    frames = request.frames_of(number)
    size, overlap = ((count - 1) // strides.temporal + 1 for count in (frames, request.overlap))
    pixels = given() if number in (0, request.windows - 1) else GivenFrames()
    last = pixels.last if number == request.windows - 1 else None
    own = pipeline.encode_frames(GivenFrames(pixels.first if number == 0 else None, last))
    if so_far is None:
        return Window(number, frames, own)
    if number == 0:
        return Window(number, frames, own, None, step, so_far.latents, so_far.velocity)
    if not step:
        prefix = _encode_end(pipeline, request, so_far, number=number - 1)
        return Window(number, frames, GivenLatents(prefix, own.last), so_far.latents)
    return Window(
        number,
        frames,
        GivenLatents(so_far.prefix, own.last),
        before=so_far.latents[:, :, : overlap - size],
        step=step,
        latents=so_far.latents[:, :, -size:],
        velocity=None if so_far.velocity is None else so_far.velocity[:, :, -size:],
    )


def _encode_end(pipeline: OpenSoraPlanPipeline, request: Request, so_far: Snapshot, *, number: int) -> Tensor:
    """The latents of the last frames of a finished window, encoded as a clip of their own."""
    latents = so_far.latents
    if so_far.prefix is not None:
        strides = pipeline.vae.strides
        new = (request.frames_of(number) - request.overlap) // strides.temporal
        latents = torch.cat([so_far.prefix.to(latents), latents[:, :, -new:]], dim=2)
    end: deque[Tensor] = deque(maxlen=request.overlap)
    for pixels in pipeline.iter_decode(latents):
        end.extend(pixels.unbind(2))
    return pipeline.encode_pixels(torch.stack([*end], dim=2) * 2 - 1)


def seed_of(request: Request, window: int) -> int:
    """The seed of a window's noise: each has noise of its own."""
    return request.seed if window == 0 else random.Random(f"{request.seed} {window}").getrandbits(62)
