"""`osp generate`, `convert`, `reconstruct` and `inspect`: options, and what is checked before the job
begins.
"""

import argparse
import json
import logging
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from tyro.conf import OmitArgPrefixes, Positional

from opensoraplan.cli.options import Dtype, OptionalDevice, OptionalPath, check_exists, optional
from opensoraplan.shapes import SPATIAL_STRIDE

if TYPE_CHECKING:
    import torch

    from opensoraplan.convert.assemble import Sources
    from opensoraplan.convert.mindspeed_json import Inference
    from opensoraplan.pipeline import OpenSoraPlanPipeline

logger = logging.getLogger(__name__)

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class Parts:
    """Each instead of what --config says."""

    transformer: OptionalPath = None
    """Denoiser: a release pickle, a folder of Megatron shards, or a diffusers component."""
    vae: OptionalPath = None
    """VAE: the release's .ckpt or a diffusers component."""
    text_encoder: OptionalPath = None
    """Folder of T5 v1.1-XL."""
    text_encoder_2: OptionalPath = None
    """Folder of CLIP ViT-bigG-14."""
    tokenizer: OptionalPath = None
    """Folder of T5's tokenizer, if it is not the text encoder's."""
    tokenizer_2: OptionalPath = None
    """Folder of CLIP's tokenizer, if it is not the text encoder's."""
    ema: Annotated[bool | None, optional("True|False", "(default: EMA where there is one)")] = None
    """Which weights to take of a checkpoint that has both."""
    sparse_n: Annotated[tuple[int, ...] | None, optional("N ...")] = None
    """Skiparse rates, one a stage, where neither --config nor the release's shape tells them."""
    set: Annotated[tuple[str, ...], optional("KEY=VALUE ...")] = ()
    """Other values in --config, for example predictor.num_heads=4. After the prompt."""


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
    parts: OmitArgPrefixes[Parts] = Parts()
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
    shift: Annotated[float | None, optional("FLOAT", "(default: the model's, 7)")] = None
    """Of the schedule; more spends more steps on noise."""
    dynamic_shift: Annotated[bool | None, optional("True|False", "(default: the model's, False)")] = None
    """Tell the shift from the size of the picture instead."""
    linear_quadratic: bool = False
    """Use the linear-quadratic schedule, which has no shift."""
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
    prompt_template: Annotated[str | None, optional("TEXT", "(default: the model's, 'high quality, {}')")] = (
        None
    )
    """What is put around a prompt; {} is where it goes, and alone is nothing."""
    default_negative_prompt: Annotated[str | None, optional("TEXT", "(default: the model's)")] = None
    """Instead of the model's long one; '' is none."""
    clean_prompts: bool = True
    """Clean prompts as the training captions were."""
    tiling: bool = False
    """Decode in blended tiles: less memory for large frames, not exact."""
    sharing: OmitArgPrefixes[Sharing] = Sharing()


@dataclass(frozen=True)
class Convert:
    """Turn the original's files into a diffusers folder, or such a folder back into the original's.

    To diffusers: --transformer, --vae, --text-encoder and --text-encoder-2, or --config. Back: --model FOLDER
    and --to megatron (with --tp) or --to release. Every tensor is accounted for, or nothing is written.
    """

    out: Path
    """The folder to write; it must be new or empty."""
    to: Literal["diffusers", "megatron", "release"] = "diffusers"
    """What to write."""
    model: OptionalPath = None
    """A diffusers folder, to convert back."""
    config: OptionalPath = None
    """The guide's inference JSON, for paths and architecture."""
    parts: OmitArgPrefixes[Parts] = Parts()
    tp: int = 1
    """Tensor-parallel size of the Megatron shards."""
    dtype: Annotated[
        Dtype | None, optional("bf16|fp16|fp32", "(default: each tensor's; text encoders fp32)")
    ] = None
    """Precision to write."""


