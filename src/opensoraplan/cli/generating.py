"""`osp generate` and `osp decode`: options, and what is checked before the job begins."""

import itertools
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from opensoraplan.cli.effects import check_effects, check_scheduler
from opensoraplan.cli.options import Dtype, OptionalDevice, OptionalPath, optional
from opensoraplan.cli.parts import (
    NO_PARTS,
    PARTS,
    Parts,
    check_model,
    check_parts,
    find_paths,
    make_sources,
    options_of_parts,
    read_prompt_config,
)
from opensoraplan.defaults import SCHEDULER, STEP_CACHE_FILE, Solver, Weights
from opensoraplan.disk import made
from opensoraplan.documents import read_json_object
from opensoraplan.fingerprint import fingerprint_parts, fingerprint_weights
from opensoraplan.models.prompts import DEFAULT_NEGATIVE_PROMPT, DEFAULT_TEMPLATE, PromptSettings
from opensoraplan.requests import Request, is_prompt_file, read_requests
from opensoraplan.shapes import SPATIAL_STRIDE, latent_shape

if TYPE_CHECKING:
    import torch

    from opensoraplan.formats.assemble import OpenedPipeline
    from opensoraplan.formats.mindspeed.inference import Inference
    from opensoraplan.models.wfvae import WFVAE
    from opensoraplan.parallel.mesh import MeshSettings
    from opensoraplan.parallel.ranks import Ranks
    from opensoraplan.pipeline import OpenSoraPlanPipeline
    from opensoraplan.runtime.placement import Needs, Plan
    from opensoraplan.runtime.step_cache import Calibration

logger = logging.getLogger(__name__)

Memory = Literal["auto", "resident", "in-turn", "streamed"]

# How long processes wait for each other: one may decode a long video alone.
PATIENCE_S = 7200.0


@dataclass(frozen=True)
class Sharing:
    """Several devices: how the processes of `osp launch` split the work on each video."""

    branch_ranks: Literal[1, 2] = 1
    """2: half of the processes compute the branch with the prompt, half the one without."""
    tp: int = 1
    """Tensor-parallel size. The remaining processes split the video's tokens."""


