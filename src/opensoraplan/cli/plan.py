"""`osp plan` and `osp launch`: what a run needs of how many devices, and the line that starts it on them."""

import logging
import math
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from opensoraplan.cli.options import Changes, check_exists, optional
from opensoraplan.defaults import Weights

if TYPE_CHECKING:
    from opensoraplan.parallel.mesh import MeshSettings
    from opensoraplan.plan.estimate import Job, Model, Shape
    from opensoraplan.train.config import TrainSettings

logger = logging.getLogger(__name__)

GB = 1e9
_STEPS = 50  # of a video that is generated, as `osp generate` takes them

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
    weights: Weights = "whole"
    """With --generate: precision in which the denoiser's weights are stored."""


@dataclass(frozen=True)
class Launch:
    """Run a command in several processes with torchrun: osp launch --processes 8 -- train RUN.toml

    With several machines, run the same command on each with its --node-rank. See docs/clusters.md.
    """

    command: Annotated[Positional[tuple[str, ...]], optional("-- VERB ...", "(required)")]
    """A verb of osp and its options, after --."""
    processes: int
    """Processes per machine, one for each device."""
    nodes: int = 1
    """Number of machines."""
    node_rank: Annotated[int | None, optional("INT")] = None
    """Number of this machine, from 0."""
    master: Annotated[str | None, optional("HOST:PORT")] = None
    """Address and free port of the first machine."""
    max_restarts: int = 0
    """How often all processes are restarted after one dies. Use it with --resume latest."""
    print: bool = False
    """Only print the torchrun command."""


def hint(words: list[str]) -> str | None:
    """What was probably meant by words that `osp launch` does not know: a command without -- before it."""
    return "the command goes behind --: osp launch --processes 8 -- train RUN.toml" if words else None


# --- Plan ---------------------------------------------------------------------------------------------------


def plan(options: Plan) -> None:
    """`osp plan`."""
    from opensoraplan.plan.estimate import Shape, cheapest_mesh
    from opensoraplan.runtime.placement import MARGIN
    from opensoraplan.shapes import latent_shape

    sizes = ("frames", "height", "width", "text_tokens")
    _check_positive(options, "memory", "tflops", "samples", "machine", *sizes)
    _check_positive(options.mesh, "devices")
    _check_positive(options.job, "batch", "accumulate")
    run = _run_of(options)
    frames, height, width = (121, 576, 1024) if run is None else _largest_sample(run)
    frames, height, width = options.frames or frames, options.height or height, options.width or width
    text = options.text_tokens or (run.text.max_tokens if run else 512)
    shape = Shape(
        latent_shape(frames, height, width),
        text=text,
        batch=options.job.batch or (run.data.batch_size if run else 1),
    )
    model = _model_of(options, run)
    said = f"{frames} x {height} x {width}, {text} text tokens"
    if options.generate:
        one = replace(shape, batch=options.job.batch or 1)
        _write(_generation_lines(model, _frozen_parts(options, run), one, options, said=said))
        return
    if options.weights != "whole":
        raise ValueError(f"--weights {options.weights} is for --generate: training needs the weights whole")
    job = _job_of(options.job, run)
    encoders = _encoder_bytes(options, run)
    mesh = _mesh_of(options, run)
    if mesh is None and options.memory is not None:
        mesh = cheapest_mesh(
            model,
            shape,
            job,
            memory=int(options.memory * GB * (1 - MARGIN)),
            machine=options.machine,
            others=encoders,
        )
        said += "; the cheapest mesh that fits"
    _write(_training_lines(model, shape, mesh or _one_device(), job, options, encoders=encoders, said=said))


def _largest_sample(run: "TrainSettings") -> tuple[int, int, int]:
    """Frames, height and width of what the run is trained on at most."""
    from opensoraplan.train.inputs.sources import selection_of_run

    selection = selection_of_run(run.data) or run.data.selection
    return selection.sample_frames(selection.num_frames), *selection.largest_size


def _run_of(options: Plan) -> "TrainSettings | None":
    from opensoraplan.train.run.files import read_run

    changes = [change for group in options.set for change in group]
    if options.model is not None and options.model.suffix == ".toml":
        return read_run(options.model, changes=changes)
    if changes:
        raise ValueError(f"--set {' '.join(changes)} goes with a run's .toml")
    return None


