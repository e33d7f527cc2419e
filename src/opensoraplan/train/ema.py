"""A moving average of the weights, kept beside the optimizer and used for validation and export."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from opensoraplan.parallel.shards import local


class Ema:
    """value <- decay * value + (1 - decay) * weight after each step, for all tensors in one foreach pass.

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
        values = [local(value) for value in self.values.values()]
        weights = [
            local(weight).to(value.device, value.dtype)
            for weight, value in zip(self._weights.values(), values, strict=True)
        ]
        torch._foreach_lerp_(values, weights, share)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    @contextmanager
    def applied(self) -> Iterator[None]:
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
