"""The flow-matching objective of a batch: what is drawn for each sample, and its loss.

What is drawn depends on (seed, step, slot) of a sample only, never on how samples are shared out.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opensoraplan import flow
from opensoraplan.data.buckets import Draw
from opensoraplan.models.conditions import Conditions, denoise
from opensoraplan.train.config import FlowSettings


class Drawn(NamedTuple):
    """For B samples: sigma [B], and the noises of the posterior and of the flow, both [B, C, T, H, W]."""

    sigma: Tensor
    posterior: Tensor
    noise: Tensor

    def to(self, device: torch.device) -> "Drawn":
        return Drawn(*(tensor.to(device) for tensor in self))


def draw(draws: Sequence[Draw], shape: Sequence[int], settings: FlowSettings, *, seed: int) -> Drawn:
    """What the samples at `draws` need; `shape` [C, T, H, W] is that of their latents. fp32, on the CPU."""
    sigmas, posterior, noise = [], [], []
    for place in draws:
        source = random.Random(f"{seed} {place.step} {place.slot}").getrandbits(63)
        generator = torch.Generator().manual_seed(source)
        sigmas.append(_sigma(settings, generator))
        posterior.append(torch.randn(*shape, generator=generator))
        noise.append(torch.randn(*shape, generator=generator))
    sigma = torch.stack(sigmas)
    shift = flow.dynamic_shift(*shape[2:]) if settings.shift == "dynamic" else settings.shift
    return Drawn(flow.shift_sigmas(sigma, shift), torch.stack(posterior), torch.stack(noise))


def _sigma(settings: FlowSettings, generator: torch.Generator) -> Tensor:
    if settings.weighting == "logit_normal":
        return flow.sigmas_from_normal(torch.randn((), generator=generator))
    uniform = torch.rand((), generator=generator)
    return flow.sigmas_from_uniform_mode(uniform) if settings.weighting == "mode" else uniform


def losses(
    model: torch.nn.Module,
    latents: Tensor,
    conditions: Conditions,
    *,
    sigma: Tensor,
    noise: Tensor,
    dtype: torch.dtype,
    weighting: flow.Weighting,
) -> Tensor:
    """Weighted mean squared error of each sample's velocity, [B] in fp32: what is minimised and logged.
    Latents [B, C, T, H, W] are normalised and in fp32, as are sigma and noise; the model runs in `dtype`.
    """
    noisy = flow.add_noise(latents, noise, sigma)
    told = conditions.to(latents.device, dtype)
    velocity = denoise(model, noisy, sigma * flow.TIMESTEP_SCALE, told)
    error = (velocity - flow.velocity_target(latents, noise)).square()
    return error.flatten(1).mean(1) * flow.loss_weight(sigma, weighting)
