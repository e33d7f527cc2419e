"""Guidance on two devices: one denoises with the prompt, the other without. By hooks, from outside."""

from typing import Any

from torch import Tensor, nn

from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.parallel.collectives import Group, all_gather, part_of


def share_branches(model: SparseUMMDiT, group: Group) -> None:
    """Let each rank of `group` run its part of a batch, and give all of them the whole output.

    Made for both branches of guidance in one batch (`batched_guidance`); other batches that the ranks cannot
    share out evenly are run whole by each.
    """
    shared: list[bool] = []

    def divide(
        _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        shared.append(kwargs["hidden_states"].shape[0] % group.size() == 0)
        if not shared[-1]:
            return args, kwargs
        own = {
            name: part_of(value, dim=0, group=group) if isinstance(value, Tensor) else value
            for name, value in kwargs.items()
        }
        return args, own

    def join(_model: nn.Module, _args: Any, _kwargs: Any, output: tuple[Tensor]) -> tuple[Tensor]:  # noqa: ANN401
        return (all_gather(output[0], dim=0, group=group),) if shared.pop() else output

    model.register_forward_pre_hook(divide, with_kwargs=True)
    model.register_forward_hook(join, with_kwargs=True)
