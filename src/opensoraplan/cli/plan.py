"""`osp plan`: what a run needs of how many devices."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from opensoraplan.cli.options import Changes, Dtype, check_exists, optional
from opensoraplan.defaults import WeightPrecision

if TYPE_CHECKING:
    from opensoraplan.models.sizes import BatchShape, DenoiserSizes
    from opensoraplan.parallel.mesh import MeshSettings
    from opensoraplan.plan.memory import Encoding
    from opensoraplan.plan.report import FrozenParts
    from opensoraplan.plan.step import TrainingOptions
    from opensoraplan.train.config import TrainSettings

# Of any number that is given; the bounds of a video are those of osp generate.
_MOST = 10**9

Ema = Literal["same", "cpu", "none"]
OptionalInt = Annotated[int | None, optional("INT", "(default: the run's, else 1)")]


@dataclass(frozen=True)
class PlanMesh:
    """Device mesh. Default: the run's, or a suggestion with --memory."""

    devices: Annotated[int | None, optional("INT", "(default: the product of the sizes)")] = None
    """Number of devices."""
    dp_replicate: OptionalInt = None
    """Data-parallel groups that each hold all weights."""
    dp_shard: Annotated[int | None, optional("INT", "(default: what the others leave)")] = None
    """Data-parallel devices that share the weights (FSDP)."""
    sp: OptionalInt = None
    """Sequence-parallel size: devices that share the tokens of a sample."""
    tp: OptionalInt = None
    """Tensor-parallel size: devices that share the layers."""


@dataclass(frozen=True)
class PlanJob:
    """Training settings. Default: the run's."""

    batch: OptionalInt = None
    """Samples of a micro-batch."""
    accumulate: OptionalInt = None
    """Micro-batches per step (gradient accumulation)."""
    recompute_blocks: Annotated[int | None, optional("INT", "(default: the run's, else 0)")] = None
    """Blocks that are recomputed in the backward pass."""
    recompute_feed_forwards: Annotated[int | None, optional("INT", "(default: the run's, else 0)")] = None
    """Blocks whose feed-forwards are recomputed in the backward pass."""
    keep_attention: Annotated[bool | None, optional("True|False", "(default: the run's)")] = None
    """Keep the output of attention in recomputed blocks."""
    ema: Annotated[Ema | None, optional("same|cpu|none", "(default: the run's)")] = None
    """Where the EMA weights are kept."""
    cpu_offload: Annotated[bool | None, optional("True|False", "(default: the run's)")] = None
    """Keep weight shards, gradients and optimizer state in host memory."""
    compute: Annotated[Literal["bf16", "fp32"] | None, optional("bf16|fp32", "(default: the run's)")] = None
    """Precision of the forward and backward pass."""
    master: Annotated[Literal["bf16", "fp32"] | None, optional("bf16|fp32", "(default: the run's)")] = None
    """Precision of the weights that the optimizer updates."""
    encoders: Annotated[bool | None, optional("True|False", "(default: unless the run has features)")] = None
    """Whether the VAE and the text encoders are on the device, too."""


@dataclass(frozen=True)
class Plan:
    """Predict the memory, FLOPs and time of a training step, or of generating a video. Nothing is run.

    With --memory, also the cheapest arrangement of devices that fits. The figures come from formulas;
    benchmarks/plan_accuracy.py measures how accurate they are.
    """

    model: Annotated[Positional[Path | None], optional("RUN.toml|MODEL", "(default: the release)")] = None
    """A run's settings, a checkpoint, a model folder, or a config.json."""
    set: Annotated[Changes, optional("KEY=VALUE ...")] = ()
    """Change settings of the run."""
    frames: Annotated[int | None, optional("INT", "(default: the run's, else 121)")] = None
    """Number of frames, 8k + 1."""
    height: Annotated[int | None, optional("INT", "(default: the run's, else 576)")] = None
    """Height in pixels, a multiple of 16."""
    width: Annotated[int | None, optional("INT", "(default: the run's, else 1024)")] = None
    """Width in pixels, a multiple of 16."""
    text_tokens: Annotated[int | None, optional("INT", "(default: the run's most, else 512)")] = None
    """Text tokens of the longest caption in a batch."""
    mesh: OmitArgPrefixes[PlanMesh] = PlanMesh()
    job: OmitArgPrefixes[PlanJob] = PlanJob()
    memory: Annotated[float | None, optional("GB")] = None
    """Memory of each device in GB; 8% of it is kept in reserve. Also suggests the cheapest mesh that fits."""
    machine: int = 8
    """Devices per machine. Tensor parallelism stays within one machine."""
    tflops: Annotated[float | None, optional("FLOAT")] = None
    """TFLOP/s that one device achieves, as shown in the training log. Also predicts times."""
    samples: Annotated[int | None, optional("INT")] = None
    """Samples per epoch, to predict its time and the size of the feature cache."""
    generate: bool = False
    """Predict the needs of generating one video on one device instead."""
    weights: WeightPrecision = "whole"
    """With --generate: precision in which the denoiser's weights are stored."""
    vae_dtype: Annotated[Dtype | None, optional("{bf16,fp16,fp32}", "(default: that of --compute)")] = None
    """With --generate: precision of the VAE."""