@dataclass(frozen=True)
class Generate:
    """Make videos, or pictures with --frames 1, from prompts.

    The model is a folder written by `osp convert` (--model), the original's files (--config or one option per
    file), or the small built-in model. A .txt file has one prompt per line; .jsonl and .csv files have a
    column `prompt` and may set other options per video. The same command again continues a stopped job.
    Existing files are never overwritten. With `osp launch --processes 4 -- generate ...` several devices make
    each video together.
    """

    prompt: Annotated[Positional[str], optional("PROMPT")] = ""
    """A prompt, or a file of prompts (.txt, .jsonl or .csv)."""
    model: Annotated[Path | None, optional("PATH", "(default: the small built-in model)")] = None
    """Model folder, as written by `osp convert` or `osp export`."""
    config: OptionalPath = None
    """Inference JSON of MindSpeed-MM's guide. Its values are the defaults of the other options."""
    parts: OmitArgPrefixes[Parts] = NO_PARTS
    """model files"""
    out: Path = Path("samples")
    """Folder to write to, or the .mp4 or .png file of a single video."""
    frames: int = 121
    """Number of frames: 8k + 1, or 1 for a picture."""
    height: int = 576
    """Height in pixels, a multiple of 16."""
    width: int = 1024
    """Width in pixels, a multiple of 16."""
    fps: float = 24
    """Frames per second of the video file."""
    steps: int = 50
    """Number of denoising steps."""
    guidance: float = 8.0
    """Classifier-free guidance scale. 1 switches guidance off and halves the time."""
    guidance_rescale: float = 0.7
    """Guidance rescale, 0 to 1. Higher values give less saturated pictures."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the steps that use guidance; 0 0.5 is the first half."""
    batched_guidance: bool = False
    """Compute both branches of guidance in one batch. Needs more memory."""
    shift: Annotated[float | None, optional("FLOAT", "(default: the model's; 7 of the release)")] = None
    """Timestep shift. Higher values spend more steps at high noise."""
    dynamic_shift: Annotated[bool | None, optional("True|False", "(default: the model's, False)")] = None
    """Compute the timestep shift from the frame size."""
    linear_quadratic: bool = False
    """Use the linear-quadratic schedule, which has no timestep shift."""
    solver: Solver = "euler"
    """ODE solver. adams needs about half the steps of euler for the same quality; euler is the original's."""
    step_cache: float = 0.0
    """Reuse the previous step while the predicted error stays below this value, for example 0.06. 0 is off.
    Faster, not exact. Run `osp calibrate` first.
    """
    negative_prompt: str = ""
    """What to avoid. Added to the default negative prompt."""
    seed: int = 0
    """Random seed of the first video. Each further video adds 1."""
    videos_per_prompt: int = 1
    """Number of videos per prompt, each with its own seed."""
    device: OptionalDevice = None
    """Device to run on: cpu, cuda, cuda:1, npu, ..."""
    dtype: Dtype = "bf16"
    """Precision of the denoiser and the text encoders."""
    vae_dtype: Annotated[Dtype | None, optional("{bf16,fp16,fp32}", "(default: that of --dtype)")] = None
    """Precision of the VAE."""
    memory: Memory = "auto"
    """Where the weights are kept. resident: all on the device. in-turn: each part only while it runs.
    streamed: the denoiser block by block, which needs the least memory and the most time. auto: the fastest
    that fits.
    """
    weights: Weights = "whole"
    """Precision in which the denoiser's weights are stored. int8: half the memory of bf16. fp8: feed-forwards
    are also multiplied in fp8, on cards that support it. Neither is exact.
    """
    attention: Annotated[str | None, optional("NAME", "(default: torch's own)")] = None
    """Attention backend of diffusers: _native_cudnn, flash, sage, ..."""
    compile: bool = False
    """Compile the denoiser's blocks. The first step takes minutes, later ones less time."""
    prompt_template: Annotated[
        str | None, optional("TEXT", "(default: the model's; 'high quality, {}' of the release)")
    ] = None
    """Template around each prompt. {} stands for the prompt; '{}' alone switches the template off."""
    default_negative_prompt: Annotated[str | None, optional("TEXT", "(default: the model's)")] = None
    """Replacement for the model's default negative prompt; '' for none."""
    clean_prompts: bool = True
    """Clean prompts in the same way as the training captions. This removes Chinese characters, long numbers,
    sizes, file names, links and markup, with a warning.
    """
    keep_chinese: bool = False
    """Keep Chinese characters when cleaning. The released model was trained without them."""
    tiling: bool = False
    """Decode in blended tiles. Needs less memory for large frames, not exact."""
    resume: bool = False
    """Continue a stopped video from its saved latents. The default for several videos."""
    save_every: int = 10
    """Save resumable latents every N steps; 0 for never."""
    sharing: OmitArgPrefixes[Sharing] = Sharing()
    """several devices"""


# What --help shows together; the basics are in none of them.
GROUPS = {
    "sampling": (
        *("guidance", "guidance_rescale", "guidance_interval", "batched_guidance", "solver", "shift"),
        *("dynamic_shift", "linear_quadratic", "step_cache"),
    ),
    "prompt text": ("prompt_template", "default_negative_prompt", "clean_prompts", "keep_chinese"),
    "memory and speed": (
        *("device", "dtype", "vae_dtype", "memory", "weights", "attention", "compile", "tiling"),
    ),
    "stop and continue": ("resume", "save_every"),
}


@dataclass(frozen=True)
class Calibrate:
    """Measure how similar a model's denoising steps are, for `osp generate --step-cache`."""

    model: Annotated[Path | None, optional("PATH", "(default: the small built-in model)")] = None
    """Model folder, as written by `osp convert` or `osp export`."""
    prompt: str = "A red fox runs through fresh snow."
    """Prompt to measure on. The result hardly depends on it."""
    out: Annotated[Path | None, optional("PATH", "(default: step_cache.json in the model's folder)")] = None
    """File to write."""
    frames: Annotated[int | None, optional("INT", "(default: the model's, or 57)")] = None
    """Number of frames, 8k + 1."""
    height: Annotated[int | None, optional("INT", "(default: the model's, or 288)")] = None
    """Height in pixels, a multiple of 16."""
    width: Annotated[int | None, optional("INT", "(default: the model's, or 512)")] = None
    """Width in pixels, a multiple of 16."""
    steps: Annotated[int | None, optional("INT", "(default: the model's, or 50)")] = None
    """Number of denoising steps. Videos with another number use the nearest step."""
    guidance: Annotated[float | None, optional("FLOAT", "(default: the model's, or 8)")] = None
    """Classifier-free guidance scale of the videos to be made."""
    device: OptionalDevice = None
    """Device to run on: cpu, cuda, cuda:1, npu, ..."""
    dtype: Dtype = "bf16"
    """Precision to compute in."""


