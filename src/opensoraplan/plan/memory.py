"""Memory of a training step, by formula: weights, gradients, optimizer, EMA, and the busiest moment of the
backward pass. Bytes of a device. Activations are in activations.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from opensoraplan.models.sizes import FP32, ROOT
from opensoraplan.plan.activations import (
    block_activations,
    inputs_on_host,
    kept_before,
    kept_behind,
    kept_by_block,
    kept_outside,
)
from opensoraplan.plan.step import AdapterOptions, TrainingStep
from opensoraplan.runtime.streaming import SLOTS


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one device. Not all of it is there at once: gradients come as activations go, so that `peak`,
    the most at any moment of a step, is less than the sum.

    `parameters`: those that are trained; `frozen`: the weights under an adapter. `working`: what the busiest
    moment of the backward pass needs besides: a block that is computed again, gradients of activations,
    weights that FSDP has gathered. `between`: what is there while clips are encoded for the next step.
    `host`: what is in the host's memory instead.
    """

    parameters: int
    frozen: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    working: int
    between: int
    peak: int
    host: int


@dataclass(frozen=True)
class Encoding:
    """What encodes the clips of a run that trains: bytes of the VAE and of each text encoder, and what the
    VAE needs besides (`working`). `in_turn`: each is on the device only while it encodes, and in
    host memory otherwise.
    """

    vae: int
    texts: tuple[int, ...]
    working: int
    in_turn: bool = False

    @property
    def weights(self) -> int:
        return self.vae + sum(self.texts)

    def peak(self, memory: StepMemory) -> int:
        """The most bytes of the device at any moment, of steps that need this memory."""
        if self.in_turn:
            return max(memory.peak, memory.between + max(self.vae + self.working, *self.texts))
        return self.weights + max(memory.peak, memory.between + self.working)

    def host(self, memory: StepMemory) -> int:
        """Bytes of the host."""
        return memory.host + (self.weights if self.in_turn else 0)


