"""Gradient clipping, to a bound that follows the gradient norms of the run or to a fixed one, and what to
do beyond it.

Not here: going back to a checkpoint after repeated outliers, which is the trainer's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from opensoraplan.parallel.shards import local

Outlier = Literal["clip", "skip", "stop"]

CLIP_SIGMAS, OUTLIER_SIGMAS = 3.0, 5.0
# A norm up to this is never an outlier, and the first mean is never above FIRST_MEAN.
LEAST_OUTLIER, FIRST_MEAN, FIRST_FACTOR = 5.0, 1.0, 3.0


class GradientOutlierError(FloatingPointError):
    """A gradient norm is not finite or beyond max(mean + 5 sigma, 5), and the run is to stop at that."""


@dataclass(frozen=True)
class Clipping:
    """What to do with the gradients of a step. `scale` is the factor for them (1.0: leave them alone).

    action: "step" with the gradients as they are, "clipped" (step after scaling), or "skip" (no step).
    `mean` and `std` are the statistics after this norm (0 without statistics), `threshold` the bound that it
    was held against.
    """

    action: Literal["step", "clipped", "skip"]
    scale: float
    threshold: float
    mean: float = 0.0
    std: float = 0.0


class Clip(Protocol):
    """Decides about the gradients of each step by their global norm; what it remembers fits into JSON."""

    def decide(self, norm: float) -> Clipping: ...
    def state_dict(self) -> Mapping[str, float | None]: ...
    def load_state_dict(self, state: Mapping[str, float | None]) -> None: ...


class FixedClip:
    """Scales gradients down to `max_norm`; a step whose norm is not finite is skipped. Remembers nothing."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def decide(self, norm: float) -> Clipping:
        """Decide about gradients of this global norm, before any clipping."""
        if not math.isfinite(norm):
            return Clipping("skip", scale=1.0, threshold=self.max_norm)
        if norm > self.max_norm:
            return Clipping("clipped", scale=self.max_norm / norm, threshold=self.max_norm)
        return Clipping("step", scale=1.0, threshold=self.max_norm)

    def state_dict(self) -> dict[str, float | None]:
        return {}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        assert not state


class AdaptiveClip:
    """Clips to threshold = mean + 3 sigma, an exponential mean and variance of the norms of the run so far.

    A norm at or under the threshold moves the mean, then the variance about the new mean; one over it is
    scaled down to the threshold and leaves them alone. The first finite norm above 0 sets the mean to min(3
    norm, 1) and is not clipped, however large. A norm that is not finite or is beyond max(mean + 5 sigma, 5)
    is an outlier, which never moves the statistics: "skip" leaves the step out, "clip" scales it down like
    any other (one that is not finite cannot be: it is skipped), "stop" raises GradientOutlierError.

    Computes in Python floats, as the original does. Source: docs/model.md section 5, `clip_grad_ema_decay`.
    """

    def __init__(self, *, ema_decay: float = 0.99, outlier: Outlier = "skip") -> None:
        self.ema_decay = ema_decay
        self.outlier: Outlier = outlier
        self._mean: float | None = None
        self._variance = 0.0

    def decide(self, norm: float) -> Clipping:
        """Decide about gradients of this global norm, before any clipping, and take it into account."""
        if self._mean is None:
            if not math.isfinite(norm):
                return self._skip(norm, threshold=FIRST_MEAN, limit=LEAST_OUTLIER, mean=0.0)
            # A mean of 0 would clip every later step to nothing.
            if norm == 0:
                return Clipping("step", scale=1.0, threshold=FIRST_MEAN, mean=0.0, std=0.0)
            self._mean = min(FIRST_FACTOR * norm, FIRST_MEAN)
            return Clipping("step", scale=1.0, threshold=self._mean, mean=self._mean, std=0.0)
        mean, std = self._mean, self._variance**0.5
        threshold = mean + CLIP_SIGMAS * std
        limit = max(mean + OUTLIER_SIGMAS * std, LEAST_OUTLIER)
        if not math.isfinite(norm) or (norm > limit and self.outlier != "clip"):
            return self._skip(norm, threshold=threshold, limit=limit, mean=mean)
        if norm > threshold:
            return Clipping("clipped", scale=threshold / norm, threshold=threshold, mean=mean, std=std)
        share = 1 - self.ema_decay
        self._mean = self.ema_decay * mean + share * norm
        self._variance = self.ema_decay * self._variance + share * (norm - self._mean) ** 2
        return Clipping("step", scale=1.0, threshold=threshold, mean=self._mean, std=self._variance**0.5)

    def _skip(self, norm: float, *, threshold: float, limit: float, mean: float) -> Clipping:
        std = self._variance**0.5
        if self.outlier == "stop":
            raise GradientOutlierError(
                f"the gradient norm is {norm:.6g}; up to {limit:.6g} is allowed (mean {mean:.6g}, sigma "
                f"{std:.6g}, threshold {threshold:.6g}): lower the learning rate, or set clip.outlier to skip"
            )
        return Clipping("skip", scale=1.0, threshold=threshold, mean=mean, std=std)

    def state_dict(self) -> dict[str, float | None]:
        """The statistics, for JSON; the mean is None before the first norm."""
        return {"mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Go on from what `state_dict` gave."""
        mean, variance = state["mean"], state["variance"]
        assert variance is not None
        self._mean, self._variance = mean, variance


@torch.no_grad()
def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, summed up in fp32; a scalar on their device. 0 for none.

    Of sharded gradients, that of the whole ones: all ranks ask.
    """
    norms = [_whole_norm(like, parts) for like, parts in _by_sharding(gradients)]
    return torch.stack(norms).norm() if norms else torch.zeros(())


def _by_sharding(gradients: Sequence[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
    """Local parts of gradients that are sharded alike, with one of the gradients."""
    groups: dict[object, tuple[Tensor, list[Tensor]]] = {}
    for gradient in gradients:
        key = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        groups.setdefault(key, (gradient, []))[1].append(local(gradient))
    return list(groups.values())


def _whole_norm(like: Tensor, parts: list[Tensor]) -> Tensor:
    """The norm of whole gradients, sharded as `like` is, of which this rank has `parts`."""
    norms = torch._foreach_norm(parts, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    norm = torch.stack(norms).norm()
    if not isinstance(like, DTensor):
        return norm
    total = norm.square()
    for dim, placement in enumerate(like.placements):
        if not placement.is_replicate():
            dist.all_reduce(total, group=like.device_mesh.get_group(dim))
    return total.sqrt()


@torch.no_grad()
def scale_(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiply all gradients by `factor`, in place."""
    if gradients:
        torch._foreach_mul_([local(gradient) for gradient in gradients], factor)  # pyright: ignore[reportPrivateImportUsage]