@dataclass(frozen=True)
class Decode:
    """Decode latents that a stopped `osp generate` has saved. Only the VAE is loaded."""

    latents: Positional[Path]
    """Latents file, NAME.latents.safetensors."""
    out: Annotated[Path | None, optional("PATH", "(default: NAME.mp4, or .png)")] = None
    """File to write. A number is added if the name is taken."""
    vae: Annotated[Path | None, optional("PATH", "(default: that of the model that made them)")] = None
    """VAE: the release's .ckpt, a diffusers component, or a model folder."""
    device: OptionalDevice = None
    """Device to run on: cpu, cuda, cuda:1, npu, ..."""
    dtype: Annotated[
        Dtype | None, optional("{bf16,fp16,fp32}", "(default: that of the VAE in the stopped run)")
    ] = None
    """Precision of the VAE."""
    tiling: bool = False
    """Decode in blended tiles. Needs less memory for large frames, not exact."""


# Options of `Generate` that are fields of a request; the rest say what makes it.
REQUEST_OPTIONS = (
    "negative_prompt", "frames", "height", "width", "fps", "steps", "guidance", "guidance_rescale",
    "guidance_interval", "batched_guidance", "shift", "dynamic_shift", "linear_quadratic", "solver",
    "step_cache", "seed",
)  # fmt: skip


def hint(words: list[str]) -> str | None:
    """What was probably meant by words that `osp generate` does not understand: a prompt without quotes."""
    prompt = " ".join(itertools.takewhile(lambda word: not word.startswith("-"), words))
    return f'put quotes around a prompt: osp generate "{prompt}"' if " " in prompt else None


def generate(options: Generate, inference: "Inference | None", given: Collection[str] = frozenset()) -> None:
    """`osp generate`: everything that can be wrong is checked before the model is loaded. `given`: the
    options that are on the command line, which have to act.
    """
    asked = _checked(options, inference, given)

    from opensoraplan.parallel.ranks import joined

    place = _place_of(options, inference, asked)
    with joined(place.mesh, place.device, timeout=PATIENCE_S) as ranks:
        for warning in asked.warnings if ranks.first else ():
            logger.warning(warning)
        _run(options, inference, asked, place, ranks)


def check(options: Generate, inference: "Inference | None", given: Collection[str]) -> None:
    """Raise what `generate` would raise before it loads torch."""
    _checked(options, inference, given)


@dataclass(frozen=True)
class _Asked:
    """What to make, by what, and where to: all that can be checked without torch. `folder`: the model's, or
    None for one in parts, which are at `paths` in any case, with these `fingerprints`.
    """

    requests: list[Request]
    targets: list[Path]
    folder: Path | None
    paths: dict[str, Path]
    fingerprints: dict[str, str]
    step_ratios: tuple[float, ...]
    prompts: PromptSettings
    warnings: list[str]
    resume: bool


@dataclass(frozen=True)
class _Place:
    """Where this process computes, in which precision (the VAE in `vae_dtype`), and how the job's `processes`
    are arranged.
    """

    device: "torch.device"
    dtype: "torch.dtype"
    vae_dtype: "torch.dtype"
    processes: int
    mesh: "MeshSettings"

    @property
    def has_plans(self) -> bool:
        """Whether it may be a choice what is on the device: only with a card, and one."""
        return self.device.type != "cpu" and self.processes == 1