def _model_of(options: Plan, run: "TrainSettings | None") -> "Model":
    from opensoraplan.plan.estimate import Model

    if run is None and options.model is None:
        return Model({})
    if run is None:
        assert options.model is not None
        return Model(_config_in(options.model))
    settings = run.model
    if settings.pretrained is not None and settings.pretrained.exists():
        config = _config_in(settings.pretrained, settings.config)
    else:  # planning comes before weights are there
        config = dict(settings.config or {})
        if settings.pretrained is not None:
            what = "of model.config" if config else "like the release"
            logger.warning(
                "model.pretrained %s does not exist: planned for a model %s", settings.pretrained, what
            )
    if settings.sparse_n is not None:
        config["sparse_n"] = list(settings.sparse_n)
    return Model(config)


def _config_in(path: Path, config: dict[str, object] | None = None) -> dict[str, Any]:
    """The config of a denoiser in a config.json, a model's or pipeline's folder, or any checkpoint."""
    from opensoraplan.documents import read_json_object
    from opensoraplan.formats.assemble import empty_denoiser
    from opensoraplan.formats.checkpoints import open_checkpoint
    from opensoraplan.models.strict import plain_config

    check_exists(path)
    for file in (path, path / "transformer" / "config.json", path / "config.json"):
        if file.is_file() and file.suffix == ".json":
            return {key: value for key, value in read_json_object(file).items() if not key.startswith("_")}
    return plain_config(empty_denoiser(open_checkpoint(path), config))


def _job_of(given: PlanJob, run: "TrainSettings | None") -> "Job":
    from opensoraplan.plan.estimate import Job

    optimizer = None if run is None else run.optimizer
    ema = given.ema or "same"
    if given.ema is None and optimizer is not None:
        ema = "none" if optimizer.ema_decay is None else optimizer.ema_device
    offload = given.cpu_offload
    if offload is None:
        offload = run.parallel.cpu_offload if run else False
    blocks, feed_forwards = given.recompute_blocks, given.recompute_feed_forwards
    if blocks is None and feed_forwards is None and run:
        blocks, feed_forwards = run.memory.recompute_blocks, run.memory.recompute_feed_forwards
    keep_attention = given.keep_attention
    if keep_attention is None:
        keep_attention = run.memory.keep_attention if run else False
    return Job(
        compute=given.compute or (run.model.compute if run else "bf16"),
        master=given.master or (run.model.master if run else "fp32"),
        accumulate=given.accumulate or (optimizer.accumulate if optimizer else 1),
        recompute_blocks=blocks or 0,
        recompute_feed_forwards=feed_forwards or 0,
        keep_attention=keep_attention,
        ema={"same": "device", "cpu": "host", "none": None}[ema],
        cpu_offload=offload,
    )


@dataclass(frozen=True)
class _Frozen:
    """Parameters of the frozen parts beside the denoiser; by default those of the release."""

    vae: int = 227_035_624
    t5: int = 1_223_527_424
    clip: int = 694_659_840

    @property
    def text(self) -> int:
        return self.t5 + self.clip


def _frozen_parts(options: Plan, run: "TrainSettings | None") -> _Frozen:
    """Those that the run or the model's folder has; for parts that are not there, the release's."""
    from opensoraplan.formats.assemble import empty_vae
    from opensoraplan.formats.checkpoints import open_checkpoint
    from opensoraplan.models.text import empty_text_encoder
    from opensoraplan.train.config import TextSettings, VAESettings
    from opensoraplan.train.inputs.encoders import given_paths

    if run is not None:
        paths = given_paths(run.vae, run.text)
    elif options.model is not None and (options.model / "model_index.json").is_file():
        paths = given_paths(
            VAESettings(pretrained=options.model), TextSettings(t5=options.model, clip=options.model)
        )
    else:
        paths = {}
    models: dict[str, Any] = {}
    if (path := paths.get("vae.pretrained")) and path.exists():
        models["vae"] = empty_vae(open_checkpoint(path), run.vae.config if run else None)
    if (path := paths.get("text.t5")) and path.exists():
        models["t5"] = empty_text_encoder(path, kind="t5")
    if (path := paths.get("text.clip")) and path.exists():
        models["clip"] = empty_text_encoder(path, kind="clip")
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return _Frozen(**counts)


