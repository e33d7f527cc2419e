"""Plans of a session before it reads weights: where it computes, what fits, whether attention masks keys.

Sizes come from the formulas of models/sizes.py, plans from runtime/placement.py.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from opensoraplan.defaults import Memory, WeightPrecision
from opensoraplan.device import free_memory, prepare, resolve_device, resolve_dtype, total_memory
from opensoraplan.documents import read_json_object
from opensoraplan.formats.assemble import Sources
from opensoraplan.models.attention import set_backend
from opensoraplan.models.modulation import adaln_layers
from opensoraplan.models.prompts import PromptSettings
from opensoraplan.models.sizes import (
    PRECISIONS,
    BatchShape,
    DenoiserSizes,
    forward_memory,
    step_cache_bytes,
    vector_bytes,
)
from opensoraplan.models.strict import plain_config
from opensoraplan.models.vae import VideoVAE
from opensoraplan.parallel.generating import generating_mesh
from opensoraplan.parallel.mesh import MeshSettings
from opensoraplan.parallel.ranks import device_of_rank, place_in_job
from opensoraplan.parallel.sequence import padded_tokens
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.requests import Request
from opensoraplan.runtime.placement import (
    CHUNKS,
    MARGIN,
    PLACEMENTS,
    Needs,
    Plan,
    first_that_fits,
    fit_decoding,
    module_bytes,
    peak_on_host,
    plans_for,
    weight_bytes,
)
from opensoraplan.runtime.quantisation import check_weight_precision, quantise_weights, weight_precision_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SessionOptions:
    """The model of a session, and how it computes: the options that all of its videos share."""

    model: Path | Sources
    """Model folder, as written by `osp convert`, or the files of its parts."""
    device: str | None = None
    """Device to run on: cpu, cuda, cuda:1, npu, ...; None: a card if there is one."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of the denoiser and the text encoders."""
    vae_dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Precision of the VAE; None: that of `dtype`."""
    memory: Memory = "auto"
    """Where the weights are kept: on a card, the fastest placement that fits, or
    one of runtime/placement.py.
    """
    weights: WeightPrecision = "whole"
    """Precision in which the denoiser's weights are stored, see runtime/quantisation.py."""
    attention: str | None = None
    """Attention backend of diffusers; None: torch's own."""
    compile: bool = False
    """Compile the denoiser's blocks."""
    streaming: bool = True
    """Decode frames chunk by chunk, not all at once."""
    tiling: bool = False
    """Decode in blended tiles."""
    prompts: PromptSettings | None = None
    """How prompts are prepared; None: as the model's folder says, else as in the release."""
    scheduler: Mapping[str, object] = field(default_factory=dict)
    """Config of the default scheduler, for a model in parts. A model folder has its own."""
    max_text_tokens: int = 512
    """Length of a prompt in T5 tokens, for a model in parts."""
    allow_tf32: bool | None = None
    """Whether fp32 matrices may be multiplied in TF32; None: torch's setting."""
    branch_ranks: Literal[1, 2] = 1
    """2: half of the processes compute the branch with the prompt, half the one without."""
    tp: int = 1
    """Tensor-parallel size. The remaining processes split the video's tokens."""
    progress: bool = True
    """Show a progress bar of the denoising steps."""
    fingerprints: Mapping[str, str] | None = None
    """Fingerprints of the model's weights, if they are known already."""
    step_ratios: Sequence[float] | None = None
    """The model's calibration for a step cache, if it was read already."""

    @property
    def folder(self) -> Path | None:
        """The model's folder; None for a model in parts."""
        return self.model if isinstance(self.model, Path) else None

    @property
    def sources(self) -> Sources:
        """Where the parts of the model are."""
        return self.model if isinstance(self.model, Sources) else Sources.of_folder(self.model)


@dataclass(frozen=True)
class Place:
    """Device and precision of this process (`vae_dtype`: of the VAE), and the mesh of all `processes`."""

    device: torch.device
    dtype: torch.dtype
    vae_dtype: torch.dtype
    processes: int
    mesh: MeshSettings

    @property
    def has_plans(self) -> bool:
        """Whether weights can be kept off the device: only with one process, on a card."""
        return self.device.type != "cpu" and self.processes == 1