def _checked(options: Generate, inference: "Inference | None", given_names: Collection[str]) -> _Asked:
    from opensoraplan.generate import job

    if not options.prompt.strip():
        raise ValueError('give a prompt or a file of prompts: osp generate "a cat on a beach" --model FOLDER')
    if options.save_every < 0:
        raise ValueError(f"--save-every must be at least 0, got {options.save_every}")
    settings = {name: getattr(options, name) for name in REQUEST_OPTIONS}
    requests = read_requests(options.prompt, settings, copies=options.videos_per_prompt)
    check_effects(options, given_names, requests)
    resume = is_prompt_file(options.prompt) or len(requests) > 1
    if options.resume or "resume" in given_names:
        resume = options.resume
    given = options_of_parts(options.parts, inference)
    if options.model is not None and given:
        raise ValueError(f"{options.model} has all the parts of a model: leave out {', '.join(given)}")
    folder = options.model
    if folder is None and not given:
        from opensoraplan import builtin

        folder = builtin.folder()
        logger.info("no --model is given: the small built-in one knows %s", builtin.KNOWS)
    if folder is not None:
        check_model(folder)
        paths = {name: folder / name for name in PARTS}
        check_parts(paths)
        check_scheduler(folder, given_names, requests)
        _warn_of_sizes(folder, requests)
    else:
        paths = find_paths(options.parts, inference)
    prompts = _prompt_settings(options, folder)
    warnings = job.check_prompts(requests, prompts)
    calibration = _step_cache(requests, folder)
    if options.attention is not None:
        from opensoraplan.models.attention import check_backend

        check_backend(options.attention)
    targets = job.check_targets(requests, options.out)
    fingerprints = fingerprint_parts(paths)
    if options.parts.ema is not None:
        fingerprints["ema"] = str(options.parts.ema)
    if folder is not None and calibration is not None:
        calibration.check_weights(fingerprints["transformer"], folder)
    ratios = () if calibration is None else calibration.ratios
    return _Asked(requests, targets, folder, paths, fingerprints, ratios, prompts, warnings, resume)


def _prompt_settings(options: Generate, folder: Path | None) -> PromptSettings:
    """The model's, but for those that are given."""
    given = {
        "prompt_template": options.prompt_template,
        "default_negative_prompt": options.default_negative_prompt,
    }
    config = read_prompt_config(folder) | {key: value for key, value in given.items() if value is not None}
    return PromptSettings(
        template=config.get("prompt_template", DEFAULT_TEMPLATE),
        negative_prompt=config.get("default_negative_prompt", DEFAULT_NEGATIVE_PROMPT),
        clean=options.clean_prompts,
        keep_chinese=options.keep_chinese,
    )


def _warn_of_sizes(folder: Path, requests: list[Request]) -> None:
    """Warn if a model whose generate.json names one size of video is asked for others."""
    from opensoraplan.defaults import GenerateDefaults

    usual = GenerateDefaults.of(folder)
    for request in requests:
        if usual.height and usual.width and (request.height, request.width) != (usual.height, usual.width):
            logger.warning(
                "this model was trained on %d x %d (height x width); at %d x %d it may repeat objects",
                usual.height, usual.width, request.height, request.width,
            )  # fmt: skip
            return


def _step_cache(requests: list[Request], folder: Path | None) -> "Calibration | None":
    """What the model was calibrated to, if any video needs it."""
    if not any(request.step_cache for request in requests):
        return None
    if folder is None:
        raise ValueError(
            "--step-cache needs a model in one folder, by --model, that `osp calibrate` has seen"
        )
    from opensoraplan.runtime.step_cache import Calibration

    return Calibration.of(folder)


def _place_of(options: Generate, inference: "Inference | None", asked: _Asked) -> _Place:
    """Where it is made, once device, precision and number of processes are known to go with the options."""
    from opensoraplan.device import prepare, resolve_device, resolve_dtype
    from opensoraplan.parallel.generating import generating_mesh
    from opensoraplan.parallel.ranks import device_of_rank, place_in_job
    from opensoraplan.runtime.quantisation import check_weights

    device = device_of_rank(resolve_device(options.device))
    prepare(device, allow_tf32=inference.allow_tf32 if inference else None)
    dtype = vae_dtype = resolve_dtype(options.dtype, device)
    if options.vae_dtype not in (None, options.dtype):
        vae_dtype = resolve_dtype(options.vae_dtype, device, use="decoding")
    check_weights(options.weights, device, dtype)
    branches, tp = options.sharing.branch_ranks, options.sharing.tp
    processes = place_in_job()[1]
    if tp < 1 or processes % (branches * tp):
        raise ValueError(f"{processes} processes are no multiple of --branch-ranks {branches} x --tp {tp}")
    mesh = generating_mesh(branches=branches, tp=tp).filled(processes)
    if asked.folder is not None:
        config = read_json_object(asked.folder / "transformer" / "config.json")
        mesh.check_model(config.get("num_attention_heads", 24))
    if options.memory not in ("auto", "resident"):
        if processes > 1:
            raise ValueError(f"--memory {options.memory} is for one device, there are {processes} processes")
        if device.type == "cpu":
            raise ValueError(f"--memory {options.memory} is for a card: on a CPU everything is on the host")
    if branches > 1:
        for request in asked.requests:
            request.model_copy(update={"batched_guidance": True}).check_step_cache()
    if tp > 1 and options.weights != "whole":
        raise ValueError(
            f"--weights {options.weights} cannot be shared out by --tp {tp}: leave one of them out"
        )
    return _Place(device, dtype, vae_dtype, processes, mesh)


