"""Checks arguments of the pipeline and of its calls, and repeats them for each video. No model runs here."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    PipelineCallback,
)
from torch import Tensor

from opensoraplan.models.conditions import text_features, wrong_features
from opensoraplan.models.text import shapes_of, text_encoder_of

LARGEST_SEED = 2**63 - 1


def check_parts(transformer: Any, vae: Any, *text_encoders: Any) -> None:  # noqa: ANN401
    """Raise ValueError for parts whose widths do not fit. None, which offloading tools may pass,
    is not checked.
    """
    given = shapes_of([text_encoder_of(model, None) for model in text_encoders if model is not None])
    latents, gives = vae and vae.latent_channels, "the VAE's latents have"
    if transformer is not None and vae is None:
        latents, gives = transformer.config["out_channels"], "its velocity has"
    if transformer is None:
        return
    for key in ("in_channels", "out_channels"):  # only noisy latents: nothing is concatenated to them
        wanted = transformer.config[key]
        if latents and latents != wanted:
            raise ValueError(f"the denoiser needs {wanted} channels ({key}), but {gives} {latents}")
    if wrong := wrong_features(transformer.config, {**text_features(transformer.config), **given}):
        raise ValueError("; ".join(wrong))


def check_guidance(scale: float, rescale: float = 0.0, interval: tuple[float, float] = (0.0, 1.0)) -> None:
    """Raise ValueError for impossible settings of guidance."""
    if not 0 <= scale < math.inf:
        raise ValueError(f"guidance_scale must be at least 0 (1 or less: no guidance), got {scale}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale must be from 0 to 1, got {rescale}")
    start, end = interval
    if not 0 <= start <= end <= 1:
        raise ValueError(f"guidance_interval must be 0 <= start <= end <= 1, got {interval}")


def check_texts(texts: Sequence[str], *, name: str) -> None:
    """Raise ValueError unless all are strings."""
    strange = [text for text in texts if not isinstance(text, str)]
    if strange:
        raise ValueError(f"{name} must be a string or a list of strings, got {strange[0]!r}")


def range_of_steps(interval: tuple[float, float], steps: int) -> range:
    """The steps, counted from 0, between these fractions of a run, rounded to whole steps."""
    start, end = interval
    return range(round(start * steps), round(end * steps))


def repeat_texts(value: str | Sequence[str] | None, count: int) -> list[str]:
    """One negative prompt for each of `count` prompts, from one for all or one for each."""
    values = [value or ""] * count if value is None or isinstance(value, str) else list(value)
    if len(values) != count:
        raise ValueError(f"{len(values)} negative prompts for {count} prompts: give one, or one for each")
    return values


def make_generators(
    batch: int, seeds: Sequence[int] | None, generator: torch.Generator | list[torch.Generator] | None
) -> list[torch.Generator]:
    """A generator for each of `batch` videos: new ones on the CPU with these `seeds`, or those given."""
    if isinstance(generator, torch.Generator):
        return [generator] * batch
    if generator is None:
        return [torch.Generator("cpu").manual_seed(seed) for seed in seeds or ()]
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} videos: give one, or one for each")
    return list(generator)


def make_seeds(batch: int, seed: int | Sequence[int] | None) -> list[int]:
    """A seed for each of `batch` videos: as given, or counting up from one. None: the first one is drawn from
    torch's global generator.
    """
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    seeds = seed if isinstance(seed, Sequence) else [seed + i for i in range(batch)]
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} videos: give one, or one for each")
    for value in seeds:
        if not 0 <= value <= LARGEST_SEED:
            raise ValueError(f"a seed must be from 0 to {LARGEST_SEED}, got {value}")
    return [operator.index(value) for value in seeds]


def callback_inputs(callback: object, names: Sequence[str], *, known: Sequence[str]) -> Sequence[str]:
    """The names of the tensors that a callback gets: a callback of diffusers says which, any other gets
    `names`. Raises ValueError for names that are not `known`, and for callbacks that cannot work here.
    """
    several = callback.callbacks if isinstance(callback, MultiPipelineCallbacks) else [callback]
    official = [one for one in several if isinstance(one, PipelineCallback)]
    if any(isinstance(one, IPAdapterScaleCutoffCallback) for one in official):
        raise ValueError("IPAdapterScaleCutoffCallback has no effect: this pipeline has no IP adapters")
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        names = callback.tensor_inputs
    if unknown := sorted(set(names) - set(known)):
        whose = f" for {type(callback).__name__}" if official else ""
        raise ValueError(f"callbacks can have {', '.join(known)}; not {', '.join(unknown)}{whose}")
    return names


def changed_tensors(given: Mapping[str, Tensor], returned: object) -> dict[str, Tensor]:
    """The tensors that a callback changed: those that it `returned` and that differ from those `given`.

    If it returns only the last row of prompt embeddings, they count as unchanged: diffusers' callbacks cut
    off the unconditional branch this way, which our embeddings do not have. Raises ValueError for tensors
    that cannot take effect.
    """
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        raise ValueError(f"a callback returns a dict of tensors, or None, got {type(returned).__name__}")
    changed = {}
    for name, value in returned.items():
        if name not in given:
            raise ValueError(f"the callback returned {name!r}; it can return {', '.join(given)}")
        before = given[name]
        if value is before:
            continue
        if name == "velocity":
            raise ValueError(
                "the callback cannot change velocity, whose step is done: return latents instead"
            )
        if not isinstance(value, Tensor) or value.shape != before.shape:
            if name != "latents" and isinstance(value, Tensor) and torch.equal(value, before[-1:]):
                continue
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the callback must return {name} of shape {list(before.shape)}, got {shape}")
        changed[name] = value
    return changed


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise in fp32 from the generator's own device."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32).cpu()
