"""AdamW with its two moments in 8 bits instead of 32 (Dettmers et al., arXiv 2110.02861), by bitsandbytes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

# Numbers that share a scale.
BLOCK = 256


class AdamW8bit(torch.optim.AdamW):
    """AdamW whose moments of matrices are uint8 [numbers] that stand for values of a table, times a scale in
    fp32 for each block of 256; the moments of biases and other vectors stay in fp32.

    The state has tensors only: `step`, `exp_avg` and `exp_avg_sq`, and of matrices their scales
    `exp_avg_scale` and `exp_avg_sq_scale`.
    """

    def begin_state(self) -> None:
        """Give all parameters the state that they have before the first step."""
        from bitsandbytes.functional import create_dynamic_map

        # The 256 values that the bytes of the first and of the second moment stand for, by device.
        self._tables: dict[torch.device, list[Tensor]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = _state_of(parameter)
                if parameter.device not in self._tables:
                    tables = (create_dynamic_map(signed=signed) for signed in (True, False))
                    self._tables[parameter.device] = [table.to(parameter.device) for table in tables]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Change the parameters that have gradients."""
        assert closure is None
        for group in self.param_groups:
            with_gradients = [p for p in group["params"] if p.grad is not None]
            vectors = [p for p in with_gradients if p.ndim <= 1]
            if vectors:
                self._step_vectors(vectors, group)
            for parameter in with_gradients:
                if parameter.ndim > 1:
                    self._step_matrix(parameter, group)

    def _step_vectors(self, vectors: list[nn.Parameter], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in vectors]
        adamw(
            vectors,  # type: ignore[arg-type] (parameters are tensors)
            [p.grad for p in vectors if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_matrix(self, matrix: nn.Parameter, group: dict[str, Any]) -> None:
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        state, (beta1, beta2) = self.state[matrix], group["betas"]
        assert matrix.grad is not None
        state["step"] += 1
        signed, unsigned = self._tables[matrix.device]
        optimizer_update_8bit_blockwise(
            "adam",  # with decoupled weight decay
            matrix.grad.contiguous(),
            matrix,
            state["exp_avg"],
            state["exp_avg_sq"],
            beta1,
            beta2,
            0.0,  # of optimizers with three
            0.0,  # of others
            group["eps"],
            int(state["step"]),
            group["lr"],
            signed,
            unsigned,
            state["exp_avg_scale"],
            state["exp_avg_sq_scale"],
            group["weight_decay"],
        )


def _state_of(parameter: nn.Parameter) -> dict[str, Tensor]:
    state = {"step": torch.zeros((), dtype=torch.float32)}
    if parameter.ndim <= 1:
        state["step"] = state["step"].to(parameter.device)  # where the fused AdamW wants it
        return {**state, **{name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
        blocks = math.ceil(parameter.numel() / BLOCK)
        state[f"{name}_scale"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
    return state
