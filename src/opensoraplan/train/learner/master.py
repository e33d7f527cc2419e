"""The weights that an optimizer changes, where a model computes in a lower precision than they have."""

import torch
from torch import Tensor, nn


class MasterWeights:
    """The parameters of `module` that require gradients, in `master` precision, by name; the module itself,
    with what is frozen, goes over to `compute`.

    Gradients are summed up in the master precision over micro-batches. Where both precisions are the same,
    `parameters` are the module's own and nothing is copied.
    """

    def __init__(self, module: nn.Module, *, master: torch.dtype, compute: torch.dtype) -> None:
        self.module = module
        copies: dict[str, nn.Parameter] | None = None
        if master != compute:
            trained = _trained(module)
            copies = {name: nn.Parameter(p.detach().to(master, copy=True)) for name, p in trained.items()}
        # Not `module.to`, which would cast quantised weights, too.
        for parameter in module.parameters():
            if parameter.dtype != compute:
                parameter.data = parameter.data.to(compute)
        self.parameters = _trained(module) if copies is None else copies
        self._computing = None if copies is None else _trained(module)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the model's gradients of a micro-batch to those of the master weights."""
        if self._computing is None:
            return
        for name, computing in self._computing.items():
            if computing.grad is None:
                continue
            master = self.parameters[name]
            gradient = computing.grad.to(master.dtype)
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            computing.grad = None

    def forget_gradients(self) -> None:
        """Drop the model's gradients of a micro-batch that did not come to its end."""
        for computing in (self._computing or {}).values():
            computing.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model the master weights, rounded, after they have changed."""
        if self._computing is not None:
            weights: list[Tensor] = list(self._computing.values())
            masters: list[Tensor] = list(self.parameters.values())
            torch._foreach_copy_(weights, masters)  # pyright: ignore[reportPrivateImportUsage]


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
