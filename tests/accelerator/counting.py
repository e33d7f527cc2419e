"""What generating and training take of the simulated card, counted, beside what `osp plan` predicts.

The card is hollow: nothing is computed, so that the release's size counts in seconds. What stays on the host
is never touched, which keeps its memory virtual, but for blocks that are streamed.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from simulated.device import CARD
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from opensoraplan import flow
from opensoraplan.defaults import WeightPrecision
from opensoraplan.device import DTYPES
from opensoraplan.generate.planning import needs_of
from opensoraplan.models.conditions import Conditions
from opensoraplan.models.sizes import BatchShape, DenoiserSizes
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.models.wfvae import WFVAE
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.plan.memory import training_memory
from opensoraplan.plan.step import AdapterOptions, TrainingOptions, TrainingStep
from opensoraplan.requests import Request
from opensoraplan.runtime.placement import Arrangement, Placement, plans_for
from opensoraplan.runtime.quantisation import quantise_weights
from opensoraplan.runtime.streaming import stream_frozen_blocks
from opensoraplan.samplers import make_scheduler
from opensoraplan.shapes import latent_shape
from opensoraplan.train.config import AdapterSettings, OptimizerSettings
from opensoraplan.train.learner.adapter import add_adapter, target_layers
from opensoraplan.train.learner.ema import Ema
from opensoraplan.train.learner.master import MasterWeights
from opensoraplan.train.learner.optimizer import make_optimizer
from opensoraplan.train.methods import flow_loss

Result = TypeVar("Result")
NPU = "npu"  # a device only once the card is installed
TEXT_TOKENS = 512


@dataclass(frozen=True)
class Models:
    """Configs of the four models of a pipeline; empty ones are the release's."""

    denoiser: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    t5: dict[str, Any] = field(default_factory=dict)
    clip: dict[str, Any] = field(default_factory=dict)


_T5 = {"d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu"}
_CLIP = {
    **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    **{"projection_dim": 1280, "hidden_act": "gelu"},
}
RELEASE = Models()
# A fortieth of its weights, in the same proportions.
SMALL = Models(
    {
        **{"num_attention_heads": 6, "num_layers": [2] * 7},
        **{"caption_channels": 512, "pooled_projection_dim": 320},
    },
    {"base_channels": 64, "encoder_energy_flow_hidden_size": 48, "decoder_energy_flow_hidden_size": 48},
    {"d_model": 512, "d_ff": 1280, "num_heads": 8, "num_layers": 6},
    {"hidden_size": 320, "intermediate_size": 1280, "num_hidden_layers": 8, "num_attention_heads": 5}
    | {"projection_dim": 320},
)

# A denoiser to train, of a 16th of the release's width squared.
TRAINED: dict[str, Any] = SMALL.denoiser | {"attention_head_dim": 128}


@contextmanager
def hollow() -> Iterator[None]:
    """With a card whose memory is counted only, and which has more than anything wants."""
    gc.collect()
    CARD.reset()
    CARD.memory.capacity = 10**13
    CARD.hollow = True
    CARD.answer = lambda x: True if x.dtype == torch.bool else TEXT_TOKENS - 1
    try:
        yield
    finally:
        CARD.reset()


def peak_of(work: Callable[[], Result]) -> tuple[Result, int]:
    """What the work gives, and the most that is allocated meanwhile."""
    CARD.memory.peak = CARD.memory.now
    return work(), CARD.memory.peak


@dataclass(frozen=True)
class Counted:
    """A case in words, and bytes: what is predicted, and what was counted."""

    name: str
    predicted: int
    counted: int

    @property
    def off(self) -> float:
        """How far the prediction is off, as a share of what was counted."""
        return self.predicted / self.counted - 1

    def __str__(self) -> str:
        return f"| {self.name} | {self.predicted / 1e9:.2f} | {self.counted / 1e9:.2f} | {self.off:+.1%} |"


def generating(
    models: Models,
    request: Request,
    placement: Placement,
    *,
    weights: WeightPrecision = "whole",
    chunks: tuple[int, ...] = (16,),
) -> list[Counted]:
    """One case for each number of latent frames that are decoded at a time."""
    with hollow(), torch.no_grad():
        pipeline = _pipeline(models, weights=weights, device=NPU if placement == "resident" else None)
        needs = needs_of(pipeline, request, text_tokens=TEXT_TOKENS)
        plans = {plan.chunk: plan for plan in plans_for([needs], (placement,))}
        first = plans[max(chunk for chunk in plans if chunk <= max(chunks))]
        Arrangement(pipeline, [first], torch.device(NPU))
        latents, denoising = peak_of(lambda: _denoise(pipeline, request))
        cases = []
        for chunk in (chunk for chunk in chunks if chunk in plans):
            pipeline.vae.enable_streaming(latent_frames=chunk)
            _, decoding = peak_of(lambda: _decode(pipeline, latents))
            size = f"{request.frames} x {request.height} x {request.width}"
            name = f"{size}, {placement}, {chunk}" + ("" if weights == "whole" else f", {weights}")
            cases.append(Counted(name, plans[chunk].peak, max(denoising, decoding)))
        return cases


def encoding(models: Models, size: tuple[int, int, int], *, chunk: int, dtype: torch.dtype) -> Counted:
    """A clip of this many frames, height and width, as the encoders of training take it."""
    with hollow(), torch.no_grad():
        with torch.device("meta"):
            vae = WFVAE(**models.vae)
        vae = nn.Module.to(vae, dtype).eval().requires_grad_(False).to_empty(device=NPU)
        vae.enable_streaming(latent_frames=chunk)
        clip, before = torch.empty(1, 3, *size), CARD.memory.now

        def work() -> None:
            for moments in vae.iter_encode([clip.to(NPU, dtype)]):
                del moments

        grid = latent_shape(*size, patch=1)
        return Counted(f"{size}, {chunk}", vae.encoding_bytes(grid), peak_of(work)[1] - before)