def _run(
    options: Generate, inference: "Inference | None", asked: _Asked, place: _Place, ranks: "Ranks"
) -> None:
    """Plan by the sizes of the model, load it, and make the videos."""
    from opensoraplan.device import explained_memory
    from opensoraplan.formats.assemble import open_pipeline
    from opensoraplan.generate import job
    from opensoraplan.parallel.generating import share_generating
    from opensoraplan.runtime.compiling import compile_blocks
    from opensoraplan.runtime.placement import Arrangement

    device = place.device
    opened = open_pipeline(make_sources(asked.paths, options.parts, inference))
    empty = opened.without_weights(place.dtype, vae_dtype=place.vae_dtype)
    outlook = _outlook(empty, options, inference, asked, place)
    with explained_memory(f"the model does not fit onto {device}: on one, --memory auto finds room"):
        try:
            pipeline, model = _load_pipeline(
                opened, options, inference, asked, place, device=outlook.loaded_on
            )
        except MemoryError as error:
            raise MemoryError(f"{error}{outlook.advice}") from None
        _tune(pipeline, options, device, masked=outlook.masked)
        if not outlook.plans:
            pipeline.to(device)
    pipeline.vae.streaming_latent_frames = empty.vae.streaming_latent_frames
    arrangement = Arrangement(pipeline, outlook.plans, device) if outlook.plans else None
    all_decode = False
    if ranks.mesh is not None:
        rows = {request.height // SPATIAL_STRIDE for request in asked.requests}
        all_decode = share_generating(pipeline.transformer, pipeline.vae, ranks.mesh, rows=rows)
    if options.compile:  # last: it is the blocks as they are now that are compiled
        compile_blocks(pipeline.transformer)
    pipeline.set_progress_bar_config(desc="denoising", unit="step", disable=not ranks.first)
    with made(asked.targets[0].parent):
        job.run(
            pipeline,
            asked.requests,
            asked.targets,
            model=model,
            resume=asked.resume,
            save_every=options.save_every,
            ranks=ranks,
            all_decode=all_decode,
            batched=options.sharing.branch_ranks > 1,
            arrangement=arrangement,
            step_ratios=asked.step_ratios,
            fingerprints=asked.fingerprints,
        )


@dataclass(frozen=True)
class _Outlook:
    """What is known before the model is loaded: where to, `plans` for keeping it on a card (none: no choice),
    what helps if the host has no room for it, and why attention will mask keys, if it will.
    """

    loaded_on: "torch.device"
    plans: "Sequence[Plan]"
    advice: str
    masked: str | None


def _outlook(
    empty: "OpenSoraPlanPipeline",
    options: Generate,
    inference: "Inference | None",
    asked: _Asked,
    place: _Place,
) -> _Outlook:
    """From the sizes of a pipeline without weights. Sets its VAE's decoding as it is to be, and raises what
    `_tune` would, on the model with its weights: ValueError, and MemoryError for what fits under no plan.
    """
    import torch

    from opensoraplan.device import free_memory
    from opensoraplan.runtime.placement import MARGIN, fit_decoding, peak_on_host, plans_for

    device = place.device
    masked = _masking(empty, options, asked.requests, place)
    whole = _needs(empty, asked.requests)[0].weights
    _tune(empty, options, device, masked=masked)
    _set_decoding(empty.vae, options, inference)
    needs, free = _needs(empty, asked.requests), free_memory(device)
    plans: Sequence[Plan] = []
    advice = ""
    resident = min(plans_for(needs, ["resident"]), key=lambda plan: plan.peak)
    if place.has_plans and options.memory == "resident":
        _tell_peak(resident.peak, device, free=free)
    elif place.has_plans:
        plans = _plans(needs, options.memory, device, free=free)
        advice = instead_of_host(resident, device, whole=whole, free=free)
    elif device.type == "cpu" and place.processes == 1:  # several have to decode the same chunks
        grids = [latent_shape(r.frames, r.height, r.width) for r in asked.requests]
        fit_decoding(empty.vae, grids, device, free=free - needs[0].weights)
        _tell_peak(peak_on_host(empty.vae, needs, grids), device, free=free)
    # What is to be moved to and fro begins on the host, and so does what has to become smaller to fit.
    direct = not plans or plans[0].placement == "resident"
    fits = whole <= free * (1 - MARGIN) if plans or options.weights != "whole" else True
    return _Outlook(device if direct and fits else torch.device("cpu"), plans, advice, masked)


def instead_of_host(resident: "Plan", device: "torch.device", *, whole: int, free: int) -> str:
    """The end of a message that the host has no room for the weights, `whole` bytes: what could be done."""
    from opensoraplan.runtime.placement import MARGIN

    room = free * (1 - MARGIN)
    if resident.peak <= room and whole <= room:
        return f"; {device} has room for all of it: --memory resident loads it straight there"
    less = ": ask for fewer or smaller frames" if whole <= room else ""
    return (
        f"; it would be loaded straight onto {device} if {max(resident.peak, whole) / 1e9:.3g} GB and some "
        f"more were free there, and {free / 1e9:.3g} GB are{less}"
    )


def _tell_peak(peak: int, device: "torch.device", *, free: int) -> None:
    """What generating is predicted to take, of what is free. Raises MemoryError for more than the device ever
    has.
    """
    from opensoraplan.device import total_memory

    if peak > (total := total_memory(device)):
        swap = ", swap included" if device.type == "cpu" else ""
        raise MemoryError(
            f"generating is predicted to take {peak / 1e9:,.1f} GB of memory, {device} has "
            f"{total / 1e9:,.1f} GB{swap}: ask for fewer or smaller frames"
        )
    level = logging.WARNING if peak > free else logging.INFO
    less = ": the system may end it; fewer or smaller frames need less" if peak > free else ""
    said = "generating is predicted to take %.3g GB of memory, %.3g GB are free%s"
    logger.log(level, said, peak / 1e9, free / 1e9, less)


def _masking(
    pipeline: "OpenSoraPlanPipeline", options: Generate, requests: Sequence[Request], place: _Place
) -> str | None:
    """What makes attention mask some keys in any of the videos; None if nothing does."""
    from opensoraplan.parallel.sequence import padded_tokens

    config, mesh = pipeline.transformer.config, place.mesh
    rates = config["sparse_n"] or [1]
    for request in requests:
        if request.batched_guidance and request.guidance > 1 and options.sharing.branch_ranks == 1:
            return "--batched-guidance pads the shorter of its prompts"
        frames, rows, columns = latent_shape(request.frames, request.height, request.width)
        tokens = frames * rows * columns // config["patch_size"] ** 2
        padded = padded_tokens(tokens, ranks=mesh.sp * mesh.tp, rates=rates)
        if padded != tokens:
            size = f"{request.frames} x {request.height} x {request.width}"
            return f"the tokens of {size} are padded from {tokens} to {padded}"
    return None


def _tune(
    pipeline: "OpenSoraPlanPipeline", options: Generate, device: "torch.device", *, masked: str | None
) -> None:
    """Choose how the denoiser is kept, and computes on the device. Raises ValueError for what it cannot."""
    if options.weights != "whole":
        from opensoraplan.runtime.quantisation import keep_weights

        keep_weights(pipeline.transformer, options.weights)
    if options.attention is not None:
        from opensoraplan.models.attention import set_backend

        set_backend(pipeline.transformer, options.attention, device, masked=masked)


def _set_decoding(vae: "WFVAE", options: Generate, inference: "Inference | None") -> None:
    if inference is not None and not inference.streaming:
        vae.disable_streaming()
    if options.tiling:
        vae.enable_tiling()


def _needs(pipeline: "OpenSoraPlanPipeline", requests: Sequence[Request]) -> "list[Needs]":
    """Of all sizes of video."""
    from opensoraplan.runtime.placement import needs_of

    sizes = {(r.frames, r.height, r.width, r.steps, r.batched_guidance, bool(r.step_cache)) for r in requests}
    return [
        needs_of(pipeline, frames=t, height=h, width=w, steps=steps, batched=batched, step_cache=cached)
        for t, h, w, steps, batched, cached in sizes
    ]


def _plans(needs: "list[Needs]", memory: Memory, device: "torch.device", *, free: int) -> "Sequence[Plan]":
    """Plans by which all these videos fit into the `free` bytes of the device, then leaner ones."""
    from opensoraplan.runtime.placement import PLACEMENTS, first_that_fits, plans_for

    plans = plans_for(needs, PLACEMENTS if memory == "auto" else (memory,))
    plans = plans[first_that_fits(plans, free=free) :]
    logger.info("of %s, %.1f GB are free; the model is %s (predicted)", device, free / 1e9, plans[0])
    return plans


def _load_pipeline(
    opened: "OpenedPipeline",
    options: Generate,
    inference: "Inference | None",
    asked: _Asked,
    place: _Place,
    *,
    device: "torch.device",
) -> "tuple[OpenSoraPlanPipeline, str | dict[str, Any]]":
    """The pipeline on `device`, and what its videos say of where it came from."""
    from opensoraplan.device import dtype_name
    from opensoraplan.formats import assemble
    from opensoraplan.models.strict import wrong_types_told
    from opensoraplan.pipeline import OpenSoraPlanPipeline

    folder, paths = asked.folder, asked.paths
    logger.info("loading %s, %s on %s", folder or paths["transformer"], dtype_name(place.dtype), device)
    pipeline = assemble.load_pipeline(
        opened,
        dtype=place.dtype,
        vae_dtype=place.vae_dtype,
        device=device,
        scheduler=inference.scheduler if inference else {},
        max_text_tokens=inference.max_text_tokens if inference else 512,
    )
    model: str | dict[str, Any] = {name: str(path) for name, path in paths.items()}
    if folder is not None:
        # For its scheduler and settings. Its weights are not left to diffusers, which lets some be missing.
        loaded = {name: pipeline.components[name] for name in PARTS}
        with wrong_types_told(str(folder / SCHEDULER)):  # of schedulers that only diffusers knows
            pipeline = OpenSoraPlanPipeline.from_pretrained(folder, **loaded, local_files_only=True)
        model = str(folder)
    elif options.parts.ema is not None:
        model["ema"] = options.parts.ema
    prompts = asked.prompts
    pipeline.register_to_config(
        prompt_template=prompts.template,
        default_negative_prompt=prompts.negative_prompt,
        clean_prompts=prompts.clean,
        keep_chinese=prompts.keep_chinese,
    )
    _set_decoding(pipeline.vae, options, inference)
    return pipeline, model


def calibrate(options: Calibrate) -> None:
    """`osp calibrate`."""
    from opensoraplan import builtin
    from opensoraplan.defaults import GenerateDefaults
    from opensoraplan.generate import job
    from opensoraplan.runtime import step_cache

    folder = options.model or builtin.folder()
    check_model(folder)
    out = options.out or folder / STEP_CACHE_FILE
    if out.exists():
        raise ValueError(f"{out} exists already: delete it, or give another file by --out")
    usual = {"frames": 57, "height": 288, "width": 512, "steps": 50, "guidance": 8.0}
    usual |= GenerateDefaults.of(folder).model_dump(include=set(usual), exclude_none=True)
    asked = {name: getattr(options, name) for name in usual}
    settings = {**usual, **{name: value for name, value in asked.items() if value is not None}}
    request = Request.read({"prompt": options.prompt, **settings}, where="the options")
    if request.steps < 2:
        raise ValueError(f"--steps must be at least 2, got {request.steps}")

    job.check_folder(out.parent, out.name)

    from opensoraplan.device import free_memory, prepare, resolve_device, resolve_dtype
    from opensoraplan.pipeline import OpenSoraPlanPipeline
    from opensoraplan.runtime.placement import Arrangement, peak_on_host

    device = resolve_device(options.device)
    prepare(device)
    dtype = resolve_dtype(options.dtype, device)
    pipeline = OpenSoraPlanPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)

    def measure(_again: bool) -> tuple[float, ...]:
        with step_cache.measured(pipeline.transformer) as ratios:
            pipeline(
                request.prompt,
                num_frames=request.frames,
                height=request.height,
                width=request.width,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                batched_guidance=True,
                seed=0,
                output_type="latent",
            )
        return tuple(ratios)

    if device.type == "cpu":
        grid = latent_shape(request.frames, request.height, request.width)
        peak = peak_on_host(pipeline.vae, _needs(pipeline, [request]), [grid])
        _tell_peak(peak, device, free=free_memory(device))
        ratios = measure(False)
    else:
        batched = request.model_copy(update={"batched_guidance": True})
        plans = _plans(_needs(pipeline, [batched]), "auto", device, free=free_memory(device))
        ratios = Arrangement(pipeline, plans, device).run(measure)
    weights = fingerprint_weights(folder / "transformer")
    with made(out.parent):
        step_cache.Calibration(ratios=ratios, transformer=weights).write(out)
    logger.info("wrote %s: osp generate ... --step-cache 0.06", out)


