"""`osp generate` and `osp decode`: options, and what is checked before the job begins."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

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
)
from opensoraplan.defaults import Solver, Weights
from opensoraplan.requests import Request, is_prompt_file, read_requests
from opensoraplan.shapes import SPATIAL_STRIDE, latent_shape

if TYPE_CHECKING:
    import torch

    from opensoraplan.convert.mindspeed_json import Inference
    from opensoraplan.memory import Arrangement
    from opensoraplan.pipeline import OpenSoraPlanPipeline

logger = logging.getLogger(__name__)

Memory = Literal["auto", "resident", "in-turn", "streamed"]

# How long processes wait for each other: one may decode a long video alone.
PATIENCE_S = 7200.0


@dataclass(frozen=True)
class Sharing:
    """Of the processes that `osp launch` started, which make every video together."""

    branch_ranks: Literal[1, 2] = 1
    """2: half of the processes denoise with the prompt, half without."""
    tp: int = 1
    """So many share every layer's weights; the rest share the video's tokens."""


@dataclass(frozen=True)
class Generate:
    """Make videos (or, with one frame, pictures) from prompts.

    The model is a folder that `osp convert` wrote (--model), or the original's files by --config or one by
    one. A .txt (a prompt a line), .jsonl or .csv file (column prompt; others set options) gives many prompts,
    and the same command again continues where it was stopped. Nothing that exists is overwritten. Several
    devices make each video together: osp launch --processes 4 -- generate "..." --branch-ranks 2
    """

    prompt: Annotated[Positional[str], optional("PROMPT")] = ""
    """A prompt, or a file of prompts."""
    model: Annotated[Path | None, optional("PATH", "(default: the small built-in model)")] = None
    """A diffusers folder, as `osp convert` and `osp export` write it."""
    config: OptionalPath = None
    """The guide's inference JSON; options given here go before its values."""
    parts: OmitArgPrefixes[Parts] = NO_PARTS
    out: Path = Path("samples")
    """A folder, or the .mp4 or .png file of a single video."""
    frames: int = 121
    """8k + 1; 1 makes a picture."""
    height: int = 576
    """Pixels, a multiple of 16."""
    width: int = 1024
    """Pixels, a multiple of 16."""
    fps: float = 24
    """Frames a second of the mp4."""
    steps: int = 50
    """Denoising steps."""
    guidance: float = 8.0
    """Strength of the prompt; 1 is none, at half the cost."""
    guidance_rescale: float = 0.7
    """More of it makes less saturated pictures, 0 to 1."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guide only this part of the steps."""
    batched_guidance: bool = False
    """Compute with and without the prompt in one batch: more memory."""
    shift: Annotated[float | None, optional("FLOAT", "(default: the model's; 7 of the release)")] = None
    """Of the schedule; more spends more steps on noise."""
    dynamic_shift: Annotated[bool | None, optional("True|False", "(default: the model's, False)")] = None
    """Tell the shift from the size of the picture instead."""
    linear_quadratic: bool = False
    """Use the linear-quadratic schedule, which has no shift."""
    solver: Solver = "euler"
    """How steps follow the flow. adams needs half as many for the same video, or is nearer to the exact one
    with as many; euler is the original's."""
    step_cache: float = 0.0
    """Let steps take over from the one before while the error stays below this, 0.06 say: faster, not exact.
    Needs `osp calibrate`."""
    negative_prompt: str = ""
    """What to avoid, added to the default negative prompt."""
    seed: int = 0
    """Of the first video; the others count on from it."""
    videos_per_prompt: int = 1
    """Each with its own seed."""
    device: OptionalDevice = None
    """cpu, cuda, cuda:1, npu, ..."""
    dtype: Dtype = "bf16"
    """Precision to compute in."""
    memory: Memory = "auto"
    """Where the model is: all of it on the device, each part in turn, or block after block, which takes the
    least memory and the most time. auto: the first of them that is predicted to fit, and the next when memory
    is full."""
    weights: Weights = "whole"
    """int8: keep the denoiser's matrices so, which halves their memory, and cast each when it is used. fp8:
    keep and multiply those of its feed-forwards so, which is faster on cards that can. Neither is exact."""
    attention: Annotated[str | None, optional("NAME", "(default: torch's own)")] = None
    """The implementation of attention, one of diffusers' backends: _native_cudnn, flash, sage, ..."""
    compile: bool = False
    """Compile the denoiser's blocks: minutes before the first step, less time for each."""
    prompt_template: Annotated[
        str | None, optional("TEXT", "(default: the model's; 'high quality, {}' of the release)")
    ] = None
    """What is put around a prompt; {} is where it goes, and alone is nothing."""
    default_negative_prompt: Annotated[str | None, optional("TEXT", "(default: the model's)")] = None
    """Instead of the model's long one; '' is none."""
    clean_prompts: bool = True
    """Clean prompts as the training captions were."""
    tiling: bool = False
    """Decode in blended tiles: less memory for large frames, not exact."""
    resume: bool = False
    """Go on with the video that a stopped run has left; with many prompts that is done in any case."""
    save_every: int = 10
    """Keep the latents of so many steps on the disk until the video is written; 0 is never."""
    sharing: OmitArgPrefixes[Sharing] = Sharing()