def _encoder_bytes(options: Plan, run: "TrainSettings | None") -> int:
    """Of the VAE and the text encoders, where clips are encoded while training."""
    from opensoraplan.plan.estimate import BYTES
    from opensoraplan.train.inputs.sources import validation_encodes

    wanted = options.job.encoders
    if wanted is None:
        wanted = run is not None and (run.data.features is None or validation_encodes(run))
    if not wanted:
        return 0
    vae, text = (run.vae.compute, run.text.compute) if run else ("fp32", "bf16")
    parts = _frozen_parts(options, run)
    return parts.vae * BYTES[vae] + parts.text * BYTES[text]


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


def _one_device() -> "MeshSettings":
    from opensoraplan.parallel.mesh import MeshSettings

    return MeshSettings(dp_shard=1)


def _training_lines(
    model: "Model",
    shape: "Shape",
    mesh: "MeshSettings",
    job: "Job",
    options: Plan,
    *,
    encoders: int,
    said: str,
) -> Iterable[str]:
    from opensoraplan.parallel.mesh import said as sizes_said
    from opensoraplan.plan.estimate import (
        cache_bytes,
        devices_of,
        sent_by_step,
        shared_tokens,
        stage_activations,
        training_memory,
    )
    from opensoraplan.runtime.placement import MARGIN
    from opensoraplan.train.log.metrics import training_flops

    memory = training_memory(model, shape, mesh, job)
    devices, samples = devices_of(mesh), mesh.dp_replicate * mesh.dp_shard * shape.batch * job.accumulate
    yield f"{model.numbers():,} parameters; {said}"
    yield f"{_count(devices, 'device')}: {sizes_said(mesh.sizes())}; {job.compute}, weights {job.master}"
    yield f"batch {shape.batch} x accumulate {job.accumulate}: {_count(samples, 'sample')} a step"
    replicas = mesh.dp_replicate * mesh.dp_shard
    if replicas > 1 and job.accumulate % replicas == 0:
        fewer = job.accumulate // replicas
        yield f"optimizer.accumulate {fewer} would keep the {samples // replicas:,} of one process"
    yield ""
    yield "GB of a device"
    where = " (host)" if job.cpu_offload else ""
    average = " (host)" if job.ema == "host" or job.cpu_offload else ""
    yield _row("parameters" + where, memory.parameters / GB)
    yield _row("gradients" + where, memory.gradients / GB)
    yield _row("optimizer" + where, memory.optimizer / GB)
    yield _row("EMA" + average, memory.ema / GB)
    if encoders:
        yield _row("VAE and text encoders", encoders / GB)
    yield _row("activations", memory.activations / GB)
    for number, stage in enumerate(stage_activations(model, shape, mesh, job), 1):
        yield _row(f"  stage {number}, {stage.depth} blocks of rate {stage.rate}", stage.kept / GB)
    yield _row("working memory of backward", memory.working / GB)
    peak = memory.peak + encoders
    yield _row("most at one moment", peak / GB) + _verdict(peak / (1 - MARGIN), options.memory)
    if memory.host:
        yield _row("of the host", memory.host / GB)
    yield ""
    flops = training_flops(model.config, grid=shape.grid, text_tokens=shape.text, batch=shape.batch)
    flops = flops * job.accumulate // (mesh.sp * mesh.tp)
    tokens = shared_tokens(model, shape, mesh)
    yield f"{tokens:,} video tokens a sample"
    sent = sent_by_step(model, shape, mesh, job)
    yield f"{flops / 1e12:,.1f} TFLOP of a device a step; it sends {sent / GB:,.2f} GB"
    if options.tflops is not None:
        seconds = flops / (options.tflops * 1e12)
        yield f"{_time(seconds)} a step at {options.tflops:g} TFLOP/s"
        if options.samples is not None:
            yield f"{_time(seconds * options.samples / samples)} an epoch of {options.samples:,} samples"
    one = cache_bytes(model, shape)
    if options.samples is not None:
        yield f"feature cache: {one * options.samples / GB:,.1f} GB on disk"
    else:
        yield f"feature cache: {one / 1e6:,.1f} MB a sample on disk"


