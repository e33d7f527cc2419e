"""Flow matching as pure functions: schedules, shifts, noising, target, loss weights, guidance,
the Euler step.

Shared by training and sampling. Convention (docs/model.md section 4): x_t = sigma * noise + (1 - sigma)
* x0, the model predicts the velocity noise - x0, and its timestep is 1000 * sigma. No state, no model,
no device choice.
"""

import math
from typing import Literal

import torch
from torch import Tensor

TIMESTEP_SCALE = 1000.0
Weighting = Literal["logit_normal", "mode", "sigma_sqrt", "cosmap", "uniform"]


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move sigmas in [0, 1] towards 1 for shift > 1: shift * s / (1 + (shift - 1) * s). Any shape."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_mu(latent_height: int, latent_width: int) -> float:
    """Log of the dynamic shift for frames of latent_height x latent_width cells: linear in the tokens of a
    frame (cells / 4), 0.5 at 256 and 1.15 at 4096, and on the same line outside, as in the original.
    """
    tokens = latent_height * latent_width / 4
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def dynamic_shift(latent_height: int, latent_width: int) -> float:
    """Shift for frames of latent_height x latent_width cells: exp(mu)."""
    return math.exp(dynamic_mu(latent_height, latent_width))


def sampling_sigmas(num_inference_steps: int, shift: float = 1.0) -> Tensor:
    """Sigmas [steps + 1] from 1 to 0: evenly spaced, then shifted."""
    return shift_sigmas(torch.linspace(1, 0, num_inference_steps + 1), shift)


def linear_quadratic_sigmas(num_inference_steps: int) -> Tensor:
    """Sigmas [steps + 1] that fall slowly in a straight line over the first half of the steps, then on a
    parabola to 0.

    No shift applies. The slow half is what a uniform schedule of A = clamp(10 steps, 250, 1000) / 2
    steps would do.
    """
    n = num_inference_steps
    if n < 2 or n % 2:
        raise ValueError(
            f"the linear-quadratic schedule needs an even number of steps, got {n}: use {max(2, n + 1)}"
        )
    half = n // 2
    slow = min(max(10 * n, 250), 1000) / 2
    a = (slow - half) / (slow * half**2)
    b = (5 * half - 4 * slow) / (2 * slow * half)
    c = (slow - half) / slow
    linear = [i / (2 * slow) for i in range(half)]
    quadratic = [a * i**2 + b * i + c for i in range(half, n)]
    return 1 - torch.tensor([*linear, *quadratic, 1.0])


def sigmas_from_normal(normal: Tensor) -> Tensor:
    """Training sigmas of the `logit_normal` density from standard normal draws. Any shape."""
    return torch.sigmoid(normal)


def sigmas_from_uniform_mode(uniform: Tensor, mode_scale: float = 1.29) -> Tensor:
    """Training sigmas of the `mode` density from uniform draws in [0, 1). Any shape."""
    u = uniform
    return 1 - u - mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


def loss_weight(sigma: Tensor, weighting: Weighting) -> Tensor:
    """Weight of each sample's loss at its sigma. Any shape."""
    if weighting == "sigma_sqrt":
        return sigma**-2
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t for clean latents and noise [B, C, T, H, W] at sigma [B], or at one of each frame, [B, T]."""
    s = sigma.view(len(sigma), *[1] * (x0.ndim - 1)) if sigma.ndim == 1 else sigma[:, None, :, None, None]
    return s * noise + (1 - s) * x0


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the model is to predict: noise - x0."""
    return noise - x0


def guide(
    uncond: Tensor, cond: Tensor, scale: float, rescale: float = 0.0, *, where: Tensor | None = None
) -> Tensor:
    """Classifier-free guidance of two velocities [B, ...], with the rescale of arXiv 2305.08891.

    g = uncond + scale * (cond - uncond); the result is rescale * g * std(cond) / std(g) + (1 - rescale) * g,
    the standard deviations taken over everything but the batch, or over the part of it that `where`, which
    broadcasts, is True in.
    """
    guided = uncond + scale * (cond - uncond)
    if rescale == 0:
        return guided
    matched = guided * (_std(cond, where) / _std(guided, where))
    return rescale * matched + (1 - rescale) * guided


def _std(x: Tensor, where: Tensor | None) -> Tensor:
    """Standard deviation of each sample of [B, ...], with Bessel's correction: [B, 1, ...]."""
    over = tuple(range(1, x.ndim))
    if where is None:
        return x.std(over, keepdim=True)
    part = where.expand_as(x)
    count = part.sum(over, keepdim=True)
    mean = (x * part).sum(over, keepdim=True) / count
    return ((x - mean).square() * part).sum(over, keepdim=True).div(count - 1).sqrt()


def euler_step(sample: Tensor, velocity: Tensor, sigma: float | Tensor, next_sigma: float | Tensor) -> Tensor:
    """One step along the flow, in the sample's dtype: sample + (next_sigma - sigma) * velocity."""
    return sample + (next_sigma - sigma) * velocity.to(sample.dtype)


def adams_step(
    sample: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    next_sigma: float | Tensor,
    *,
    previous: Tensor,
    previous_sigma: float | Tensor,
) -> Tensor:
    """One step of the two-step Adams-Bashforth method, which is of second order, in the sample's dtype: along
    the velocity in the middle of the step, drawn on from those at `previous_sigma` (`previous`) and at
    `sigma`. All tensors have the sample's shape. Source: Hairer, Norsett, Wanner, Solving Ordinary
    Differential Equations I, III.5 (steps of any size); the original has Euler's alone.
    """
    half = (next_sigma - sigma) / (sigma - previous_sigma) / 2
    middle = velocity.to(sample.dtype) * (1 + half) - previous.to(sample.dtype) * half
    return euler_step(sample, middle, sigma, next_sigma)
