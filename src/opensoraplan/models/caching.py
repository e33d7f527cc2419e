"""Diffusers' caches on a denoiser: which of them it works with, and what a call has to be like for each.

The caches themselves are diffusers' hooks; our own use of one of them, with calibration, is in step_cache.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from diffusers.hooks.faster_cache import FasterCacheConfig
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.hooks import HookRegistry
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig
from diffusers.hooks.sea_cache import SeaCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from diffusers.hooks.text_kv_cache import TextKVCacheConfig
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

# Caches that can do nothing here, or only wrong: the reason.
UNSUPPORTED = {
    FasterCacheConfig: (
        "it splits a batch of both branches of guidance, whose texts have to be equally long, "
        "and this model cuts each text to its own length"
    ),
    TextKVCacheConfig: "it is made for the blocks of another model",
}
# Caches that add what all blocks did before to the stream that enters the first one.
ACROSS_BLOCKS = (FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig)
ATTENTION = r"transformer_blocks\.\d+\.attn1"


class CheckedCacheMixin(CacheMixin):
    """`enable_cache` of diffusers, which raises ValueError for a cache that would do nothing, or harm."""

    def enable_cache(self, config: Any) -> None:  # noqa: ANN401 (diffusers' configs share no class)
        """Cache by one of diffusers' configs: FirstBlockCache, MagCache, SeaCache, TaylorSeer, or Pyramid
        Attention Broadcast, which needs batched guidance or none.
        """
        name = _name_of(config)
        if reason := UNSUPPORTED.get(type(config)):
            raise ValueError(f"{name} does not work with this model: {reason}")
        model = cast(Any, self)
        _check_order(config, model.config["sparse_n"])
        if isinstance(config, TaylorSeerCacheConfig) and not config.use_lite_mode:
            # Its own patterns look for modules that are called "attn".
            config = replace(config, cache_identifiers=config.cache_identifiers or [ATTENTION])
        if isinstance(config, SeaCacheConfig) and config.raw_vision_callback is None:
            config = replace(config, raw_vision_callback=_latents_of)
        before = _count_hooks(model)
        super().enable_cache(config)
        if _count_hooks(model) == before:
            self.disable_cache()
            raise ValueError(f"{name} finds none of its modules in this model: attention is {ATTENTION}")

    def check_cached_call(self, *, steps: int, first_step: int, guided: range, batched: bool) -> None:
        """Raise ValueError if the cache that is enabled would go wrong in a call of `steps` steps that begins
        at `first_step`, of which those in `guided` have two branches, `batched` or one after the other.
        """
        config, name = self._cache_config, _name_of(self._cache_config)
        if config is None:
            return
        _check_order(config, cast(Any, self).config["sparse_n"])
        if isinstance(config, PyramidAttentionBroadcastConfig) and guided and not batched:
            raise ValueError(
                f"{name} cannot tell the branches of guidance apart: give batched_guidance=True, "
                "or no guidance"
            )
        if isinstance(config, MagCacheConfig):
            if config.num_inference_steps != steps or first_step:
                raise ValueError(
                    f"{name} counts {config.num_inference_steps} steps from the first, this call has {steps} "
                    f"from step {first_step} on: set its num_inference_steps to {steps}, and begin at step 0"
                )
            if guided and (guided.start > 0 or (batched and guided.stop < steps)):
                raise ValueError(
                    f"{name} counts the steps of each branch of guidance: guide from the first step on, and "
                    f"with batched_guidance to the last, not steps {guided.start} to {guided.stop} of {steps}"
                )


def check_dense_ends(rates: Sequence[int] | None, *, what: str = "a step cache") -> None:
    """Raise ValueError unless tokens are in the same order before the first and after the last block, given
    the Skiparse `rates` of all stages.
    """
    if rates is not None and (rates[0] != 1 or rates[-1] != 1):
        raise ValueError(f"{what} needs dense first and last stages (rate 1), the model has {list(rates)}")


def _check_order(config: object, rates: Sequence[int] | None) -> None:
    if isinstance(config, ACROSS_BLOCKS):
        check_dense_ends(rates, what=_name_of(config))


def _name_of(config: object) -> str:
    return type(config).__name__.removesuffix("Config")


def _count_hooks(model: nn.Module) -> int:
    """Of the modules inside."""
    registries = [
        getattr(module, "_diffusers_hook", None) for module in model.modules() if module is not model
    ]
    return sum(len(registry.hooks) for registry in registries if isinstance(registry, HookRegistry))


def _latents_of(_model: nn.Module, _args: tuple[Any, ...], options: dict[str, Any]) -> list[Tensor]:
    """What SeaCache looks at: the latents [C, T, H, W] of each video in a call of the denoiser."""
    return list(torch.unbind(options["hidden_states"]))