def _generation_lines(
    model: "Model", parts: _Frozen, shape: "Shape", options: Plan, *, said: str
) -> Iterable[str]:
    from opensoraplan.plan.estimate import BYTES, decoding_memory, forward_memory, vector_bytes
    from opensoraplan.runtime.placement import CHUNKS, MARGIN, Needs, plans_for
    from opensoraplan.train.log.metrics import forward_flops

    compute = options.job.compute or "bf16"
    size = BYTES[compute]
    text, vae = parts.text * size, parts.vae * size
    if options.weights == "fp8" and compute != "bf16":
        raise ValueError(f"--weights fp8 goes with --compute bf16, got {compute}")
    kind = options.weights
    denoiser = model.stored(compute, kind=kind)
    adaln = model.stored(compute, kind=kind, adaln=True)
    units = range(len(model.blocks))
    block = max(model.stored(compute, unit=unit, kind=kind, adaln=False) for unit in units)
    vectors = vector_bytes(model, compute, steps=_STEPS)
    forward = forward_memory(model, shape, compute, kind=kind)
    decoding = tuple(decoding_memory(shape, compute, chunk=chunk) for chunk in CHUNKS)
    yield f"{model.numbers():,} parameters; generating {said}, in {compute}; GB of one device"
    yield _row("denoiser", denoiser / GB)
    yield _row("  its AdaLN layers", adaln / GB)
    yield _row("T5 and CLIP", text / GB)
    yield _row("VAE", vae / GB)
    yield _row("activations of the denoiser", forward / GB)
    yield _row(f"activations of decoding <= {CHUNKS[0]} at a time", decoding[0] / GB)
    yield "most at one moment, by osp generate --memory"
    needs = Needs(text, denoiser, adaln, block, vae, vectors, denoising=forward, decoding=decoding)
    least = math.inf
    for plan in plans_for([needs]):
        if plan.peak < least:
            least = plan.peak
            name = f"  {plan.placement}, decoding <= {plan.chunk} at a time"
            yield _row(name, plan.peak / GB) + _verdict(plan.peak / (1 - MARGIN), options.memory)
    whole = model.stored(compute)
    yield _row("of the host, unless resident", (whole + text + vae) / GB)
    flops = 2 * forward_flops(model.config, grid=shape.grid, text_tokens=shape.text, batch=shape.batch)
    yield f"{flops / 1e12:,.1f} TFLOP a guided step"
    if options.tflops is not None:
        yield f"{_time(flops / options.tflops / 1e12)} a guided step at {options.tflops:g} TFLOP/s"


def _row(name: str, gigabytes: float) -> str:
    return f"{name:<36}{gigabytes:>10.3f}"


def _verdict(peak: float, memory: float | None) -> str:
    if memory is None:
        return ""
    return f"   {'fits' if peak <= memory * GB else 'does NOT fit'} into {memory:g}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def _write(lines: Iterable[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def _check_positive(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value <= _MOST:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0 and at most {_MOST:,}, got {value}")


# --- Launch -------------------------------------------------------------------------------------------------


def launch(options: Launch) -> None:
    """`osp launch`."""
    line = launch_line(options)
    if options.print:
        sys.stdout.write(shlex.join(line) + "\n")
        return
    os.execvp(line[0], line)


def launch_line(options: Launch) -> list[str]:
    """The torchrun command. Raises ValueError for numbers that start nothing."""
    from opensoraplan.parallel.ranks import OWN_STORE, SHUTDOWN

    for name, least in (("processes", 1), ("nodes", 1), ("max_restarts", 0)):
        value = getattr(options, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not options.command:
        raise ValueError("no command is given, for example: osp launch --processes 8 -- train RUN.toml")
    line = ["env", f"{SHUTDOWN}=300", *([f"{OWN_STORE}=1"] if options.max_restarts else [])]
    line += [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.processes}"]
    if options.nodes == 1:
        if options.node_rank or options.master:
            raise ValueError("--node-rank and --master go with --nodes 2 or more")
        line.append("--standalone")
    else:
        line += _meeting(options)
    if options.max_restarts:
        line.append(f"--max-restarts={options.max_restarts}")
    return [*line, "-m", "opensoraplan", *options.command]


def _meeting(options: Launch) -> list[str]:
    """How the processes of several machines find each other."""
    rank, nodes = options.node_rank, options.nodes
    if rank is None or not 0 <= rank < nodes:
        got = "none" if rank is None else rank
        raise ValueError(f"with --nodes {nodes}, --node-rank must be 0 to {nodes - 1}, got {got}")
    host, _, port = (options.master or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"with --nodes {nodes}, --master must be HOST:PORT of the first, got {options.master}"
        )
    # By c10d, not torchrun's static meeting: there, other machines do not hear of a process that died.
    return [
        f"--nnodes={nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={options.master}",
        f"--rdzv-conf=is_host={str(rank == 0).lower()}",
        "--rdzv-id=osp",
    ]
