"""A moving average of the weights, kept beside the optimizer and used for validation and export."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from opensoraplan.parallel.shards import local
from opensoraplan.train.config import OptimizerSettings

# Where weights are in another dtype or on another device, so many of their average's are copied at a time.
_GROUP_BYTES = 10**8


def make_ema(parameters: Mapping[str, Tensor], settings: OptimizerSettings) -> "Ema | None":
    """The average that the settings want of these weights."""
    if settings.ema_decay is None:
        return None
    device = "cpu" if settings.ema_device == "cpu" else None
    return Ema(parameters, decay=settings.ema_decay, device=device)


class Ema:
    """value <- decay * value + (1 - decay) * weight after each step, for many tensors in a foreach pass.

    Early on the decay is (1 + step) / (10 + step), so that the first weights are soon forgotten. The average
    is in fp32 on `device` (None: where each weight is). `parameters`: the model's, by name.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        decay: float,
        device: torch.device | str | None = None,
    ) -> None:
        self.decay = decay
        self._weights = {name: weight.detach() for name, weight in parameters.items()}
        self.values = {
            name: torch.empty_like(weight, dtype=torch.float32, device=device).copy_(weight)
            for name, weight in self._weights.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step number `step` (from 1)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        for group in self._groups():
            values = [local(self.values[name]) for name in group]
            weights = [
                local(self._weights[name]).to(value.device, value.dtype)
                for name, value in zip(group, values, strict=True)
            ]
            torch._foreach_lerp_(values, weights, share)  # pyright: ignore[reportPrivateImportUsage]

    def _groups(self) -> Iterator[list[str]]:
        """The tensors' names, so many at a time that copies of their weights take little memory."""
        group, size = [], 0
        for name, value in self.values.items():
            group.append(name)
            size += local(value).nbytes
            if size >= _GROUP_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    @contextmanager
    def swap_in(self) -> Iterator[None]:
        """The model has the averaged weights inside this block, its own again after it, bit for bit."""
        own: dict[str, Tensor] = {}
        exchanged: list[str] = []
        try:
            for name, weight in self._weights.items():
                # Where both are in fp32 they change places, with no more memory than for one of them.
                before = weight.clone()
                weight.copy_(self.values[name])
                if weight.dtype == torch.float32:
                    self.values[name].copy_(before)
                    exchanged.append(name)
                else:
                    own[name] = before
            yield
        finally:
            for name in exchanged:
                weight, value = self._weights[name], self.values[name]
                average = weight.clone()
                weight.copy_(value)
                value.copy_(average)
            for name, weight in own.items():
                self._weights[name].copy_(weight)
