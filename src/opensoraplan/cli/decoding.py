"""`osp decode` and `osp calibrate`: options, and checks before a model is loaded."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from opensoraplan.cli.options import Dtype, OptionalDevice, optional
from opensoraplan.cli.parts import check_model
from opensoraplan.defaults import STEP_CACHE_FILE, GenerateDefaults
from opensoraplan.disk import make_folder
from opensoraplan.fingerprint import fingerprint_weights
from opensoraplan.requests import Request

logger = logging.getLogger(__name__)


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


def calibrate(options: Calibrate) -> None:
    """`osp calibrate`."""
    from opensoraplan import builtin
    from opensoraplan.generate import job

    folder = options.model or builtin.folder()
    check_model(folder)
    out = options.out or folder / STEP_CACHE_FILE
    if out.exists():
        raise ValueError(f"{out} exists already: delete it, or give another file with --out")
    usual = {"frames": 57, "height": 288, "width": 512, "steps": 50, "guidance": 8.0}
    usual |= GenerateDefaults.of(folder).model_dump(include=set(usual), exclude_none=True)
    asked = {name: getattr(options, name) for name in usual}
    settings = {**usual, **{name: value for name, value in asked.items() if value is not None}}
    request = Request.read({"prompt": options.prompt, **settings}, where="the options")
    if request.steps < 2:
        raise ValueError(f"--steps must be at least 2, got {request.steps}")
    request = request.model_copy(update={"batched_guidance": True})

    job.check_folder(out.parent, out.name)

    from opensoraplan.generate.session import Session, SessionOptions
    from opensoraplan.runtime import step_cache

    how = SessionOptions(model=folder, device=options.device, dtype=options.dtype)
    with Session.open(how, request) as session:
        session.check(request)

        def measure(_again: bool) -> tuple[float, ...]:
            with step_cache.measure_ratios(session.pipeline.transformer) as ratios:
                session.denoise(request)
            return tuple(ratios)

        ratios = session.attempt(request, measure)
        found = step_cache.Calibration(ratios=ratios, transformer=session.fingerprints["transformer"])
    with make_folder(out.parent):
        found.write(out)
    logger.info("wrote %s: osp generate ... --step-cache 0.06", out)


def decode(options: Decode) -> None:
    """`osp decode`."""
    from opensoraplan.generate import saved

    record, step = saved.read_record(options.latents)
    model = record["model"]
    path = options.vae or Path(model["vae"] if isinstance(model, dict) else model)
    if not path.exists():
        raise FileNotFoundError(f"{path}, the model of the latents, does not exist: give its VAE with --vae")
    if step < record["steps"]:
        logger.warning("only %d of %d steps are done: the video will be noisy", step, record["steps"])
    if options.vae is None:
        _check_vae(record, path)
    stem = options.latents.name.removesuffix(saved.SUFFIX)
    default = options.latents.with_name(stem + (".png" if record["frames"] == 1 else ".mp4"))

    from opensoraplan.device import (
        DTYPES,
        dtype_name,
        explain_full_memory,
        prepare,
        resolve_device,
        resolve_dtype,
    )
    from opensoraplan.formats.assemble import load_vae
    from opensoraplan.generate import job
    from opensoraplan.pipeline import OpenSoraPlanPipeline
    from opensoraplan.runtime.placement import fit_decoding
    from opensoraplan.samplers import make_scheduler

    found = saved.read(options.latents)
    values = {name: record[name] for name in ("prompt", "frames", "height", "width", "fps", "seed")}
    request = Request.read(values, where=str(options.latents), context=found.strides)
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
    channels, frames, height, width = found.latents.shape[1:]
    if channels != vae.latent_channels:
        raise ValueError(
            f"{options.latents} has latents of {channels} channels, the VAE in {path} decodes "
            f"{vae.latent_channels}"
        )
    if found.strides != vae.strides:
        raise ValueError(
            f"{options.latents} has latents of {found.strides} pixels, the VAE in {path} decodes those of "
            f"{vae.strides}"
        )
    fit_decoding(vae, [(frames, height, width)], device)
    vae.register_to_config(**{key: value for key, value in found.scaling.items() if key in vae.config})
    record |= {"vae_dtype": dtype_name(vae.dtype), "vae_tiling": vae.tiling}
    full = "the frames do not fit into memory: --tiling needs less, but is not exact"
    with explain_full_memory(full), make_folder(wanted.parent):
        written = job.write_frames(pipeline, found.latents, wanted, record, fps=record["fps"])
    logger.info("wrote %s", written)


def _check_vae(record: dict[str, Any], path: Path) -> None:
    """Warn if the VAE at this path is not the one of the model that made the latents."""
    made_by = record.get("fingerprint")
    component = path if isinstance(record["model"], dict) else path / "vae"
    if isinstance(made_by, dict) and made_by.get("vae") != fingerprint_weights(component):
        said = "%s is not the VAE of the model that made the latents: give that one with --vae"
        logger.warning(said, component)