@dataclass(frozen=True)
class Reconstruct:
    """Send a real video through the VAE and back; print PSNR and SSIM, write both side by side."""

    video: Positional[Path]
    """Any file that ffmpeg reads."""
    vae: Path
    """The release's .ckpt, a diffusers component, or a folder that `osp convert` wrote."""
    out: Annotated[Path | None, optional("PATH", "(default: NAME_reconstruction.mp4)")] = None
    """The mp4 to write: the video left, its reconstruction right."""
    frames: Annotated[int | None, optional("INT", "(default: as many as there are)")] = None
    """8k + 1."""
    height: Annotated[int | None, optional("INT", "(default: the video's, rounded down)")] = None
    """Pixels, a multiple of 8."""
    width: Annotated[int | None, optional("INT", "(default: the video's, rounded down)")] = None
    """Pixels, a multiple of 8."""
    fps: Annotated[float | None, optional("FLOAT", "(default: the video's)")] = None
    """Resample to this rate first."""
    device: OptionalDevice = None
    """cpu, cuda, cuda:1, npu, ..."""
    dtype: Dtype = "fp32"
    """Precision to compute in."""
    tiling: bool = False
    """Work in blended tiles: less memory for large frames, not exact."""


@dataclass(frozen=True)
class Inspect:
    """Say what a checkpoint is: dialect, precision, parameters, EMA, tensor-parallel size, the config it
    matches.
    """

    path: Positional[Path]
    """A file, a folder of shards, a diffusers component, or a folder that `osp convert` wrote."""


# Options of `Generate` that are fields of a request; the rest say what makes it.
REQUEST_OPTIONS = (
    "negative_prompt", "frames", "height", "width", "fps", "steps", "guidance", "guidance_rescale",
    "guidance_interval", "batched_guidance", "shift", "dynamic_shift", "linear_quadratic", "seed",
)  # fmt: skip


