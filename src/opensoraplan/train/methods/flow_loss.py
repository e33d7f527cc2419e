"""The flow-matching objective of a batch: what is drawn for each sample, and its loss.

What is drawn depends on (seed, step, slot) of a sample only, never on how samples are shared out.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from opensoraplan import flow
from opensoraplan.data.buckets import Draw
from opensoraplan.models.conditions import Conditions, denoise
from opensoraplan.models.vae import VideoVAE
from opensoraplan.train.config import ConditionSettings, FlowSettings
from opensoraplan.train.inputs.encoders import sample_posterior
from opensoraplan.train.inputs.sources import Encoded
from opensoraplan.train.methods.tasks import Tasks, draw_tasks

TEXT_TO_VIDEO = ConditionSettings()


class Drawn(NamedTuple):
    """For B samples: sigma [B], or [B, T] where frames have their own, the noises of the posterior and of the
    flow, both [B, C, T, H, W], and what is given of the clips.
    """

    sigma: Tensor
    posterior: Tensor
    noise: Tensor
    tasks: Tasks | None = None

    def to(self, device: torch.device) -> "Drawn":
        return Drawn(*(None if one is None else one.to(device) for one in self))  # type: ignore[arg-type]


def draw(
    draws: Sequence[Draw],
    shape: Sequence[int],
    settings: FlowSettings,
    *,
    seed: int,
    conditions: ConditionSettings = TEXT_TO_VIDEO,
) -> Drawn:
    """What the samples at `draws` need; `shape` [C, T, H, W] is that of their latents. fp32, on the CPU."""
    sigmas, posterior, noise = [], [], []
    tasks = draw_tasks(draws, shape[1], conditions, seed=seed)
    of_their_own = [False] * len(draws) if tasks is None else tasks.of_their_own.tolist()
    for place, own in zip(draws, of_their_own, strict=True):
        source = random.Random(f"{seed} {place.step} {place.slot}").getrandbits(63)
        generator = torch.Generator().manual_seed(source)
        sigmas.append(_sigma(settings, generator))
        posterior.append(torch.randn(*shape, generator=generator))
        noise.append(torch.randn(*shape, generator=generator))
        if own:
            sigmas[-1] = _sigma(settings, generator, (shape[1],))
    if any(of_their_own):
        sigmas = [sigma.expand(shape[1]) for sigma in sigmas]
    sigma = torch.stack(sigmas)
    shift = flow.dynamic_shift(*shape[2:]) if settings.shift == "dynamic" else settings.shift
    return Drawn(flow.shift_sigmas(sigma, shift), torch.stack(posterior), torch.stack(noise), tasks)


def _sigma(settings: FlowSettings, generator: torch.Generator, size: tuple[int, ...] = ()) -> Tensor:
    if settings.weighting == "logit_normal":
        return flow.sigmas_from_normal(torch.randn(size, generator=generator))
    uniform = torch.rand(size, generator=generator)
    return flow.sigmas_from_uniform_mode(uniform) if settings.weighting == "mode" else uniform


def prepare(encoded: Encoded, drawn: Drawn, vae: VideoVAE) -> tuple[Tensor, Conditions, Drawn]:
    """Normalised latents [B, C, T, H, W] of a micro-batch in fp32, its conditions, and what was drawn, for as
    many frames. Frames that are given are means of the posterior, as in generating.
    """
    latents = vae.normalize_latents(sample_posterior(encoded.moments.float(), drawn.posterior))
    tasks, sigma, noise = drawn.tasks, drawn.sigma, drawn.noise
    if tasks is None:
        return latents, Conditions(encoded.prompt), drawn
    clean = vae.normalize_latents(encoded.moments.float().chunk(2, dim=1)[0])
    if tasks.given.shape[1] > latents.shape[2]:
        assert encoded.last is not None
        last = vae.normalize_latents(encoded.last.float().chunk(2, dim=1)[0])
        latents, clean = (torch.cat([frames, last], dim=2) for frames in (latents, clean))
        noise = torch.cat([noise, torch.zeros_like(last)], dim=2)
        sigma = sigma if sigma.ndim == 1 else F.pad(sigma, (0, 1))
    conditions = Conditions(encoded.prompt, clean, tasks.given, tasks.padding)
    return latents, conditions, drawn._replace(sigma=sigma, noise=noise)


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
    """Weighted mean squared error of each sample's velocity, [B] in fp32: what is minimised and logged. The
    mean is over the frames that are generated; those that the conditions give do not count. Latents
    [B, C, T, H, W] are normalised and in fp32, as are sigma, [B] or [B, T], and noise; the model runs in
    `dtype`, the other computations in fp32.
    """
    noisy = flow.add_noise(latents, noise, sigma)
    told = conditions.to(latents.device, dtype)
    velocity = denoise(model, noisy, sigma * flow.TIMESTEP_SCALE, told)
    error = (velocity - flow.velocity_target(latents, noise)).square()
    if sigma.ndim == 1 and told.given is None:
        return error.flatten(1).mean(1) * flow.loss_weight(sigma, weighting)
    of_frames = error.mean((1, 3, 4))  # [B, T]
    weight = flow.loss_weight(sigma if sigma.ndim == 2 else sigma[:, None], weighting).expand_as(of_frames)
    if told.given is None:
        return (of_frames * weight).mean(1)
    return (of_frames * weight).masked_fill(told.given, 0).sum(1) / (~told.given).sum(1)