@dataclass(frozen=True)
class Calibrate:
    """Measure, on one video, how a model's steps resemble each other, for `osp generate --step-cache`."""

    model: Annotated[Path | None, optional("PATH", "(default: the small built-in model)")] = None
    """A diffusers folder, as `osp convert` and `osp export` write it."""
    prompt: str = "A red fox runs through fresh snow."
    """What the video shows; the ratios hardly depend on it."""
    out: Annotated[Path | None, optional("PATH", "(default: step_cache.json in the model's folder)")] = None
    """The file to write."""
    frames: Annotated[int | None, optional("INT", "(default: the model's, or 57)")] = None
    """8k + 1."""
    height: Annotated[int | None, optional("INT", "(default: the model's, or 288)")] = None
    """Pixels, a multiple of 16."""
    width: Annotated[int | None, optional("INT", "(default: the model's, or 512)")] = None
    """Pixels, a multiple of 16."""
    steps: Annotated[int | None, optional("INT", "(default: the model's, or 50)")] = None
    """Denoising steps; runs of other numbers of steps take the nearest."""
    guidance: Annotated[float | None, optional("FLOAT", "(default: the model's, or 8)")] = None
    """As in the videos that it is for."""
    device: OptionalDevice = None
    """cpu, cuda, cuda:1, npu, ..."""
    dtype: Dtype = "bf16"
    """Precision to compute in."""


@dataclass(frozen=True)
class Decode:
    """Make the video of latents that `osp generate` has left, without the rest of the model."""

    latents: Positional[Path]
    """NAME.latents.safetensors."""
    out: Annotated[Path | None, optional("PATH", "(default: NAME.mp4, or .png)")] = None
    """The file to write; a name that is taken gets a number."""
    vae: Annotated[Path | None, optional("PATH", "(default: that of the model that made them)")] = None
    """The release's .ckpt, a diffusers component, or a folder that `osp convert` wrote."""
    device: OptionalDevice = None
    """cpu, cuda, cuda:1, npu, ..."""
    dtype: Dtype = "bf16"
    """Precision to compute in."""
    tiling: bool = False
    """Decode in blended tiles: less memory for large frames, not exact."""


# Options of `Generate` that are fields of a request; the rest say what makes it.
REQUEST_OPTIONS = (
    "negative_prompt", "frames", "height", "width", "fps", "steps", "guidance", "guidance_rescale",
    "guidance_interval", "batched_guidance", "shift", "dynamic_shift", "linear_quadratic", "solver",
    "step_cache", "seed",
)  # fmt: skip


