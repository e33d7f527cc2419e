"""`osp convert`, `reconstruct` and `inspect`: options, and checks before work starts."""

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional

from opensoraplan.cli.options import Dtype, OptionalDevice, OptionalPath, check_exists, optional
from opensoraplan.cli.parts import (
    NO_PARTS,
    Parts,
    check_model,
    find_paths,
    make_sources,
    options_of_parts,
)
from opensoraplan.documents import check_file

if TYPE_CHECKING:
    from opensoraplan.formats.mindspeed.inference import Inference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Convert:
    """Convert the original's checkpoints to a diffusers model folder, or a model folder back to
    the original's formats.

    To diffusers: --transformer, --vae, --text-encoder and --text-encoder-2, or --config. Back: --model FOLDER
    with --to megatron (and --tp) or --to release. --transformer alone, with one of these, merges the shards
    of a denoiser or splits them for another --tp. --lora FILE with --to lora-comfy, for example, writes
    a LoRA with the names of another tool. If a tensor is missing or unknown, nothing is written.
    """

    out: Path
    """Folder to write, new or empty. With --transformer alone and --to release also a file, for example
    model.pt; a LoRA is a .safetensors file, but for lora-peft.
    """
    to: Literal["diffusers", "megatron", "release", "lora", "lora-comfy", "lora-kohya", "lora-peft"] = (
        "diffusers"
    )
    """Format: a diffusers folder, Megatron shards, the release's files; or a LoRA with the names of
    diffusers, ComfyUI or kohya, or a folder of PEFT.
    """
    model: OptionalPath = None
    """Model folder to convert back to the original's formats; with --lora, the model that the LoRA
    is for, if that is neither the released nor the built-in one.
    """
    lora: OptionalPath = None
    """LoRA or DoRA to convert: a file of any of these tools, or a folder of PEFT."""
    config: OptionalPath = None
    """The guide's inference JSON, for paths and architecture."""
    parts: OmitArgPrefixes[Parts] = NO_PARTS
    tp: int = 1
    """Tensor-parallel size of the Megatron shards."""
    dtype: Annotated[
        Dtype | None, optional("bf16|fp16|fp32", "(default: each tensor's; text encoders fp32)")
    ] = None
    """Precision to write."""


@dataclass(frozen=True)
class Reconstruct:
    """Encode and decode a real video with the VAE, print PSNR and SSIM, and write both side by side."""

    video: Positional[Path]
    """Video or picture file."""
    vae: Path
    """VAE: the release's .ckpt, a diffusers component, or a model folder."""
    out: Annotated[Path | None, optional("PATH", "(default: NAME_reconstruction.mp4)")] = None
    """File to write: the video on the left, its reconstruction on the right."""
    frames: Annotated[int | None, optional("INT", "(default: as many as there are)")] = None
    """Number of frames, 8k + 1."""
    height: Annotated[int | None, optional("INT", "(default: the video's, rounded down)")] = None
    """Height in pixels, a multiple of 8."""
    width: Annotated[int | None, optional("INT", "(default: the video's, rounded down)")] = None
    """Width in pixels, a multiple of 8."""
    fps: Annotated[float | None, optional("FLOAT", "(default: the video's)")] = None
    """Resample to this frame rate first."""
    device: OptionalDevice = None
    """Device to run on: cpu, cuda, cuda:1, npu, ..."""
    dtype: Dtype = "fp32"
    """Precision to compute in."""
    tiling: bool = False
    """Work in blended tiles. Needs less memory for large frames, not exact."""


@dataclass(frozen=True)
class Inspect:
    """Describe a checkpoint: format, precision, parameters, EMA, tensor-parallel size, and the config
    that it matches. Of a LoRA: format, rank, alpha, layers, and which model it fits.
    """

    path: Positional[Path]
    """A checkpoint file, a folder of shards, a diffusers component, a model folder, or a LoRA."""
    model: OptionalPath = None
    """Of a LoRA: the model that it is for, if that is neither the released nor the built-in one."""


