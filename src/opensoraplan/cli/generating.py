"""`osp generate`: options, and checks before a session loads the model."""

import itertools
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional

from opensoraplan.cli.effects import check_effects, check_scheduler
from opensoraplan.cli.options import Dtype, OptionalDevice, OptionalPath, check_exists, optional, options_of
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
from opensoraplan.defaults import Memory, WeightPrecision
from opensoraplan.disk import make_folder
from opensoraplan.fingerprint import fingerprint_parts
from opensoraplan.models.prompts import PromptSettings
from opensoraplan.requests import Request, is_prompt_file, read_requests

if TYPE_CHECKING:
    from opensoraplan.formats.mindspeed.inference import Inference
    from opensoraplan.generate.session import SessionOptions
    from opensoraplan.runtime.step_cache import Calibration

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sharing:
    """Several devices: how the processes of `osp launch` split the work on each video."""

    branch_ranks: Literal[1, 2] = 1
    """2: half of the processes compute the branch with the prompt, half the one without."""
    tp: int = 1
    """Tensor-parallel size. The remaining processes split the video's tokens."""


@dataclass(frozen=True)
class _Files:
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


_RequestOptions = options_of(
    Request,
    without=("prompt",),  # which may be a file here
    shown={
        "shift": optional("FLOAT", "(default: the model's; 7 of the release)"),
        "dynamic_shift": optional("True|False", "(default: the model's, False)"),
        "image": optional("FILE"),
        "last_image": optional("FILE"),
        "video": optional("FILE"),
        "lora": optional("FILE[:STRENGTH] ..."),
    },
)


@dataclass(frozen=True)
class Generate(_RequestOptions, _Files):
    """Make videos, or pictures with --frames 1, from prompts.

    The model is a folder written by `osp convert` (--model), the original's files (--config or one option per
    file), or the small built-in model. A .txt file has one prompt per line; .jsonl and .csv files have a
    column `prompt` and may set other options per video. The same command again continues a stopped job.
    Existing files are never overwritten. With `osp launch --processes 4 -- generate ...` several devices make
    each video together.
    """

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
    streamed: the denoiser block by block, which needs the least memory and the most time. auto: the
    fastest that fits.
    """
    weights: WeightPrecision = "whole"
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


# Groups of options in --help; the basic options are in none of them.
GROUPS = {
    "pictures and clips": ("image", "last_image", "video", "overlap", "extend"),
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


def hint(words: list[str]) -> str | None:
    """What to do about unknown words: quote the prompt, if there are several."""
    prompt = " ".join(itertools.takewhile(lambda word: not word.startswith("-"), words))
    return f'put quotes around a prompt: osp generate "{prompt}"' if " " in prompt else None


def generate(options: Generate, inference: "Inference | None", given: Collection[str] = frozenset()) -> None:
    """`osp generate`. Checks everything that can be wrong before the model is loaded. `given`: the options on
    the command line, each of which must have an effect.
    """
    asked = _check_options(options, inference, given)

    from opensoraplan.generate import job
    from opensoraplan.generate.session import Session
    from opensoraplan.parallel.ranks import place_in_job

    for warning in asked.warnings if place_in_job()[0] == 0 else ():
        logger.warning(warning)
    how = _session_options(options, inference, asked)
    with Session.open(how, asked.requests) as session, make_folder(asked.targets[0].parent):
        progress = job.Progress(save_every=options.save_every)
        job.run(session, asked.requests, asked.targets, resume=asked.resume, progress=progress)


def check(options: Generate, inference: "Inference | None", given: Collection[str]) -> None:
    """Raise what `generate` would raise before it loads torch."""
    _check_options(options, inference, given)


@dataclass(frozen=True)
class _CheckedOptions:
    """What to make, with which model, and where to: the result of the checks that need no torch. `folder`:
    the model's, or None for a model in parts. `paths`, `fingerprints`: of its parts in either case.
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


def _session_options(
    options: Generate, inference: "Inference | None", asked: _CheckedOptions
) -> "SessionOptions":
    from opensoraplan.generate.session import SessionOptions

    same = ("device", "dtype", "vae_dtype", "memory", "weights", "attention", "compile", "tiling")
    guide = {}
    if inference is not None:
        names = ("streaming", "scheduler", "max_text_tokens", "allow_tf32")
        guide = {name: getattr(inference, name) for name in names}
    return SessionOptions(
        model=asked.folder or make_sources(asked.paths, options.parts, inference),
        **{name: getattr(options, name) for name in same},
        **guide,
        prompts=asked.prompts,
        branch_ranks=options.sharing.branch_ranks,
        tp=options.sharing.tp,
        fingerprints=asked.fingerprints,
        step_ratios=asked.step_ratios,
    )


def _check_options(
    options: Generate, inference: "Inference | None", given_names: Collection[str]
) -> _CheckedOptions:
    from opensoraplan.generate import job

    if not options.prompt.strip():
        raise ValueError('give a prompt or a file of prompts: osp generate "a cat on a beach" --model FOLDER')
    if options.save_every < 0:
        raise ValueError(f"--save-every must be at least 0, got {options.save_every}")
    settings = {name: getattr(options, name) for name in Request.model_fields if name != "prompt"}
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
        logger.info("using the small built-in model, as no --model is given; it knows %s", builtin.KNOWS)
    if folder is not None:
        check_model(folder)
        paths = {name: folder / name for name in PARTS}
        check_parts(paths)
        check_scheduler(folder, given_names, requests)
        _warn_of_sizes(folder, requests)
        job.warn_of_tasks(folder, requests)
    else:
        paths = find_paths(options.parts, inference)
    prompts = _prompt_settings(options, folder)
    guided = [request for request in requests if request.guidance > 1]
    warnings = prompts.check_all((r.prompt for r in requests), (r.negative_prompt for r in guided))
    calibration = _step_cache(requests, folder)
    if options.attention is not None:
        from opensoraplan.models.attention import check_backend

        check_backend(options.attention)
    for request in requests:
        for file in (*request.frame_files(), *request.lora_strengths()):
            check_exists(file)
    targets = job.check_targets(requests, options.out)
    fingerprints = fingerprint_parts(paths)
    if options.parts.ema is not None:
        fingerprints["ema"] = str(options.parts.ema)
    if folder is not None and calibration is not None:
        calibration.warn_of_other_weights(fingerprints["transformer"], folder)
    ratios = () if calibration is None else calibration.ratios
    return _CheckedOptions(requests, targets, folder, paths, fingerprints, ratios, prompts, warnings, resume)


def _prompt_settings(options: Generate, folder: Path | None) -> PromptSettings:
    """The model's prompt settings, with the given options in place of its own."""
    given = {
        "prompt_template": options.prompt_template,
        "default_negative_prompt": options.default_negative_prompt,
    }
    own = {key: value for key, value in given.items() if value is not None}
    cleaning = {"clean_prompts": options.clean_prompts, "keep_chinese": options.keep_chinese}
    return PromptSettings.of_config(read_prompt_config(folder) | own | cleaning)


def _warn_of_sizes(folder: Path, requests: list[Request]) -> None:
    """Warn if frames are not of the size in the model's generate.json, if it has one."""
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
    """The model's calibration, if any video needs it."""
    if not any(request.step_cache for request in requests):
        return None
    if folder is None:
        raise ValueError("--step-cache needs a model folder (--model) calibrated with `osp calibrate`")
    from opensoraplan.runtime.step_cache import Calibration

    return Calibration.of(folder)