def training_memory(step: TrainingStep) -> StepMemory:
    """What a step needs of each device. Raises ValueError as `TrainingStep.check`."""
    step.check()
    options, master, compute = step.options, step.master_bytes, step.compute_bytes
    own = step.trained(tp=step.mesh.tp, shards=step.weight_shards)
    frozen, streamed = _frozen(step)
    parameters = gradients = own * master
    optimizer = 2 * own * master
    if options.bits == 8:  # a byte, and a scale for each block of 256
        optimizer = 2 * (own + own // 256 * FP32)
    ema = own * FP32 if options.ema else 0
    host = ema if options.ema == "host" else 0
    if options.cpu_offload:
        host = parameters + gradients + optimizer + ema + frozen
    on_device = frozen + parameters + optimizer + ema - (host - (gradients if options.cpu_offload else 0))
    if step.alone and options.master != options.compute:
        on_device += own * compute
        parameters += own * compute

    kept = kept_by_block(step)
    backward = _backward_peak(step, kept=kept)
    after = 0 if options.cpu_offload else gradients
    peak = on_device + max(backward, after)
    held = sum(kept) + kept_outside(step)
    return StepMemory(
        parameters=parameters,
        frozen=frozen,
        gradients=gradients,
        optimizer=optimizer,
        ema=ema,
        activations=held,
        working=max(backward - held, 0),
        between=on_device,
        peak=peak,
        host=host + streamed + inputs_on_host(step),
    )


def _frozen(step: TrainingStep) -> tuple[int, int]:
    """Bytes of the weights under an adapter on the device and, if they are streamed, on the host."""
    adapter, model, options = step.options.adapter, step.model, step.options
    if adapter is None:
        return 0, 0
    if not step.alone:  # FSDP takes all weights in one precision
        return model.numbers(tp=step.mesh.tp, shards=step.weight_shards) * step.master_bytes, 0
    if not adapter.streamed:
        return model.stored(options.compute, kind=adapter.base), 0
    blocks = _stored_blocks(step, adapter)
    return SLOTS * max(blocks) + model.stored(options.compute, unit=ROOT), sum(blocks)


def _stored_blocks(step: TrainingStep, adapter: AdapterOptions) -> list[int]:
    """Bytes of each block's frozen weights."""
    model, compute = step.model, step.options.compute
    return [model.stored(compute, unit=unit, kind=adapter.base) for unit in range(len(model.blocks))]


def copied_by_step(step: TrainingStep) -> int:
    """Bytes of frozen weights that a step copies to the device: all but the last blocks for backward, and all
    but the first, which are there from the backward pass before, for the next forward pass.
    """
    adapter = step.options.adapter
    if adapter is None or not adapter.streamed:
        return 0
    blocks = _stored_blocks(step, adapter)
    return step.options.accumulate * (sum(blocks[SLOTS:]) + sum(blocks[:-SLOTS]))


def _backward_peak(step: TrainingStep, *, kept: Sequence[int]) -> int:
    """Activations, gradients and what FSDP gathers, at the worst moment of a backward pass."""
    model, mesh, options = step.model, step.mesh, step.options
    alone, shards = step.alone, step.weight_shards
    master, compute = step.master_bytes, step.compute_bytes
    whole = [model.numbers(unit=index, tp=mesh.tp) for index in range(len(model.blocks))]
    trained = [step.trained(unit=index, tp=mesh.tp) for index in range(len(model.blocks))]
    held, gradients = sum(kept) + kept_before(step), 0
    if not alone:  # what is outside of blocks stays whole all the time
        held += model.numbers(unit=ROOT, tp=mesh.tp) * compute
    if options.accumulate > 1 and not options.cpu_offload:  # from the micro-batches before
        gradients = step.trained(tp=mesh.tp, shards=shards) * master
    numbers = model.dim * step.shape.batch * step.tokens_of_rank  # in the last norm two tensors in fp32
    most = held + kept_behind(step) + 2 * FP32 * numbers + gradients
    for index in reversed(range(len(model.blocks))):
        gathered = 0
        if not alone:
            # This block's weights and gradients, the next one's weights, which come already, and gradients
            # of the one before on their way to other ranks.
            ahead = whole[index - 1] if index else 0
            before = trained[index + 1] if index + 1 < len(whole) else 0
            gathered = (whole[index] + trained[index] + ahead) * compute + before * FP32
        again = working_memory(step, index)
        most = max(most, held + again + gathered + gradients)
        held -= kept[index]
        if alone and (options.master != options.compute or options.accumulate == 1):
            gradients += trained[index] * compute
        elif not alone and not options.cpu_offload and options.accumulate == 1:
            gradients += step.trained(unit=index, tp=mesh.tp, shards=shards) * master
    return max(most, gradients)


def working_memory(step: TrainingStep, index: int) -> int:
    """What the backward pass of a block needs at most besides what is kept.

    That is behind GELU, whose output's gradient there is then, besides the stream's; or, where the block is
    computed again, at the end of that, in `add_gated`: two sums in fp32, and where the stream is in less its
    copy and both updates before theirs.
    """
    options, batch, tp = step.options, step.shape.batch, step.mesh.tp
    block, c, dim = step.model.blocks[index], step.compute_bytes, step.model.dim
    activations = block_activations(step, block)
    joined = step.tokens // step.mesh.sp
    own = joined // tp
    backward = own * dim * c + joined * (4 * dim // tp + (dim if tp > 1 else 0)) * c
    if index < options.recompute_blocks:
        forward = own * dim * (c + 2 * FP32 + (FP32 + 2 * c if c < FP32 else 0))
        # In fp32 what the first norm keeps is the block's input, unless a skip Linear comes before it.
        shared = own * dim * c if c == FP32 and not block.skip else 0
        kept = activations.attended if options.keep_attention else 0
        return activations.computed - kept + batch * (max(backward, forward) - shared)
    again = activations.feed_forward if index < options.recompute_feed_forwards else 0
    return again + batch * backward