def plan(options: Plan) -> None:
    """`osp plan`."""
    from opensoraplan.models.sizes import BatchShape
    from opensoraplan.plan.mesh_search import cheapest_mesh
    from opensoraplan.plan.report import (
        GB,
        Known,
        Precisions,
        fitting_lines,
        generation_lines,
        training_lines,
    )
    from opensoraplan.plan.step import ONE_DEVICE, TrainingStep
    from opensoraplan.runtime.placement import MARGIN
    from opensoraplan.shapes import latent_shape
    from opensoraplan.train.learner.fitting import possible_fits
    from opensoraplan.train.run.planning import largest_sample

    sizes = ("frames", "height", "width", "text_tokens")
    _check_positive(options, "memory", "tflops", "samples", "machine", *sizes)
    _check_positive(options.mesh, "devices")
    _check_positive(options.job, "batch", "accumulate")
    run = _run_of(options)
    frames, height, width = (121, 576, 1024) if run is None else largest_sample(run)
    frames, height, width = options.frames or frames, options.height or height, options.width or width
    text = options.text_tokens or (run.text.max_tokens if run else 512)
    grid = latent_shape(frames, height, width)
    model = _model_of(options, run)
    described = f"{frames} x {height} x {width}, {text} text tokens"
    if run is not None and run.conditions.first_last:
        grid = (grid[0] + 1, *grid[1:])
        described += ", the last frame once more"
    shape = BatchShape(grid, text, batch=options.job.batch or 1)
    known = Known(options.memory, options.tflops, options.samples)
    if options.generate:
        compute = options.job.compute or "bf16"
        if options.weights == "fp8" and compute != "bf16":
            raise ValueError(f"--weights fp8 goes with --compute bf16, got {compute}")
        precisions = Precisions(compute, options.vae_dtype or compute, options.weights)
        parts = _frozen_parts(options, run)
        _write(generation_lines(model, parts, shape, known, precisions=precisions, described=described))
        return
    if options.weights != "whole":
        raise ValueError(f"--weights {options.weights} is for --generate: training needs the weights whole")
    if options.vae_dtype is not None:
        raise ValueError(f"--vae-dtype {options.vae_dtype} is for --generate: set vae.compute of the run")
    if options.job.batch is None and run is not None:
        shape = replace(shape, batch=run.data.batch_size)
    mesh, encoding = _mesh_of(options, run), _encoding_of(options, run, shape)
    step = TrainingStep(model, shape, mesh or ONE_DEVICE, _training_options(options.job, run, model))
    if run is not None and run.memory.placement == "auto":
        _check_left_to_auto(options)
        fits = possible_fits(run, step, device=None, encoding=encoding)
        _write(fitting_lines(fits, known, described=described))
        return
    if mesh is None and options.memory is not None and not step.needs_one_device:
        memory = int(options.memory * GB * (1 - MARGIN))
        others = 0 if encoding is None or encoding.in_turn else encoding.weights
        mesh = cheapest_mesh(step, memory=memory, machine=options.machine, others=others)
        step, described = replace(step, mesh=mesh), f"{described}; the cheapest mesh that fits"
    _write(training_lines(step, known, encoding=encoding, described=described))


def _check_left_to_auto(options: Plan) -> None:
    """Raise ValueError for options that memory.placement "auto" takes from nobody."""
    names = [name for name, size in vars(options.mesh).items() if size not in (None, 1)]
    if names:
        raise ValueError(
            f'--{names[0].replace("_", "-")} has no effect: memory.placement "auto" is for one device'
        )
    for name in ("recompute_blocks", "recompute_feed_forwards"):
        if getattr(options.job, name) is not None:
            shown = name.replace("_", "-")
            raise ValueError(f'--{shown} has no effect: memory.placement "auto" chooses what is recomputed')