def generate(options: Generate, inference: "Inference | None") -> None:
    """`osp generate`: everything that can be wrong is checked before the model is loaded."""
    from opensoraplan import generate as job

    if not options.prompt.strip():
        raise ValueError('give a prompt or a file of prompts: osp generate "a cat on a beach" --model FOLDER')
    if options.save_every < 0:
        raise ValueError(f"--save-every must be at least 0, got {options.save_every}")
    settings = {name: getattr(options, name) for name in REQUEST_OPTIONS}
    requests = read_requests(options.prompt, settings, copies=options.videos_per_prompt)
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
    else:
        paths = find_paths(options.parts, inference)
    ratios = _step_cache(requests, folder)
    if options.attention is not None:
        from opensoraplan.models.attention import check_backend

        check_backend(options.attention)
    targets = job.check_targets(requests, options.out)

    import torch

    from opensoraplan.device import explained_memory, free_memory, prepare, resolve_device, resolve_dtype
    from opensoraplan.memory import limit_decoding
    from opensoraplan.models.weights import check_weights
    from opensoraplan.parallel.generating import generating_mesh, share_generating
    from opensoraplan.parallel.ranks import device_of_rank, joined, place_in_job

    device = device_of_rank(resolve_device(options.device))
    prepare(device)
    dtype = resolve_dtype(options.dtype, device)
    check_weights(options.weights, device, dtype)
    branches, tp = options.sharing.branch_ranks, options.sharing.tp
    processes = place_in_job()[1]
    if tp < 1 or processes % (branches * tp):
        raise ValueError(f"{processes} processes are no multiple of --branch-ranks {branches} x --tp {tp}")
    mesh = generating_mesh(branches=branches, tp=tp)
    if folder is not None:
        config = json.loads((folder / "transformer" / "config.json").read_text())
        mesh.filled(processes).check_model(config.get("num_attention_heads", 24))
    resume = options.resume or is_prompt_file(options.prompt) or len(requests) > 1
    if options.memory not in ("auto", "resident"):
        if processes > 1:
            raise ValueError(f"--memory {options.memory} is for one device, there are {processes} processes")
        if device.type == "cpu":
            raise ValueError(f"--memory {options.memory} is for a card: on a CPU everything is on the host")
    if branches > 1:
        for request in requests:
            request.model_copy(update={"batched_guidance": True}).check_step_cache()
    if tp > 1 and options.weights != "whole":
        raise ValueError(
            f"--weights {options.weights} cannot be shared out by --tp {tp}: leave one of them out"
        )
    # What is to be moved to and fro begins on the host, and so does what is to become smaller.
    moving = device.type != "cpu" and processes == 1 and options.memory != "resident"
    place = torch.device("cpu") if moving or options.weights != "whole" else device
    with joined(mesh, device, timeout=PATIENCE_S) as ranks:
        pipeline, model = _load_pipeline(options, inference, paths, folder=folder, place=place, dtype=dtype)
        _tune(pipeline, options, device)
        if not moving:
            with explained_memory(f"the model does not fit onto {device}: on one, --memory auto finds room"):
                pipeline.to(device)
        if device.type == "cpu" and processes == 1:  # several have to decode the same chunks
            grids = [latent_shape(r.frames, r.height, r.width) for r in requests]
            limit_decoding(pipeline.vae, grids, free=free_memory(device))
        arrangement = _arrange(pipeline, requests, options.memory, device) if moving else None
        all_decode = False
        if ranks.mesh is not None:
            rows = {request.height // SPATIAL_STRIDE for request in requests}
            all_decode = share_generating(pipeline.transformer, pipeline.vae, ranks.mesh, rows=rows)
        pipeline.set_progress_bar_config(desc="denoising", unit="step", disable=not ranks.first)
        job.run(
            pipeline,
            requests,
            targets,
            model=model,
            resume=resume,
            save_every=options.save_every,
            ranks=ranks,
            all_decode=all_decode,
            batched=branches > 1,
            arrangement=arrangement,
            step_ratios=ratios,
        )


def _step_cache(requests: list[Request], folder: Path | None) -> tuple[float, ...]:
    """What the model was calibrated to, if any video needs it."""
    if not any(request.step_cache for request in requests):
        return ()
    if folder is None:
        raise ValueError(
            "--step-cache needs a model in one folder, by --model, that `osp calibrate` has seen"
        )
    from opensoraplan.models.step_cache import Calibration

    return Calibration.of(folder).ratios


def _tune(pipeline: "OpenSoraPlanPipeline", options: Generate, device: "torch.device") -> None:
    """Choose how the denoiser is kept, and computes on the device."""
    if options.weights != "whole":
        from opensoraplan.models.weights import keep_weights

        keep_weights(pipeline.transformer, options.weights)
    if options.attention is not None:
        from opensoraplan.models.attention import set_backend

        set_backend(pipeline.transformer, options.attention, device)
    if options.compile:
        from opensoraplan.models.compiling import compile_blocks

        compile_blocks(pipeline.transformer)


def _arrange(
    pipeline: "OpenSoraPlanPipeline", requests: list[Request], memory: Memory, device: "torch.device"
) -> "Arrangement":
    """Keep the pipeline's parts so that all these videos fit the device."""
    from opensoraplan.device import free_memory
    from opensoraplan.memory import PLACEMENTS, Arrangement, first_that_fits, needs_of, plans_for

    sizes = {(r.frames, r.height, r.width, r.steps, r.batched_guidance, bool(r.step_cache)) for r in requests}
    placements = PLACEMENTS if memory == "auto" else (memory,)
    plans = plans_for(
        [
            needs_of(pipeline, frames=t, height=h, width=w, steps=steps, batched=batched, step_cache=cached)
            for t, h, w, steps, batched, cached in sizes
        ],
        placements,
    )
    free = free_memory(device)
    arrangement = Arrangement(pipeline, plans, device, place=first_that_fits(plans, free=free))
    logger.info("of %s, %.1f GB are free; the model is %s (predicted)", device, free / 1e9, arrangement.plan)
    return arrangement


def _load_pipeline(
    options: Generate,
    inference: "Inference | None",
    paths: dict[str, Path],
    *,
    folder: Path | None,
    place: "torch.device",
    dtype: "torch.dtype",
) -> "tuple[OpenSoraPlanPipeline, str | dict[str, Any]]":
    """The pipeline of these parts, or of a whole `folder`, in the memory of `place`, and what its videos say
    of where it came from.
    """
    from opensoraplan.convert import assemble
    from opensoraplan.models.text import PromptSettings
    from opensoraplan.pipeline import OpenSoraPlanPipeline

    prompts: dict[str, Any] = {} if options.clean_prompts else {"clean_prompts": False}
    if options.prompt_template is not None:
        prompts["prompt_template"] = PromptSettings(template=options.prompt_template).template
    if options.default_negative_prompt is not None:
        prompts["default_negative_prompt"] = options.default_negative_prompt

    origin = folder or paths["transformer"]
    logger.info("loading %s, %s on %s", origin, str(dtype).removeprefix("torch."), place)
    pipeline = assemble.load_pipeline(
        make_sources(paths, options.parts, inference),
        dtype=dtype,
        device=place,
        scheduler=inference.scheduler if inference else {},
        max_text_tokens=inference.max_text_tokens if inference else 512,
    )
    model: str | dict[str, Any] = {name: str(path) for name, path in paths.items()}
    if folder is not None:
        # For its scheduler and settings. Its weights are not left to diffusers, which lets some be missing.
        loaded = {name: pipeline.components[name] for name in PARTS}
        pipeline = OpenSoraPlanPipeline.from_pretrained(folder, **loaded, local_files_only=True)
        model = str(folder)
    elif options.parts.ema is not None:
        model["ema"] = options.parts.ema
    pipeline.register_to_config(**prompts)
    if inference is not None and not inference.streaming:
        pipeline.vae.disable_streaming()
    if options.tiling:
        pipeline.vae.enable_tiling()
    return pipeline, model


def calibrate(options: Calibrate) -> None:
    """`osp calibrate`."""
    from opensoraplan import builtin
    from opensoraplan import generate as job
    from opensoraplan.defaults import GenerateDefaults
    from opensoraplan.models import step_cache

    folder = options.model or builtin.folder()
    check_model(folder)
    out = options.out or folder / step_cache.FILE
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

    from opensoraplan.device import prepare, resolve_device, resolve_dtype
    from opensoraplan.pipeline import OpenSoraPlanPipeline

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
        ratios = measure(False)
    else:
        batched = request.model_copy(update={"batched_guidance": True})
        ratios = _arrange(pipeline, [batched], "auto", device).run(measure)
    step_cache.Calibration(ratios=ratios).write(out)
    logger.info("wrote %s: osp generate ... --step-cache 0.06", out)


def decode(options: Decode) -> None:
    """`osp decode`."""
    from opensoraplan import saved

    record, step = saved.read_record(options.latents)
    model = record["model"]
    path = options.vae or Path(model["vae"] if isinstance(model, dict) else model)
    if not path.exists():
        raise FileNotFoundError(f"{path}, which made the latents, does not exist: give its VAE by --vae")
    if step < record["steps"]:
        logger.warning("only %d of %d steps were done: the video will be noisy", step, record["steps"])
    stem = options.latents.name.removesuffix(saved.SUFFIX)
    default = options.latents.with_name(stem + (".png" if record["frames"] == 1 else ".mp4"))

    from opensoraplan import generate as job
    from opensoraplan.convert.assemble import load_vae
    from opensoraplan.device import explained_memory, free_memory, prepare, resolve_device, resolve_dtype
    from opensoraplan.memory import decoding_chunk, limit_decoding
    from opensoraplan.pipeline import OpenSoraPlanPipeline, make_scheduler

    request = Request(**{name: record[name] for name in ("prompt", "frames", "fps", "seed")})
    (wanted,) = job.check_targets([request], options.out or default)
    device = resolve_device(options.device)
    prepare(device)
    vae = load_vae(path, dtype=resolve_dtype(options.dtype, device), device=device)
    if options.tiling:
        vae.enable_tiling()
    names = ("transformer", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    absent: dict[str, Any] = dict.fromkeys(names)
    pipeline = OpenSoraPlanPipeline(vae=vae, scheduler=make_scheduler(), **absent)
    found = saved.read(options.latents)
    frames, height, width = found.latents.shape[2:]
    if device.type == "cpu":
        limit_decoding(vae, [(frames, height, width)], free=free_memory(device))
    else:
        chunk = decoding_chunk(vae, (frames, height, width), free=free_memory(device))
        vae.enable_streaming(latent_frames=chunk)
    vae.register_to_config(**found.scaling)
    record |= {"vae_dtype": str(vae.dtype).removeprefix("torch."), "vae_tiling": vae.tiling}
    with explained_memory("the frames do not fit into memory: --tiling needs less, and is not exact"):
        written = job.write_frames(pipeline, found.latents, wanted, record, fps=record["fps"])
    logger.info("wrote %s", written)