def generate(options: Generate, inference: "Inference | None") -> None:
    """`osp generate`: everything that can be wrong is checked before the model is loaded."""
    from opensoraplan import generate as job

    if not options.prompt.strip():
        raise ValueError('give a prompt or a file of prompts: osp generate "a cat on a beach" --model FOLDER')
    settings = {name: getattr(options, name) for name in REQUEST_OPTIONS}
    if options.sharing.branch_ranks > 1:
        settings["batched_guidance"] = True  # what the ranks share out
    requests = job.read_requests(options.prompt, settings, copies=options.videos_per_prompt)
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
    targets = job.check_targets(requests, options.out)

    from opensoraplan.device import resolve_device
    from opensoraplan.parallel.generating import generating_mesh, share_generating
    from opensoraplan.parallel.ranks import device_of_rank, joined

    device = device_of_rank(resolve_device(options.device))
    mesh = generating_mesh(branches=options.sharing.branch_ranks, tp=options.sharing.tp)
    resume = job.is_prompt_file(options.prompt) or len(requests) > 1
    with joined(mesh, device) as ranks:
        pipeline, model = _load_pipeline(options, inference, paths, folder=folder, device=device)
        all_decode = False
        if ranks.mesh is not None:
            rows = {request.height // SPATIAL_STRIDE for request in requests}
            all_decode = share_generating(pipeline.transformer, pipeline.vae, ranks.mesh, rows=rows)
        pipeline.set_progress_bar_config(desc="denoising", unit="step", disable=not ranks.first)
        job.run(pipeline, requests, targets, model=model, resume=resume, ranks=ranks, all_decode=all_decode)


def _load_pipeline(
    options: Generate,
    inference: "Inference | None",
    paths: dict[str, Path],
    *,
    folder: Path | None,
    device: "torch.device",
) -> "tuple[OpenSoraPlanPipeline, str | dict[str, Any]]":
    """The pipeline of these parts, or of a whole `folder`, and what its videos say of where it came from."""
    from opensoraplan.convert import assemble
    from opensoraplan.device import resolve_dtype
    from opensoraplan.models.text import PromptSettings
    from opensoraplan.pipeline import OpenSoraPlanPipeline

    dtype = resolve_dtype(options.dtype, device)
    prompts: dict[str, Any] = {} if options.clean_prompts else {"clean_prompts": False}
    if options.prompt_template is not None:
        prompts["prompt_template"] = PromptSettings(template=options.prompt_template).template
    if options.default_negative_prompt is not None:
        prompts["default_negative_prompt"] = options.default_negative_prompt

    origin = folder or paths["transformer"]
    logger.info("loading %s, %s on %s", origin, str(dtype).removeprefix("torch."), device)
    pipeline = assemble.load_pipeline(
        make_sources(paths, options.parts, inference),
        dtype=dtype,
        device=device,
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


def convert(options: Convert, inference: "Inference | None") -> None:
    """`osp convert`."""
    if options.to == "diffusers":
        if options.model is not None:
            raise ValueError(
                f"{options.model} is a diffusers folder already: give --to megatron or --to release"
            )
        if options.tp != 1:
            raise ValueError(f"--tp {options.tp} goes with --to megatron")
        sources = make_sources(find_paths(options.parts, inference), options.parts, inference)

        from opensoraplan.convert.assemble import save_diffusers
        from opensoraplan.device import DTYPES

        save_diffusers(
            sources,
            options.out,
            dtype=DTYPES[options.dtype] if options.dtype else None,
            scheduler=inference.scheduler if inference else {},
            max_text_tokens=inference.max_text_tokens if inference else 512,
        )
        return
    if options.model is None:
        raise ValueError(f"--to {options.to} needs --model, a diffusers folder")
    if given := options_of_parts(options.parts, inference):
        raise ValueError(f"--to {options.to} writes what is in --model: leave out {', '.join(given)}")
    if options.dtype is not None:
        raise ValueError("--dtype goes with --to diffusers; the way back keeps every tensor as it is")
    if options.to == "release" and options.tp != 1:
        raise ValueError(f"--tp {options.tp} goes with --to megatron; the release is in one piece")
    if options.to == "release":
        check_model(options.model)
    check_exists(options.model)

    from opensoraplan.convert.assemble import export_denoiser, export_release

    if options.to == "megatron":
        export_denoiser(options.model, options.out, tensor_parallel=options.tp)
    else:
        export_release(options.model, options.out)


def reconstruct(options: Reconstruct) -> None:
    """`osp reconstruct`."""
    check_exists(options.video)
    check_exists(options.vae)

    from tqdm import tqdm

    from opensoraplan import reconstruct as job
    from opensoraplan.convert.assemble import load_vae
    from opensoraplan.device import resolve_device, resolve_dtype

    device = resolve_device(options.device)
    vae = load_vae(options.vae, dtype=resolve_dtype(options.dtype, device), device=device)
    if options.tiling:
        vae.enable_tiling()
    bars: dict[str, tqdm] = {}

    def show(step: str, done: int, total: int) -> None:
        if step not in bars:
            bars[step] = tqdm(total=total, desc=step, unit="frame")
        bars[step].update(done - bars[step].n)
        if done == total:
            bars[step].close()

    job.reconstruct(
        options.video,
        vae=vae,
        out=options.out or Path(f"{options.video.stem}_reconstruction.mp4"),
        frames=options.frames,
        height=options.height,
        width=options.width,
        fps=options.fps,
        progress=show,
    )


def inspect(options: Inspect) -> None:
    """`osp inspect`."""
    check_exists(options.path)
    whole = (options.path / "model_index.json").is_file()
    paths = [options.path / part for part in ("transformer", "vae")] if whole else [options.path]

    from opensoraplan.convert.describe import describe

    sys.stdout.write("\n\n".join(describe(path) for path in paths) + "\n")


def read_config(arguments: list[str]) -> "Inference | None":
    """The config that --config names, read before all else: its values become the defaults of the other
    options.
    """
    if arguments[:1] not in (["generate"], ["convert"]):
        return None
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    finder.add_argument("--set", nargs="*", action="extend", default=[])
    found, _ = finder.parse_known_args(arguments)
    if found.config is None:
        if found.set:
            raise ValueError("--set changes values of --config, which is not given")
        return None
    if not found.config.is_file():
        raise FileNotFoundError(f"the config {found.config} does not exist")
    for change in found.set:
        if "=" not in change:
            raise ValueError(f"--set takes KEY=VALUE, got {change!r} (a prompt comes before --set)")

    from opensoraplan.convert.mindspeed_json import read_inference

    inference = read_inference(found.config, changes=found.set)
    if (dtype := inference.generate["dtype"]) not in get_args(Dtype):
        known = ", ".join(get_args(Dtype))
        raise ValueError(f"{found.config}: weight_dtype {dtype!r} is not one of {known}")
    return inference


def read_defaults(arguments: list[str], inference: "Inference | None") -> dict[str, Any]:
    """Defaults of `osp generate` that go with the model: those of --config, or those that a folder keeps in
    generate.json (`osp export` writes it); without any model those of the built-in one.
    """
    if inference is not None:
        return inference.generate
    if arguments[:1] != ["generate"]:
        return {}
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--model", type=Path)
    for name in PARTS:
        finder.add_argument(f"--{name.replace('_', '-')}", dest="parts", action="append")
    found, _ = finder.parse_known_args(arguments)
    if found.model is None and found.parts:
        return {}

    from opensoraplan import builtin
    from opensoraplan.defaults import GenerateDefaults

    return GenerateDefaults.of(found.model or builtin.folder()).model_dump(exclude_none=True)


def options_of_parts(parts: Parts, inference: "Inference | None") -> list[str]:
    """The options given that say where the parts of a model are, as they are written."""
    names = [field.name for field in fields(parts) if getattr(parts, field.name) != field.default]
    return (["--config"] if inference else []) + [f"--{name.replace('_', '-')}" for name in names]


def find_paths(parts: Parts, inference: "Inference | None") -> dict[str, Path]:
    """The files of a model's parts: those given one by one, before those of the config. ValueError for what
    nobody gives, FileNotFoundError for what is not there.
    """
    paths = dict(inference.sources) if inference else {}
    for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        given = getattr(parts, encoder)
        if given is not None:
            paths[tokenizer] = given
    paths |= {name: path for name in PARTS if (path := getattr(parts, name)) is not None}
    missing = [f"--{name.replace('_', '-')}" for name in PARTS if name not in paths]
    if missing:
        raise ValueError(f"these parts of the model are not given: {', '.join(missing)}")
    check_parts(paths)
    return paths


def check_parts(paths: dict[str, Path]) -> None:
    absent = [f"{name} {path}" for name, path in paths.items() if not path.exists()]
    if absent:
        raise FileNotFoundError(f"these parts of the model do not exist: {', '.join(absent)}")


def make_sources(paths: dict[str, Path], parts: Parts, inference: "Inference | None") -> "Sources":
    from opensoraplan.convert.assemble import Sources

    return Sources(
        **paths,
        transformer_config=inference.transformer_config if inference else None,
        vae_config=inference.vae_config if inference else None,
        sparse_n=parts.sparse_n,
        ema=parts.ema,
    )


def check_model(path: Path) -> None:
    """FileNotFoundError or ValueError unless this is a folder that `osp convert` wrote."""
    check_exists(path)
    index = path / "model_index.json"
    if not index.is_file():
        hint = "it has no model_index.json"
        if path.is_file():
            hint = "it is a file; turn the original's files into one with `osp convert`"
        elif (path.parent / index.name).is_file():
            hint = f"it is a part of one, {path.parent}"
        raise ValueError(f"{path} is not a folder that `osp convert` wrote: {hint}")
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index} is damaged: it does not say which pipeline it is of") from None
    if kind != "OpenSoraPlanPipeline":
        raise ValueError(f"{path} is a {kind}, not an OpenSoraPlanPipeline")