def decode(options: Decode) -> None:
    """`osp decode`."""
    from opensoraplan.generate import saved

    record, step = saved.read_record(options.latents)
    model = record["model"]
    path = options.vae or Path(model["vae"] if isinstance(model, dict) else model)
    if not path.exists():
        raise FileNotFoundError(f"{path}, which made the latents, does not exist: give its VAE by --vae")
    if step < record["steps"]:
        logger.warning("only %d of %d steps were done: the video will be noisy", step, record["steps"])
    if options.vae is None:
        _check_vae(record, path)
    stem = options.latents.name.removesuffix(saved.SUFFIX)
    default = options.latents.with_name(stem + (".png" if record["frames"] == 1 else ".mp4"))

    from opensoraplan.device import (
        DTYPES,
        dtype_name,
        explained_memory,
        prepare,
        resolve_device,
        resolve_dtype,
    )
    from opensoraplan.formats.assemble import load_vae
    from opensoraplan.generate import job
    from opensoraplan.pipeline import OpenSoraPlanPipeline
    from opensoraplan.runtime.placement import fit_decoding
    from opensoraplan.samplers import make_scheduler

    request = Request(**{name: record[name] for name in ("prompt", "frames", "fps", "seed")})  # as checked
    (wanted,) = job.check_targets([request], options.out or default)
    device = resolve_device(options.device)
    prepare(device)
    decoded_in = {dtype_name(dtype): name for name, dtype in DTYPES.items()}.get(str(record.get("vae_dtype")))
    dtype = resolve_dtype(options.dtype or decoded_in, device, use="decoding")
    vae = load_vae(path, dtype=dtype, device=device)
    if options.tiling:
        vae.enable_tiling()
    names = ("transformer", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    absent: dict[str, Any] = dict.fromkeys(names)
    pipeline = OpenSoraPlanPipeline(vae=vae, scheduler=make_scheduler(), **absent)
    found = saved.read(options.latents)
    channels, frames, height, width = found.latents.shape[1:]
    if channels != vae.config["latent_channels"]:
        raise ValueError(
            f"{options.latents} has latents of {channels} channels, the VAE in {path} decodes "
            f"{vae.config['latent_channels']}"
        )
    fit_decoding(vae, [(frames, height, width)], device)
    vae.register_to_config(**found.scaling)
    record |= {"vae_dtype": dtype_name(vae.dtype), "vae_tiling": vae.tiling}
    full = "the frames do not fit into memory: --tiling needs less, and is not exact"
    with explained_memory(full), made(wanted.parent):
        written = job.write_frames(pipeline, found.latents, wanted, record, fps=record["fps"])
    logger.info("wrote %s", written)


def _check_vae(record: dict[str, Any], path: Path) -> None:
    """Warn if the VAE where the latents' model is, or was, is another one now."""
    made_by = record.get("fingerprint")
    component = path if isinstance(record["model"], dict) else path / "vae"
    if isinstance(made_by, dict) and made_by.get("vae") != fingerprint_weights(component):
        logger.warning("%s has another VAE than the model that made the latents: give that by --vae", path)
