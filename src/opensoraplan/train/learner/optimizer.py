"""AdamW over a model's weights as the original groups them, and the learning rate of each step. AdamW with
moments in 8 bits is in adamw8.py.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from opensoraplan.parallel.ranks import place_in_job
from opensoraplan.runtime.nf4 import check_bitsandbytes
from opensoraplan.train.config import OptimizerSettings
from opensoraplan.train.learner.adamw8 import AdamW8bit

# In a group of parameters: its learning rate in parts of the run's.
_RATIO = "lr_ratio"


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    settings: OptimizerSettings,
    lr_ratios: Mapping[str, float] = MappingProxyType({}),
) -> torch.optim.AdamW:
    """AdamW, fused, with its state of before the first step, where checkpoints can be read into; biases and
    other 1-D tensors have no weight decay (docs/model.md, section 5). Parameters named in `lr_ratios` learn
    at this multiple of the rate.
    """
    groups = []
    for ratio in (1.0, *sorted({*lr_ratios.values()} - {1.0})):
        named = [p for name, p in parameters.items() if lr_ratios.get(name, 1.0) == ratio]
        decayed, plain = [p for p in named if p.ndim > 1], [p for p in named if p.ndim <= 1]
        groups.append({"params": decayed, "weight_decay": settings.weight_decay, _RATIO: ratio})
        groups.append({"params": plain, "weight_decay": 0.0, _RATIO: ratio})
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "fused": True}
    if settings.bits == 8:
        eight = AdamW8bit(groups, **options)
        eight.begin_state()
        return eight
    optimizer = torch.optim.AdamW(groups, **options)
    begin_state(optimizer)
    return optimizer


def check_optimizer(settings: OptimizerSettings) -> None:
    """Raise ValueError for an AdamW that this installation, or several processes, cannot have."""
    if settings.bits == 32:
        return
    check_bitsandbytes("optimizer.bits = 8")
    if (processes := place_in_job()[1]) > 1:
        raise ValueError(
            f"optimizer.bits = 8 works in one process only, got {processes}: use 32, which FSDP shards"
        )


def begin_state(optimizer: torch.optim.AdamW) -> None:
    """Give a fused AdamW the state that it has before its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `KIND.PARAMETER`; `parameters` are its own, by name."""
    return {
        f"{kind}.{name}": value
        for name, parameter in parameters.items()
        for kind, value in optimizer.state[parameter].items()
    }


def learning_rate(step: int, settings: OptimizerSettings) -> float:
    """The rate of optimizer step `step` (from 0): a linear rise over `warmup_steps`, then the schedule."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return settings.final_lr + (settings.lr - settings.final_lr) * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(_RATIO, 1.0)
