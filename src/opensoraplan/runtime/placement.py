"""Placement: decides which parts of a pipeline are on the device and which on the host, so
that generating fits.

models/sizes.py has the formulas of sizes, runtime/streaming.py moves weights. All sizes are in bytes.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import nn

from opensoraplan.device import free_memory, is_out_of_memory
from opensoraplan.models.modulation import keep_on_host
from opensoraplan.models.vae import VideoVAE
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.runtime.streaming import SLOTS, InTurn, stream_blocks, stream_layers

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

# From the fastest to the one that needs the least memory. "resident": all parts are on the device. "in-turn":
# each part is there while it computes, the denoiser for all steps; its AdaLN layers stay on the host, since
# their outputs for all steps are computed before. "streamed": the denoiser's blocks, too, are there one after
# the other, and the next one is copied while one computes.
Placement = Literal["resident", "in-turn", "streamed"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
# Latent frames decoded at a time: with fewer, more is computed twice.
CHUNKS = (16, 8, 4, 2, 1)
# Part of the free memory that is left to allocators and libraries.
MARGIN = 0.08


@dataclass(frozen=True)
class Needs:
    """Bytes of the weights of each part, where `adaln` is included in `denoiser`; of the largest `block`
    without its AdaLN layers; of the AdaLN layers' outputs for all steps of a video (`vectors`); of the
    tensors of a denoising step; and of decoding with each of CHUNKS.
    """

    encoders: int
    denoiser: int
    adaln: int
    block: int
    vae: int
    vectors: int
    denoising: int
    decoding: tuple[int, ...]
    outside: int = 0  # weights of the denoiser in no block, without AdaLN

    @property
    def weights(self) -> int:
        """Bytes of all parts together."""
        return self.encoders + self.denoiser + self.vae

    def before_decoding(self, placement: Placement) -> int:
        """Peak on the device while prompts are encoded and latents denoised."""
        if placement == "resident":
            return self.weights + self.denoising
        denoising = self.vectors + self.denoising
        if placement == "in-turn":
            return max(self.encoders, self.denoiser - self.adaln + denoising)
        return self.vae + self.outside + SLOTS * self.block + denoising

    def while_decoding(self, placement: Placement, chunk: int) -> int:
        """Peak on the device while frames are decoded."""
        weights = {"resident": self.weights, "in-turn": self.vae, "streamed": self.vae + self.outside}
        return weights[placement] + self.decoding[CHUNKS.index(chunk)]


def fit_decoding(
    vae: VideoVAE,
    grids: Iterable[tuple[int, int, int]],
    device: torch.device,
    *,
    more: bool = True,
    free: int | None = None,
) -> None:
    """Choose how many latent frames of [B, C, *grid] a VAE without a plan decodes at a time: the largest of
    CHUNKS predicted to fit into `free` bytes of the device (None: its free memory). `more`: allow more
    than its current number, except on a CPU, which gains nothing by it. Frames then differ by rounding.

    A VAE that decodes all at once (`disable_streaming`) is not changed.
    """
    if vae.streaming_latent_frames is None:
        return
    room = (free_memory(device) if free is None else free) * (1 - MARGIN)
    every = list(grids)
    fits = (chunk for chunk in CHUNKS if all(vae.decoding_bytes(grid, chunk=chunk) <= room for grid in every))
    chunk = next(fits, CHUNKS[-1])
    if device.type == "cpu" or not more:
        chunk = min(chunk, vae.streaming_latent_frames)
    vae.enable_streaming(latent_frames=chunk)


def peak_on_host(vae: VideoVAE, needs: Iterable[Needs], grids: Iterable[tuple[int, int, int]]) -> int:
    """Predicted peak of videos with these needs and latents [B, C, *grid] if everything is on the host, with
    the number of latent frames that `vae` decodes at a time.
    """
    every = list(needs)
    decoding = [vae.decoding_bytes(grid, chunk=vae.streaming_latent_frames or grid[0]) for grid in grids]
    return every[0].weights + max(*(one.denoising for one in every), *decoding)


def weight_bytes(pipeline: OpenSoraPlanPipeline) -> int:
    """Bytes of all weights of a pipeline."""
    return module_bytes(pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer, pipeline.vae)


def module_bytes(*modules: nn.Module | VideoVAE | None) -> int:
    """Bytes of all parameters and buffers; 0 for None."""
    return sum(t.nbytes for m in modules if m is not None for t in (*m.parameters(), *m.buffers()))


@dataclass(frozen=True)
class Plan:
    """A placement, the number of latent frames decoded at a time, and the predicted memory on the device,
    before and while frames are decoded.
    """

    placement: Placement
    chunk: int
    denoising: int
    decoding: int

    @property
    def peak(self) -> int:
        """Peak of both."""
        return max(self.denoising, self.decoding)

    def __str__(self) -> str:
        return (
            f"{self.placement}, up to {self.chunk} latent frames decoded at a time, {self.peak / 1e9:.1f} GB"
        )


def plans_for(needs: Iterable[Needs], placements: Sequence[Placement] = PLACEMENTS) -> list[Plan]:
    """Plans for videos with these needs, the fastest first. Each one needs less memory than all before it, at
    least for denoising or for decoding.
    """
    every = list(needs)
    plans: list[Plan] = []
    for placement in placements:
        for chunk in CHUNKS:
            denoising = max(one.before_decoding(placement) for one in every)
            decoding = max(one.while_decoding(placement, chunk) for one in every)
            if not any(plan.denoising <= denoising and plan.decoding <= decoding for plan in plans):
                plans.append(Plan(placement, chunk, denoising, decoding))
    return plans


def first_that_fits(plans: Sequence[Plan], *, free: int) -> int:
    """Index of the first of `plans` that fits into `free` bytes. Raises MemoryError, with both numbers,
    if none does.
    """
    for place, plan in enumerate(plans):
        if plan.peak <= free * (1 - MARGIN):
            return place
    leanest = min(plans, key=lambda plan: plan.peak)
    tiles = ", or decode in tiles" if leanest.decoding > leanest.denoising else ""
    raise MemoryError(
        f"even the plan that needs the least memory ({leanest}) does not fit into the {free / 1e9:.1f} GB "
        f"that are free: ask for fewer or smaller frames{tiles}"
    )


class Arrangement:
    """The plan that a pipeline follows, and further ones in case memory runs out."""

    def __init__(
        self, pipeline: OpenSoraPlanPipeline, plans: Sequence[Plan], device: torch.device, *, place: int = 0
    ) -> None:
        self._pipeline = pipeline
        self._device = device
        self._left = list(plans[place:])
        self._in_turn: InTurn | None = None
        if pipeline.vae.streaming_latent_frames is None:
            logger.warning(
                "decoding in chunks instead of all frames at once, to fit %s; frames differ by rounding",
                device,
            )
        self._follow(None)

    @property
    def plan(self) -> Plan:
        return self._left[0]

    def run(self, work: Callable[[bool], Result]) -> Result:
        """Return `work(False)`. If the device's memory runs out, switch to the next plan that needs less for
        the phase that failed, and return `work(True)`; if there is no such plan, raise torch's error.
        """
        again = False
        while True:
            try:
                return work(again)
            except RuntimeError as error:
                before, part = self.plan, "decoding" if self._pipeline.is_decoding else "denoising"
                leaner = [plan for plan in self._left if getattr(plan, part) < getattr(before, part)]
                if not is_out_of_memory(error) or not leaner:
                    raise
            # After the except block, so that the error no longer keeps tensors alive.
            self._left, again = self._left[self._left.index(leaner[0]) :], True
            logger.warning("out of memory while %s with %s: switching to %s", part, before, self.plan)
            self._follow(before)

    def _follow(self, before: Plan | None) -> None:
        """Move the parts to where the plan keeps them."""
        pipeline, device = self._pipeline, self._device
        pipeline.vae.enable_streaming(latent_frames=self.plan.chunk)
        if before is not None and before.placement == self.plan.placement:
            return
        if self.plan.placement == "resident":
            pipeline.to(device)
            return
        transformer, vae = pipeline.transformer, pipeline.vae
        encoders = [one for one in (pipeline.text_encoder, pipeline.text_encoder_2) if one is not None]
        if self._in_turn is not None:
            self._in_turn.end()
        keep_on_host(transformer)
        pipeline.to("cpu", silence_dtype_warnings=True)
        if self.plan.placement == "in-turn":
            # The VAE is called by its parts; the denoiser's AdaLN is used on the host before it is called.
            doors = [*((model, [model]) for model in (*encoders, transformer)), (vae, [*vae.children()])]
            self._in_turn = InTurn(doors, device)
        else:
            stream_blocks(transformer, device)
            for encoder in encoders:
                stream_layers(encoder, device)
            vae.to(device)  # type: ignore[arg-type]
        pipeline.streamed_to = device
