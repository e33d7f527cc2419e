"""What a call of the pipeline, and the pipeline itself, is given: checked, and spread over its videos.

No model runs here.
"""

import math
import operator
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST_SEED = 2**63 - 1

# Options of the default scheduler that would change its steps, at the values that do not.
UNREAD_OPTIONS = {
    "stochastic_sampling": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


def check_parts(transformer: Any, vae: Any, text_encoder: Any, text_encoder_2: Any) -> None:  # noqa: ANN401
    """Raise ValueError for parts whose widths do not fit. None, which offloading tools may pass, is not
    checked.
    """
    latent_channels = vae and vae.config["latent_channels"]
    widths = [
        ("in_channels", "the VAE's latents have", latent_channels),
        ("out_channels", "the VAE's latents have", latent_channels),
        ("caption_channels", "the T5 encoder gives", text_encoder and text_encoder.config.d_model),
        ("pooled_projection_dim", "CLIP gives", text_encoder_2 and text_encoder_2.config.projection_dim),
    ]
    for key, gives, width in widths:
        if transformer is not None and width and width != transformer.config[key]:
            wanted = transformer.config[key]
            raise ValueError(f"the denoiser was made for {wanted} channels ({key}), but {gives} {width}")


def check_flow_scheduler(scheduler: Any) -> None:  # noqa: ANN401
    """Raise ValueError for a scheduler of diffusers that does not step along a predicted flow."""
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction":
        raise ValueError(
            f"the {name} takes a prediction of type {prediction!r}, but this model predicts the flow: "
            "give it prediction_type='flow_prediction' and use_flow_sigmas=True, where it has them"
        )
    if not config.get("use_flow_sigmas", True):
        raise ValueError(f"the {name} needs use_flow_sigmas=True for this model")


def check_default_scheduler(config: Mapping[str, Any]) -> None:
    """Raise ValueError for options of the default scheduler that nobody would read."""
    unread = [f"{key}={config[key]!r}" for key, value in UNREAD_OPTIONS.items() if config[key] != value]
    if unread:
        raise ValueError(
            "of the default scheduler, only shift and use_dynamic_shifting are read: "
            f"leave out {', '.join(unread)}"
        )


def check_guidance(scale: float, rescale: float, interval: tuple[float, float]) -> None:
    """Raise ValueError for settings of guidance that cannot be."""
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
        raise ValueError(f"{name} must be a string or several, got {strange[0]!r}")


def range_of_steps(interval: tuple[float, float], steps: int) -> range:
    """The steps, counted from 0, between these fractions of a run, rounded to whole steps."""
    start, end = interval
    return range(round(start * steps), round(end * steps))


def spread(value: str | Sequence[str] | None, count: int) -> list[str]:
    """One string for each of `count` prompts, from one for all or one for each."""
    values = [value or ""] * count if value is None or isinstance(value, str) else list(value)
    if len(values) != count:
        raise ValueError(f"{len(values)} negative prompts for {count} prompts: give one, or one for each")
    return values


def generators(
    batch: int, seed: int | Sequence[int] | None, generator: torch.Generator | list[torch.Generator] | None
) -> list[torch.Generator]:
    """A source of noise for each of `batch` videos: new ones on the CPU by seed, or those given."""
    if seed is not None and generator is not None:
        raise ValueError("give either seed or generator")
    if isinstance(generator, torch.Generator):
        return [generator] * batch
    if generator is None:
        return [torch.Generator("cpu").manual_seed(s) for s in spread_seeds(batch, seed)]
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} videos: give one, or one for each")
    return list(generator)


def spread_seeds(batch: int, seed: int | Sequence[int] | None) -> list[int]:
    """A seed for each of `batch` videos, counting on from the first or as given. None: a random first."""
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    seeds = seed if isinstance(seed, Sequence) else [seed + i for i in range(batch)]
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} videos: give one, or one for each")
    for value in seeds:
        if not 0 <= value <= LARGEST_SEED:
            raise ValueError(f"a seed must be from 0 to {LARGEST_SEED}, got {value}")
    return [operator.index(value) for value in seeds]


def draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise in fp32 from the generator's own device."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32).cpu()