def resolve_place(options: SessionOptions, requests: Sequence[Request]) -> Place:
    """Resolve device, precision and mesh. Raises ValueError if they do not go with the options."""
    device = device_of_rank(resolve_device(options.device))
    prepare(device, allow_tf32=options.allow_tf32)
    dtype = vae_dtype = resolve_dtype(options.dtype, device)
    if options.vae_dtype not in (None, options.dtype):
        vae_dtype = resolve_dtype(options.vae_dtype, device, use="decoding")
    check_weight_precision(options.weights, device, dtype)
    branches, tp = options.branch_ranks, options.tp
    processes = place_in_job()[1]
    if tp < 1 or processes % (branches * tp):
        raise ValueError(
            f"the number of processes must be a multiple of --branch-ranks {branches} x --tp {tp}, "
            f"got {processes}"
        )
    mesh = generating_mesh(branches=branches, tp=tp).filled(processes)
    if options.folder is not None:
        config = read_json_object(options.folder / "transformer" / "config.json")
        mesh.check_model(config.get("num_attention_heads", 24))
    if options.memory not in ("auto", "resident"):
        if processes > 1:
            raise ValueError(f"--memory {options.memory} needs a single process, got {processes}")
        if device.type == "cpu":
            raise ValueError(f"--memory {options.memory} is for a card: on a CPU all weights are on the host")
    if branches > 1:
        for request in requests:
            request.model_copy(update={"batched_guidance": True}).check_step_cache()
    if tp > 1 and options.weights != "whole":
        raise ValueError(f"--weights {options.weights} cannot be split with --tp {tp}: leave one of them out")
    return Place(device, dtype, vae_dtype, processes, mesh)


@dataclass(frozen=True)
class LoadingPlan:
    """How to load a model. `load_on`: the device to read weights to. `plans`: placements that fit, the
    fastest first (empty if there is no choice). `advice`: for the error if the host's memory is full.
    `masked`: why attention will mask keys, if it will.
    """

    load_on: torch.device
    plans: Sequence[Plan]
    advice: str
    masked: str | None


def plan_loading(
    empty: OpenSoraPlanPipeline, options: SessionOptions, requests: Sequence[Request], place: Place
) -> LoadingPlan:
    """Plan from the sizes of a pipeline without weights, whose VAE's decoding is set as the model's will be.
    Raises ValueError as `tune` would, and MemoryError if no plan fits.
    """
    device = place.device
    masked = reason_for_mask(empty, options, requests, place)
    whole, model = weight_bytes(empty), DenoiserSizes.of(empty.transformer)
    tune(empty, options, device, masked=masked)
    set_decoding(empty.vae, options)
    needs, free = needs_of_all(empty, requests, model), free_memory(device)
    plans: Sequence[Plan] = []
    advice = ""
    resident = min(plans_for(needs, ["resident"]), key=lambda plan: plan.peak)
    if place.has_plans and options.memory == "resident":
        report_peak(resident.peak, device, free=free)
    elif place.has_plans:
        plans = plans_that_fit(needs, options.memory, device, free=free)
        advice = advice_for_full_host(resident, device, whole=whole, free=free)
    elif device.type == "cpu" and place.processes == 1:  # several must decode the same chunks
        grids = [r.grid(empty.vae.strides) for r in requests]
        fit_decoding(empty.vae, grids, device, free=free - needs[0].weights)
        report_peak(peak_on_host(empty.vae, needs, grids), device, free=free)
    # Weights that will move to and fro, or that only fit once quantised, are read to the host.
    direct = not plans or plans[0].placement == "resident"
    fits = whole <= free * (1 - MARGIN) if plans or options.weights != "whole" else True
    return LoadingPlan(device if direct and fits else torch.device("cpu"), plans, advice, masked)


def advice_for_full_host(resident: Plan, device: torch.device, *, whole: int, free: int) -> str:
    """What to do if the weights, `whole` bytes, do not fit into host memory: the end of an error message."""
    room = free * (1 - MARGIN)
    if resident.peak <= room and whole <= room:
        return f"; the model fits onto {device}: --memory resident loads it there directly"
    less = ": ask for fewer or smaller frames" if whole <= room else ""
    return (
        f"; to load it onto {device} directly, more than {max(resident.peak, whole) / 1e9:.3g} GB must be "
        f"free there, and {free / 1e9:.3g} GB are{less}"
    )


def report_peak(peak: int, device: torch.device, *, free: int) -> None:
    """Log the predicted memory of generating and how much is free. Raises MemoryError if it is more than the
    device has in total.
    """
    if peak > (total := total_memory(device)):
        swap = ", swap included" if device.type == "cpu" else ""
        raise MemoryError(
            f"generating is predicted to take {peak / 1e9:,.1f} GB of memory, {device} has "
            f"{total / 1e9:,.1f} GB{swap}: ask for fewer or smaller frames"
        )
    level = logging.WARNING if peak > free else logging.INFO
    less = ": the system may kill the process; fewer or smaller frames need less" if peak > free else ""
    said = "generating is predicted to take %.3g GB of memory, %.3g GB are free%s"
    logger.log(level, said, peak / 1e9, free / 1e9, less)


