"""What `osp plan` says of a training step, and of generating a video: lines of text."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opensoraplan.defaults import WeightPrecision
from opensoraplan.models.sizes import (
    BYTES,
    ROOT,
    BatchShape,
    DenoiserSizes,
    cache_bytes,
    decoding_memory,
    forward_flops,
    forward_memory,
    vector_bytes,
)
from opensoraplan.parallel.mesh import said
from opensoraplan.plan.activations import stage_activations
from opensoraplan.plan.fits import Fit
from opensoraplan.plan.memory import Encoding, copied_by_step, training_memory
from opensoraplan.plan.step import TrainingStep
from opensoraplan.plan.traffic import sent_by_step
from opensoraplan.runtime.placement import CHUNKS, MARGIN, Needs, plans_for

GB = 1e9
_STEPS = 50  # of a video that is generated, as `osp generate` takes them


@dataclass(frozen=True)
class Known:
    """What is known of the devices and of the data: GB of memory of each device, TFLOP/s that one achieves,
    samples per epoch. None: not known, and nothing is said that needs it.
    """

    memory: float | None = None
    tflops: float | None = None
    samples: int | None = None

    def verdict(self, peak: float) -> str:
        """Whether `peak` bytes fit, behind the row of a table."""
        if self.memory is None:
            return ""
        return f"   {'fits' if peak <= self.memory * GB else 'does NOT fit'} into {self.memory:g}"


@dataclass(frozen=True)
class FrozenParts:
    """Parameters of the frozen parts beside the denoiser; by default those of the release."""

    vae: int = 227_035_624
    t5: int = 1_223_527_424
    clip: int = 694_659_840

    @property
    def text(self) -> int:
        return self.t5 + self.clip


@dataclass(frozen=True)
class Precisions:
    """In which the denoiser and the text encoders compute (`compute`), in which the VAE does, and how the
    denoiser's weights are kept.
    """

    compute: str = "bf16"
    vae: str = "bf16"
    weights: WeightPrecision = "whole"

    def __str__(self) -> str:
        return self.compute if self.vae == self.compute else f"{self.compute}, the VAE in {self.vae}"


def training_lines(
    step: TrainingStep, known: Known, *, encoding: Encoding | None, described: str
) -> Iterator[str]:
    """`encoding`: by what clips are encoded while training, if they are. `described`: the video, in words."""
    options, batch, adapter = step.options, step.shape.batch, step.options.adapter
    yield f"{step.model.numbers():,} parameters; {described}"
    if adapter is not None:
        kind, where = "DoRA" if adapter.dora else "LoRA", "streamed" if adapter.streamed else "resident"
        kept = options.compute if adapter.base == "whole" else adapter.base
        yield f"{adapter.numbers():,} are trained, a {kind} of rank {adapter.rank}; the rest {kept}, {where}"
    yield (
        f"{_count(step.devices, 'device')}: {said(step.mesh.sizes())}; "
        f"{options.compute}, weights {options.master}"
    )
    yield f"batch {batch} x accumulate {options.accumulate}: {_count(step.samples, 'sample')} a step"
    replicas = step.mesh.dp_replicate * step.mesh.dp_shard
    if replicas > 1 and options.accumulate % replicas == 0:
        fewer = options.accumulate // replicas
        yield f"optimizer.accumulate {fewer} would keep the {step.samples // replicas:,} of one process"
    yield ""
    yield from _memory_lines(step, known, encoding)
    yield ""
    yield from _work_lines(step, known)
    one = cache_bytes(step.model, step.shape)
    if known.samples is not None:
        yield f"feature cache: {one * known.samples / GB:,.1f} GB on disk"
    else:
        yield f"feature cache: {one / 1e6:,.1f} MB a sample on disk"


def fitting_lines(fits: Sequence[Fit], known: Known, *, described: str) -> Iterator[str]:
    """As `training_lines`, of the first of `fits` that fits, or of the leanest, and what all of them need."""
    room = math.inf if known.memory is None else known.memory * GB * (1 - MARGIN)
    chosen = next((fit for fit in fits if fit.device <= room), fits[-1])
    yield from training_lines(chosen.step, known, encoding=chosen.encoding, described=described)
    yield ""
    yield "memory.placement auto takes the first of these that fits"
    for fit in fits:
        yield f"  {fit}{known.verdict(fit.device / (1 - MARGIN))}"


def _memory_lines(step: TrainingStep, known: Known, encoding: Encoding | None) -> Iterator[str]:
    memory, options = training_memory(step), step.options
    where = " (host)" if options.cpu_offload else ""
    average = " (host)" if options.ema == "host" or options.cpu_offload else ""
    yield "GB of a device"
    if memory.frozen:
        yield _row("frozen weights" + where, memory.frozen)
    yield _row("parameters" + where, memory.parameters)
    yield _row("gradients" + where, memory.gradients)
    yield _row("optimizer" + where, memory.optimizer)
    yield _row("EMA" + average, memory.ema)
    if encoding is not None:
        yield _row("VAE and text encoders" + (" (host)" if encoding.in_turn else ""), encoding.weights)
        yield _row("working memory of encoding", encoding.working)
    yield _row("activations", memory.activations)
    for number, stage in enumerate(stage_activations(step), 1):
        yield _row(f"  stage {number}, {stage.depth} blocks of rate {stage.rate}", stage.kept)
    yield _row("working memory of backward", memory.working)
    peak, host = memory.peak, memory.host
    if encoding is not None:
        peak, host = encoding.peak(memory), encoding.host(memory)
    yield _row("most at one moment", peak) + known.verdict(peak / (1 - MARGIN))
    if host:
        yield _row("of the host", host)


def _work_lines(step: TrainingStep, known: Known) -> Iterator[str]:
    micro_batches, sharing = step.options.accumulate, step.mesh.sp * step.mesh.tp
    flops = step.flops * micro_batches // sharing
    yield f"{step.tokens:,} video tokens a sample"
    yield f"{flops / 1e12:,.1f} TFLOP of a device a step; it sends {sent_by_step(step) / GB:,.2f} GB"
    if again := step.recomputed_flops * micro_batches // sharing:
        yield f"{(flops + again) / 1e12:,.1f} TFLOP with what is recomputed"
    if copied := copied_by_step(step):
        yield f"{copied / GB:,.1f} GB of weights are copied to the device a step"
    if known.tflops is not None:
        seconds = flops / (known.tflops * 1e12)
        yield f"{_time(seconds)} a step at {known.tflops:g} TFLOP/s"
        if known.samples is not None:
            yield f"{_time(seconds * known.samples / step.samples)} an epoch of {known.samples:,} samples"


def needs_by_sizes(
    model: DenoiserSizes, parts: FrozenParts, shape: BatchShape, precisions: Precisions
) -> Needs:
    """What a guided video of this shape needs, by the sizes of the parts."""
    compute, weights = precisions.compute, precisions.weights
    text, vae = parts.text * BYTES[compute], parts.vae * BYTES[precisions.vae]
    denoiser = model.stored(compute, kind=weights)
    adaln = model.stored(compute, kind=weights, adaln=True)
    units = range(len(model.blocks))
    block = max(model.stored(compute, unit=unit, kind=weights, adaln=False) for unit in units)
    vectors = vector_bytes(model, compute, steps=_STEPS)
    forward = forward_memory(model, shape, compute, kind=weights)
    decoding = tuple(decoding_memory(shape, precisions.vae, chunk=chunk) for chunk in CHUNKS)
    outside = model.stored(compute, unit=ROOT, kind=weights, adaln=False)
    return Needs(text, denoiser, adaln, block, vae, vectors, forward, decoding, outside=outside)


def generation_lines(
    model: DenoiserSizes,
    parts: FrozenParts,
    shape: BatchShape,
    known: Known,
    *,
    precisions: Precisions,
    described: str,
) -> Iterator[str]:
    """Of one device. `described`: the video, in words."""
    needs, compute = needs_by_sizes(model, parts, shape, precisions), precisions.compute
    yield f"{model.numbers():,} parameters; generating {described}, in {precisions}; GB of one device"
    yield _row("denoiser", needs.denoiser)
    yield _row("  its AdaLN layers", needs.adaln)
    yield _row("T5 and CLIP", needs.encoders)
    yield _row("VAE", needs.vae)
    yield _row("activations of the denoiser", needs.denoising)
    yield _row(f"activations of decoding <= {CHUNKS[0]} at a time", needs.decoding[0])
    yield "most at one moment, by osp generate --memory"
    least = math.inf
    for plan in plans_for([needs]):
        if plan.peak < least:
            least = plan.peak
            name = f"  {plan.placement}, decoding <= {plan.chunk} at a time"
            yield _row(name, plan.peak) + known.verdict(plan.peak / (1 - MARGIN))
    yield _row("of the host, unless resident", model.stored(compute) + needs.encoders + needs.vae)
    flops = 2 * forward_flops(model.config, shape)
    yield f"{flops / 1e12:,.1f} TFLOP a guided step"
    if known.tflops is not None:
        yield f"{_time(flops / known.tflops / 1e12)} a guided step at {known.tflops:g} TFLOP/s"


def _row(name: str, size: int) -> str:
    return f"{name:<36}{size / GB:>10.3f}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"
