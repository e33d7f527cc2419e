"""Weights of a denoiser that is trained from nothing, drawn one tensor at a time on the CPU, whatever device
the model is on.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from opensoraplan.defaults import Initialisation
from opensoraplan.models.adaln import AdaNormOut, AdaNormZero, LayerNorm, RMSNorm
from opensoraplan.models.sparse_ummdit import FeedForward, JointAttention, SkipLinear, SparseUMMDiT

STD = 0.02


def initial_weights(
    model: SparseUMMDiT, *, seed: int, kind: Initialisation = "adaln_zero"
) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all parameters; if a name comes twice, the last value counts. Skip connections
    without a norm start as [identity | 0] in both kinds.

    "adaln_zero": Xavier-uniform Linears without bias, the condition's normal(0, 0.02), zero for what
    modulates and for the output, so that every block starts as the identity and the velocity as 0
    (AdaLN-zero, arXiv 2212.09748).

    "original": as Open-Sora Plan v1.5.0 starts: normal(0, 0.02) without bias for every Linear that its
    tensor parallelism splits (attention, feed-forward and AdaLN), torch's defaults for the others.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = _adaln_zero if kind == "adaln_zero" else _original
    yield from draw(model, generator)
    for name, module in model.named_modules():
        if isinstance(module, SkipLinear) and module.norm is None:
            yield f"{name}.linear.weight", torch.eye(*module.linear.weight.shape)
            yield f"{name}.linear.bias", torch.zeros(module.linear.bias.shape)


def _adaln_zero(model: SparseUMMDiT, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = torch.empty(module.weight.shape, device="cpu")
            nn.init.xavier_uniform_(weight.flatten(1), generator=generator)
            yield f"{name}.weight", weight
            if module.bias is not None:
                yield f"{name}.bias", torch.zeros(module.bias.shape)
        elif isinstance(module, LayerNorm | RMSNorm):
            yield from _norm(name, module)
    for mlp in ("timestep_embedder", "text_embedder"):
        for linear in ("linear_1", "linear_2"):
            name = f"time_text_embed.{mlp}.{linear}.weight"
            weight = torch.empty(model.get_parameter(name).shape, device="cpu")
            yield name, weight.normal_(0, STD, generator=generator)
    for name, module in model.named_modules():
        if isinstance(module, AdaNormZero | AdaNormOut):
            yield f"{name}.linear.weight", torch.zeros(module.linear.weight.shape)
    yield "proj_out.weight", torch.zeros(model.proj_out.weight.shape)


def _original(model: SparseUMMDiT, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    parallel = {
        layer
        for module in model.modules()
        if isinstance(module, JointAttention | FeedForward | AdaNormZero | AdaNormOut)
        for layer in module.modules()
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = torch.empty(module.weight.shape, device="cpu")
            bias = None if module.bias is None else torch.zeros(module.bias.shape, device="cpu")
            if module in parallel:
                weight.normal_(0, STD, generator=generator)
            else:  # torch's default for both kinds of layers
                bound = 1 / math.sqrt(weight[0].numel())
                weight.uniform_(-bound, bound, generator=generator)
                if bias is not None:
                    bias.uniform_(-bound, bound, generator=generator)
            yield f"{name}.weight", weight
            if bias is not None:
                yield f"{name}.bias", bias
        elif isinstance(module, LayerNorm | RMSNorm):
            yield from _norm(name, module)


def _norm(name: str, norm: LayerNorm | RMSNorm) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", torch.ones(norm.weight.shape)
    if isinstance(norm, LayerNorm):
        yield f"{name}.bias", torch.zeros(norm.bias.shape)