def reason_for_mask(
    pipeline: OpenSoraPlanPipeline, options: SessionOptions, requests: Sequence[Request], place: Place
) -> str | None:
    """Why attention must mask keys in some of the videos; None if it need not."""
    config, mesh = pipeline.transformer.config, place.mesh
    rates = config["sparse_n"] or [1]
    for request in requests:
        if request.batched_guidance and request.guidance > 1 and options.branch_ranks == 1:
            return "--batched-guidance pads the shorter of the two prompts"
        frames, rows, columns = request.denoised_grid(pipeline.vae.strides)
        tokens = frames * rows * columns // config["patch_size"] ** 2
        padded = padded_tokens(tokens, ranks=mesh.sp * mesh.tp, rates=rates)
        if padded != tokens:
            size = f"{request.frames} x {request.height} x {request.width}"
            return f"the tokens of {size} are padded from {tokens} to {padded}"
    return None


def tune(
    pipeline: OpenSoraPlanPipeline, options: SessionOptions, device: torch.device, *, masked: str | None
) -> None:
    """Quantise the denoiser's weights and set its attention backend. Raises ValueError if it cannot."""
    if options.weights != "whole":
        quantise_weights(pipeline.transformer, options.weights)
    if options.attention is not None:
        set_backend(pipeline.transformer, options.attention, device, masked=masked)


def set_decoding(vae: VideoVAE, options: SessionOptions) -> None:
    """Set a VAE to decode all frames at once, or in tiles, if the options say so."""
    if not options.streaming:
        vae.disable_streaming()
    if options.tiling:
        vae.enable_tiling()


def needs_of(
    pipeline: OpenSoraPlanPipeline,
    request: Request,
    *,
    text_tokens: int = 512,
    model: DenoiserSizes | None = None,
) -> Needs:
    """Memory that the video of a request needs. With batched guidance, both branches are one batch; a step
    cache keeps the blocks' input and residual of each branch. `model`: the denoiser's sizes, if known.
    """
    transformer, vae = pipeline.transformer, pipeline.vae
    grid = request.grid(pipeline.vae.strides)
    model = model or DenoiserSizes(plain_config(transformer))
    denoised = request.denoised_grid(pipeline.vae.strides)
    shape = BatchShape(denoised, text_tokens, batch=2 if request.batched_guidance else 1)
    precision = PRECISIONS[transformer.dtype]
    denoising = forward_memory(model, shape, precision, kind=weight_precision_of(transformer))
    if request.step_cache:
        denoising += step_cache_bytes(model, shape, precision)
    adaln = [layer.linear for layer in adaln_layers(transformer)]
    in_blocks = module_bytes(*adaln[:-1]) // len(transformer.transformer_blocks)
    outside = module_bytes(transformer) - module_bytes(transformer.transformer_blocks, adaln[-1])
    return Needs(
        encoders=module_bytes(pipeline.text_encoder, pipeline.text_encoder_2),
        denoiser=module_bytes(transformer),
        adaln=module_bytes(*adaln),
        block=max(module_bytes(block) for block in transformer.transformer_blocks) - in_blocks,
        vae=module_bytes(vae),
        vectors=vector_bytes(model, precision, steps=request.steps),
        denoising=denoising,
        decoding=tuple(vae.decoding_bytes(grid, chunk=chunk) for chunk in CHUNKS),
        outside=outside,
    )


def needs_of_all(
    pipeline: OpenSoraPlanPipeline, requests: Sequence[Request], model: DenoiserSizes
) -> list[Needs]:
    """Memory that each different size of video needs. `model`: the denoiser's sizes."""
    sizes = {
        (*r.denoised_grid(pipeline.vae.strides), r.steps, r.batched_guidance, bool(r.step_cache)): r
        for r in requests
    }
    return [needs_of(pipeline, request, model=model) for request in sizes.values()]


def plans_that_fit(needs: list[Needs], memory: Memory, device: torch.device, *, free: int) -> Sequence[Plan]:
    """The fastest plan with which all videos fit into the `free` bytes of the device, and those that
    need less memory.
    """
    plans = plans_for(needs, PLACEMENTS if memory == "auto" else (memory,))
    plans = plans[first_that_fits(plans, free=free) :]
    logger.info("of %s, %.1f GB are free; the model is %s (predicted)", device, free / 1e9, plans[0])
    return plans