def _decode(pipeline: OpenSoraPlanPipeline, latents: Tensor) -> None:
    for pixels in pipeline.iter_pictures(latents):
        del pixels


def _pipeline(models: Models, *, weights: WeightPrecision, device: str | None) -> OpenSoraPlanPipeline:
    """All four models in bf16 without values, on the card, or untouched on the host (None)."""
    with torch.device("meta"):
        parts: list[nn.Module] = [
            SparseUMMDiT(**models.denoiser),
            WFVAE(**models.vae),
            T5EncoderModel(T5Config(**_T5 | models.t5)),
            CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP | models.clip)),
        ]
    parts = [nn.Module.to(part, torch.bfloat16).eval().requires_grad_(False) for part in parts]
    quantise_weights(parts[0], weights)  # type: ignore[arg-type]
    denoiser, vae, t5, clip = (part.to_empty(device=device or "cpu") for part in parts)
    pipeline = OpenSoraPlanPipeline(denoiser, vae, t5, None, clip, None, make_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _denoise(pipeline: OpenSoraPlanPipeline, request: Request) -> Tensor:
    """Encode a prompt of the most tokens, and denoise."""
    ids = torch.ones(1, TEXT_TOKENS, dtype=torch.int64, device=NPU)
    config = pipeline.transformer.config
    for encoder, tokens in ((pipeline.text_encoder, TEXT_TOKENS), (pipeline.text_encoder_2, 77)):
        encoder.set_attn_implementation("eager")
        encoder(input_ids=ids[:, :tokens])
    embeds = PromptEmbeds(
        torch.empty(1, TEXT_TOKENS, config["caption_channels"], dtype=torch.bfloat16, device=NPU),
        torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=NPU),
        torch.empty(1, config["pooled_projection_dim"], dtype=torch.bfloat16, device=NPU),
    )
    return pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=embeds,
        num_frames=request.frames,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        seed=0,
        output_type="latent",
    ).frames


def adapter_of(config: dict[str, Any], *, rank: int = 32, **options: Any) -> AdapterOptions:  # noqa: ANN401
    """An adapter of a denoiser of this config with the default targets."""
    with torch.device("meta"):
        return AdapterOptions(target_layers(SparseUMMDiT(**config), ()), rank, **options)


def training(
    name: str, config: dict[str, Any], shape: BatchShape, options: TrainingOptions, *, steps: int = 2
) -> Counted:
    """Steps of the denoiser with its optimizer and EMA as the trainer has them."""
    dtype, master_dtype = DTYPES[options.compute], DTYPES[options.master]
    predicted = training_memory(TrainingStep(DenoiserSizes(config), shape, options=options)).peak
    with hollow():
        with torch.device("meta"):
            model = SparseUMMDiT(**config)
        model.set_recompute(
            blocks=options.recompute_blocks,
            feed_forwards=options.recompute_feed_forwards,
            keep_attention=options.keep_attention,
            inputs_on_host=options.inputs_on_host,
        )
        adapter = options.adapter
        streamed = adapter is not None and adapter.streamed
        if adapter is not None:
            kind = "dora" if adapter.dora else "lora"
            add_adapter(model, AdapterSettings(kind=kind, rank=adapter.rank, base=adapter.base))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(master_dtype if parameter.requires_grad else dtype)
        if adapter is not None:
            quantise_weights(model, adapter.base)
        model.to_empty(device="cpu" if streamed else NPU)
        if streamed:
            stream_frozen_blocks(model, torch.device(NPU))
        model.train()
        master = MasterWeights(model, master=master_dtype, compute=dtype)
        optimizer = make_optimizer(master.parameters, OptimizerSettings(bits=options.bits, eps=1e-8))
        device = None if options.ema is None else NPU if options.ema == "device" else "cpu"
        ema = None if device is None else Ema(master.parameters, decay=0.999, device=device)

        def work() -> None:
            for step in range(1, steps + 1):
                _train(model, shape, options, master, optimizer)
                if ema is not None:
                    ema.update(step)

        return Counted(name, predicted, peak_of(work)[1])


def _train(
    model: SparseUMMDiT,
    shape: BatchShape,
    options: TrainingOptions,
    master: MasterWeights,
    optimizer: torch.optim.Optimizer,
) -> None:
    dtype = DTYPES[options.compute]
    optimizer.zero_grad(set_to_none=True)
    for _ in range(options.accumulate):
        channels = model.config["out_channels"]
        latents, noise = (torch.empty(shape.batch, channels, *shape.grid, device=NPU) for _ in range(2))
        prompt = PromptEmbeds(
            torch.empty(shape.batch, shape.text, model.config["caption_channels"], dtype=dtype, device=NPU),
            torch.ones(shape.batch, shape.text, dtype=torch.bool, device=NPU),
            torch.empty(shape.batch, model.config["pooled_projection_dim"], dtype=dtype, device=NPU),
        )
        CARD.answer = lambda x: True if x.dtype == torch.bool else shape.text - 1
        loss = flow_loss.losses(
            model,
            latents,
            Conditions(prompt),
            sigma=flow.sigmas_from_normal(torch.randn(shape.batch)).to(NPU),
            noise=noise,
            dtype=dtype,
            weighting="uniform",
        ).mean()
        loss.backward()
        master.take_gradients()
    optimizer.step()
    master.publish()