def convert(options: Convert, inference: "Inference | None") -> None:
    """`osp convert`."""
    if options.lora is not None or options.to.startswith("lora"):
        _convert_lora(options, inference)
        return
    if options.to == "diffusers":
        if options.model is not None:
            raise ValueError(
                f"{options.model} is already a diffusers folder: use --to megatron or --to release"
            )
        if options.tp != 1:
            raise ValueError(f"--tp {options.tp} goes with --to megatron")
        sources = make_sources(find_paths(options.parts, inference), options.parts, inference)

        from opensoraplan.device import DTYPES
        from opensoraplan.formats.assemble import save_diffusers

        save_diffusers(
            sources,
            options.out,
            dtype=DTYPES[options.dtype] if options.dtype else None,
            scheduler=inference.scheduler if inference else {},
            max_text_tokens=inference.max_text_tokens if inference else 512,
        )
        return
    if options.dtype is not None:
        raise ValueError("--dtype goes with --to diffusers; other formats keep the precision of every tensor")
    if options.to == "release" and options.tp != 1:
        raise ValueError(f"--tp {options.tp} goes with --to megatron; the release has no shards")
    if options.model is None:
        _convert_denoiser(options, inference)
        return
    if given := options_of_parts(options.parts, inference):
        raise ValueError(f"--to {options.to} writes what is in --model: leave out {', '.join(given)}")
    if options.to == "release":
        check_model(options.model)
    check_exists(options.model)

    from opensoraplan.formats.assemble import export_denoiser, export_release

    if options.to == "megatron":
        export_denoiser(options.model, options.out, tensor_parallel=options.tp)
    else:
        export_release(options.model, options.out)


def _convert_lora(options: Convert, inference: "Inference | None") -> None:
    if options.lora is None or not options.to.startswith("lora"):
        raise ValueError("--lora FILE goes with --to lora, lora-comfy, lora-kohya or lora-peft")
    given = options_of_parts(options.parts, inference) + ["--tp"] * (options.tp != 1)
    if given:
        raise ValueError(f"--to {options.to} writes what is in --lora: leave out {', '.join(given)}")
    check_exists(options.lora)
    if options.model is not None:
        check_exists(options.model)

    from opensoraplan.device import DTYPES
    from opensoraplan.formats.lora import LORA_FORMATS, check_lora_path, load_lora, write_lora

    kind = next(kind for kind in LORA_FORMATS if kind == (options.to.partition("-")[2] or "diffusers"))
    check_lora_path(options.out, kind)
    lora, _ = load_lora(options.lora, options.model)
    write_lora(lora, options.out, kind=kind, dtype=DTYPES[options.dtype] if options.dtype else None)


def _convert_denoiser(options: Convert, inference: "Inference | None") -> None:
    """Merge the shards of a denoiser, or split it into another number of shards."""
    parts = options.parts
    if parts.transformer is None:
        raise ValueError(
            f"--to {options.to} needs --model, a diffusers folder, or --transformer, a denoiser's checkpoint"
        )
    others = replace(parts, transformer=None, ema=None)
    if given := options_of_parts(others, inference):
        raise ValueError(f"--to {options.to} writes what is in --transformer: leave out {', '.join(given)}")
    check_exists(parts.transformer)

    from opensoraplan.formats.assemble import export_denoiser, merge_denoiser

    # As in the original's script, EMA weights only on request.
    ema = bool(parts.ema)
    if options.to == "megatron":
        export_denoiser(parts.transformer, options.out, tensor_parallel=options.tp, ema=ema)
    else:
        merge_denoiser(parts.transformer, options.out, ema=ema)


def reconstruct(options: Reconstruct) -> None:
    """`osp reconstruct`."""
    check_exists(options.video)
    check_exists(options.vae)
    check_file(options.video)

    from tqdm import tqdm

    from opensoraplan.device import prepare, resolve_device, resolve_dtype
    from opensoraplan.formats.assemble import load_vae
    from opensoraplan.generate import reconstruct as job

    device = resolve_device(options.device)
    prepare(device)
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
        excerpt=job.Excerpt(options.frames, options.height, options.width, options.fps),
        progress=show,
    )


def inspect(options: Inspect) -> None:
    """`osp inspect`."""
    check_exists(options.path)
    if options.model is not None:
        check_exists(options.model)
    whole = (options.path / "model_index.json").is_file()
    paths = [options.path / part for part in ("transformer", "vae")] if whole else [options.path]

    from opensoraplan.formats.describe import describe

    sys.stdout.write("\n\n".join(describe(path, base=options.model) for path in paths) + "\n")