def _run_of(options: Plan) -> "TrainSettings | None":
    from opensoraplan.train.run.files import read_run

    changes = [change for group in options.set for change in group]
    if options.model is not None and options.model.suffix == ".toml":
        return read_run(options.model, changes=changes)
    if changes:
        raise ValueError(f"--set {' '.join(changes)} goes with a run's .toml")
    return None


def _model_of(options: Plan, run: "TrainSettings | None") -> "DenoiserSizes":
    from opensoraplan.formats.assemble import denoiser_config
    from opensoraplan.models.sizes import DenoiserSizes
    from opensoraplan.train.run.planning import denoiser_sizes

    if run is not None:
        return denoiser_sizes(run)
    if options.model is None:
        return DenoiserSizes({})
    check_exists(options.model)
    return DenoiserSizes(denoiser_config(options.model))


def _training_options(
    given: PlanJob, run: "TrainSettings | None", model: "DenoiserSizes"
) -> "TrainingOptions":
    """The run's, or the defaults, with what is given on the command line in their place."""
    from opensoraplan.plan.step import TrainingOptions
    from opensoraplan.train.run.planning import training_options

    names = ("compute", "master", "accumulate", "keep_attention", "cpu_offload")
    changes: dict[str, Any] = {name: getattr(given, name) for name in names}
    changes = {name: value for name, value in changes.items() if value is not None}
    if given.ema is not None:
        changes["ema"] = {"same": "device", "cpu": "host", "none": None}[given.ema]
    recompute = ("recompute_blocks", "recompute_feed_forwards")
    if any(getattr(given, name) is not None for name in recompute):  # one excludes the other
        changes |= {name: getattr(given, name) or 0 for name in recompute}
    return replace(TrainingOptions() if run is None else training_options(run, model), **changes)


def _frozen_parts(options: Plan, run: "TrainSettings | None") -> "FrozenParts":
    """Those that the run or the model's folder has; for parts that are not there, the release's."""
    from opensoraplan.plan.report import FrozenParts
    from opensoraplan.train.config import TextSettings, VAESettings
    from opensoraplan.train.run.planning import frozen_parts

    if run is not None:
        return frozen_parts(run.vae, run.text)
    folder = options.model
    if folder is None or not (folder / "model_index.json").is_file():
        return FrozenParts()
    return frozen_parts(VAESettings(pretrained=folder), TextSettings(t5=folder, clip=folder))


def _encoding_of(options: Plan, run: "TrainSettings | None", shape: "BatchShape") -> "Encoding | None":
    """By what clips are encoded while training, if they are."""
    from opensoraplan.models.sizes import BYTES
    from opensoraplan.plan.memory import Encoding
    from opensoraplan.train.config import TextSettings, VAESettings
    from opensoraplan.train.run.planning import empty_vae_of, encodes_while_training

    wanted = options.job.encoders
    if wanted is None:
        wanted = run is not None and encodes_while_training(run)
    if not wanted:
        return None
    folder = options.model if options.model and (options.model / "model_index.json").is_file() else None
    vae, text = (run.vae, run.text) if run else (VAESettings(pretrained=folder), TextSettings())
    parts = _frozen_parts(options, run)
    return Encoding(
        parts.vae * BYTES[vae.compute],
        (parts.t5 * BYTES[text.compute], parts.clip * BYTES[text.compute]),
        empty_vae_of(vae).encoding_bytes(shape.grid),
        in_turn=run is not None and run.memory.encoders == "in-turn",
    )


def _mesh_of(options: Plan, run: "TrainSettings | None") -> "MeshSettings | None":
    """The mesh that is asked for, all of its sizes known; None: none is."""
    from opensoraplan.parallel.mesh import NAMES, MeshSettings

    given = {name: size for name in NAMES if (size := getattr(options.mesh, name)) is not None}
    own = {name: getattr(run.parallel, name) for name in NAMES} if run else {}
    if options.mesh.devices is None and not given and all(size in (1, -1) for size in own.values()):
        return None
    settings = MeshSettings.read({**own, **given}, where="the mesh")
    known = 1
    for size in settings.sizes().values():
        known *= max(size, 1)
    return settings.filled(options.mesh.devices or known)


def _write(lines: Iterable[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def _check_positive(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value <= _MOST:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0 and at most {_MOST:,}, got {value}")
