"""What a training step of the denoiser needs, by formula: bytes of every device, and bytes sent between them.

Nothing is measured or run here; FLOPs are in train/log/metrics.py. Activations are what autograd keeps of
each operation of models/sparse_ummdit.py, for the attention kernels that store no scores. Bytes, unless it
says otherwise. D width, S video tokens, L text tokens, H heads, d head width, n the rate of a stage, c
bytes of a number in the precision that blocks compute in.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import torch

from opensoraplan.defaults import Weights
from opensoraplan.models.chunks import latents_at_a_time, tile_starts
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.splits import ADALN, split_dimension
from opensoraplan.models.strict import wrong_types_told
from opensoraplan.models.wfvae import COLOURS
from opensoraplan.parallel.mesh import MeshSettings, said
from opensoraplan.parallel.sequence import padded_tokens
from opensoraplan.shapes import SPATIAL_STRIDE

FP32 = 4
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
ROOT = -1  # the unit of what is outside of all blocks


@dataclass(frozen=True)
class Weight:
    """A parameter: the block that it is in (or ROOT), its shape, the dimension that tp splits, whether it is
    of AdaLN's linear layers, or of feed-forwards.
    """

    unit: int
    shape: tuple[int, ...]
    split: int | None
    adaln: bool
    feed_forward: bool

    def numbers(self, *, tp: int = 1, shards: int = 1) -> int:
        """How many of its numbers the first rank has; no rank has more."""
        shape = list(self.shape)
        if self.split is not None:
            shape[self.split] = math.ceil(shape[self.split] / tp)
        return math.ceil(shape[0] / shards) * math.prod(shape[1:])


@dataclass(frozen=True)
class Block:
    """A block: its stage and rate, whether it begins with a skip Linear, whether it is the model's last.

    `shares_kept`: what the skip Linear takes is the very tensor that a block before it takes.
    """

    rate: int
    skip: bool
    last: bool
    shares_kept: bool


class Model:
    """Sizes of a denoiser of this config, the constructor's arguments; weights are those of a real one, made
    without values. Raises ValueError as the constructor does, and for unknown keys.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        SparseUMMDiT.check_config(config, where="the model's config")
        with torch.device("meta"), wrong_types_told("the model's config"):
            model = SparseUMMDiT(**config)
        self._measure(model)

    @classmethod
    def of(cls, model: SparseUMMDiT) -> Self:
        """Sizes of a denoiser that exists, whose weights are whole (runtime/quantisation.py)."""
        sizes = cls.__new__(cls)
        sizes._measure(model)
        return sizes

    def _measure(self, model: SparseUMMDiT) -> None:
        self.config: dict[str, Any] = {k: v for k, v in model.config.items() if not k.startswith("_")}
        self.heads: int = self.config["num_attention_heads"]
        self.head_dim: int = self.config["attention_head_dim"]
        self.dim = self.heads * self.head_dim
        self.depths: Sequence[int] = self.config["num_layers"]
        self.rates: Sequence[int] = self.config["sparse_n"] or [1] * len(self.depths)
        self.weights = [_weight(name, tuple(p.shape)) for name, p in model.named_parameters()]
        self._numbers: dict[tuple[int, int, int], int] = {}

    @cached_property
    def blocks(self) -> list[Block]:
        middle, skips, rates = len(self.depths) // 2, self.config["skip_connection"], self.rates
        blocks = [
            Block(
                rate,
                skip=skips and stage > middle and not index,
                last=False,
                # Going to another rate and back is a copy each; the stage after the one that was kept is
                # the mirror of the one before this.
                shares_kept=rate == rates[-stage] == 1 if stage else False,
            )
            for stage, (depth, rate) in enumerate(zip(self.depths, rates, strict=True))
            for index in range(depth)
        ]
        return [*blocks[:-1], replace(blocks[-1], last=True)]

    def numbers(self, *, unit: int | None = None, tp: int = 1, shards: int = 1) -> int:
        """How many parameters the first rank has, of one unit or of all (None)."""
        if not self._numbers.get((ROOT, tp, shards)):
            for weight in self.weights:
                key = weight.unit, tp, shards
                self._numbers[key] = self._numbers.get(key, 0) + weight.numbers(tp=tp, shards=shards)
        units = range(ROOT, len(self.blocks)) if unit is None else (unit,)
        return sum(self._numbers[of, tp, shards] for of in units)

    def stored(
        self, compute: str, *, unit: int | None = None, kind: Weights = "whole", adaln: bool | None = None
    ) -> int:
        """Bytes of the weights of one unit or of all, on one device, kept as `kind`
        (runtime/quantisation.py): a byte for each number of the smaller ones, and a scale for each of their
        outputs. `adaln`: only AdaLN's linear layers, or only the others.
        """
        whole, total = BYTES[compute], 0
        scale = FP32 if kind == "fp8" else whole
        for weight in self.weights:
            if unit in (None, weight.unit) and adaln in (None, weight.adaln):
                in_block = weight.unit != ROOT and len(weight.shape) == 2
                smaller = weight.feed_forward if kind == "fp8" else kind == "int8" and in_block
                total += weight.numbers() + weight.shape[0] * scale if smaller else weight.numbers() * whole
        return total


def _weight(name: str, shape: tuple[int, ...]) -> Weight:
    parts = name.split(".")
    unit = int(parts[1]) if parts[0] == "transformer_blocks" else ROOT
    layer = name.rpartition(".")[0]
    feed_forward = unit != ROOT and parts[2] in ("ff", "ff_enc")
    return Weight(unit, shape, split_dimension(name), adaln=layer.endswith(ADALN), feed_forward=feed_forward)


@dataclass(frozen=True)
class Shape:
    """A micro-batch of the ranks that share samples: latents [batch, C, *grid] and texts of `text` tokens."""

    grid: tuple[int, int, int]
    text: int
    batch: int = 1

    def tokens(self, patch: int) -> int:
        """Video tokens of a sample. ValueError for sides that are no multiples of the patch."""
        frames, height, width = self.grid
        if height % patch or width % patch:
            raise ValueError(f"latent sides must be multiples of {patch}, got {height} x {width}")
        return frames * (height // patch) * (width // patch)


@dataclass(frozen=True)
class Job:
    """How it is trained; names and meanings as in train/config.py, `ema` is where the average is.

    `fused_rms_norm`: torch has a kernel for q/k norms that keeps less (CUDA), or not (CPU).
    """

    compute: Literal["bf16", "fp32"] = "bf16"
    master: Literal["bf16", "fp32"] = "fp32"
    accumulate: int = 1
    recompute_blocks: int = 0
    recompute_feed_forwards: int = 0
    keep_attention: bool = False
    ema: Literal["device", "host"] | None = "device"
    cpu_offload: bool = False
    fused_rms_norm: bool = False

    def check(self, model: Model) -> None:
        """Raise ValueError for what the model or the trainer refuses."""
        depth = len(model.blocks)
        if self.recompute_blocks and self.recompute_feed_forwards:
            raise ValueError(
                f"recompute blocks ({self.recompute_blocks}) or feed-forwards "
                f"({self.recompute_feed_forwards}), not both"
            )
        for name in ("recompute_blocks", "recompute_feed_forwards"):
            if not 0 <= (count := getattr(self, name)) <= depth:
                raise ValueError(f"{name} must be between 0 and {depth}, the model's blocks, got {count}")


# --- Activations --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockActivations:
    """Bytes of one block and rank: what it takes, what is kept of all it computes, and how much of that is
    the feed-forwards' inner width, or attention's output and log-sum-exp.
    """

    inputs: int
    computed: int
    feed_forward: int
    attended: int


@dataclass(frozen=True)
class StageActivations:
    """What is kept for backward in a stage: bytes of a rank."""

    rate: int
    depth: int
    kept: int


def block_activations(
    model: Model, block: Block, shape: Shape, mesh: MeshSettings, job: Job
) -> BlockActivations:
    """What autograd keeps of one block on one rank.

    Between attention and feed-forward a rank has 1 / (sp tp) of the tokens. In both it has 1 / sp of the
    tokens and 1 / tp of the width, in attention proper all tokens and 1 / (sp tp) of the heads. The text is
    whole on every rank.
    """
    c, dim, text = BYTES[job.compute], model.dim, shape.text
    sp, tp = mesh.sp, mesh.tp
    tokens = shared_tokens(model, shape, mesh)
    padded = math.ceil(tokens / block.rate**2) * block.rate**2
    joined, own = padded // sp, padded // (sp * tp)
    text_out = not block.last

    norm = _norm_bytes(model, dim, job) + FP32 * dim  # and its output, for the gradient of the scale
    # q and k in fp32, with what rms_norm keeps of them; the text's, too.
    qk = 2 * (_rms_bytes(model.head_dim, job) * model.heads) // tp
    inner = 2 * 4 * dim * c // tp  # before and after GELU
    attended = (padded + block.rate * text) // (sp * tp)  # q, k, v, output and log-sum-exp of the scores
    attention = attended * (4 * dim * c + FP32 * model.heads)
    if tokens % block.rate**2:
        attention += (padded + block.rate * text) * c  # the key mask, as numbers

    # What q, k and v take, and the feed-forward; both updates, for the gradients of the gates.
    of_video = own * (2 * norm + 2 * FP32 * dim) + joined * (2 * dim * c + qk)
    if shape.batch * block.rate * sp > 1:  # what to_out takes is a copy, unless there is one sequence alone
        of_video += joined * dim * c // tp
    of_text = text * (norm + dim * c + qk)
    if text_out:  # what to_add_out and the feed-forward take, both updates
        of_text += text * (dim * c // tp + dim * c + 2 * FP32 * dim)
        if model.config["double_ff"]:
            of_text += text * norm
    feed_forward = (joined + (text if text_out else 0)) * inner
    # Of both modulations: all six vectors, (1 + scale) of both streams, the Linear's input.
    vectors = 2 * (6 * dim * FP32 + 2 * dim * FP32 + model.config["timestep_embed_dim"] * c)
    inputs = (own + text) * dim * c
    skipped = 0
    if block.skip:
        joined_width = 2 * dim
        skip = joined_width * c
        if not model.config["skip_connection_zero_init"]:
            skip += _norm_bytes(model, joined_width, job)
        skipped = (own + text) * skip
        # The kept text is the next stage's input as well.
        inputs += 0 if block.shares_kept else own * dim * c

    computed = of_video + of_text + attention + feed_forward + vectors + skipped
    weights = 0
    if job.compute != "fp32":  # norms compute with fp32 copies of their weights
        weights = FP32 * (8 * dim + 4 * model.head_dim)
    return BlockActivations(
        inputs=shape.batch * inputs,
        computed=shape.batch * computed + weights,
        feed_forward=shape.batch * feed_forward,
        attended=shape.batch * attended * (dim * c + FP32 * model.heads),
    )


def shared_tokens(model: Model, shape: Shape, mesh: MeshSettings) -> int:
    """Video tokens of a sample, with those that are added so that sp * tp ranks can share them."""
    tokens = shape.tokens(model.config["patch_size"])
    ranks = mesh.sp * mesh.tp
    return tokens if ranks == 1 else padded_tokens(tokens, ranks=ranks, rates=model.rates)


def _rms_bytes(width: int, job: Job) -> int:
    """What rms_norm keeps of a vector: itself in fp32, 1 / rms, and the quotient, unless a kernel does it."""
    return width * FP32 * (1 if job.fused_rms_norm else 2) + FP32


def _norm_bytes(model: Model, width: int, job: Job) -> int:
    """What a norm of the config's kind keeps of a vector."""
    if model.config["norm_cls"] == "rms_norm":
        return _rms_bytes(width, job)
    return width * FP32 + 2 * FP32  # itself, mean and 1 / std


def kept_by_block(model: Model, shape: Shape, mesh: MeshSettings, job: Job) -> list[int]:
    """What is kept of each block until its backward pass, with the job's recompute."""
    kept = []
    for index, block in enumerate(model.blocks):
        activations = block_activations(model, block, shape, mesh, job)
        if index < job.recompute_blocks:
            kept.append(activations.inputs + (activations.attended if job.keep_attention else 0))
        elif index < job.recompute_feed_forwards:
            kept.append(activations.computed - activations.feed_forward)
        else:
            kept.append(activations.computed)
    return kept


def kept_outside(model: Model, shape: Shape, mesh: MeshSettings, job: Job) -> int:
    """What is kept outside of the blocks: before them until the very end, behind them not for long."""
    return _kept_before(model, shape, mesh, job) + _kept_behind(model, shape, mesh, job)


def _kept_before(model: Model, shape: Shape, mesh: MeshSettings, job: Job) -> int:
    """What embeddings take; cosines and sines in both orders of each rate, once for the whole batch."""
    c, config = BYTES[job.compute], model.config
    embed, cells = config["timestep_embed_dim"], math.prod(shape.grid)
    inputs = cells * config["in_channels"] * c + shape.text * config["caption_channels"] * c
    inputs += (5 * embed + config["pooled_projection_dim"]) * c + embed * FP32
    angles, tables = model.head_dim * FP32, 0
    tokens = shared_tokens(model, shape, mesh)
    for rate in set(model.rates):
        padded = math.ceil(tokens / rate**2) * rate**2
        tables += padded // mesh.sp * angles * (1 if rate == 1 else 2)
    return shape.batch * inputs + tables


def _kept_behind(model: Model, shape: Shape, mesh: MeshSettings, job: Job) -> int:
    """What the last norms, projection and loss keep; behind these samples are whole again on every rank."""
    c, config, dim = BYTES[job.compute], model.config, model.dim
    norms = 2 * _norm_bytes(model, dim, job) + FP32 * dim  # one of them is modulated
    own = shared_tokens(model, shape, mesh) // (mesh.sp * mesh.tp)
    kept = own * (norms + dim * c)
    kept += math.prod(shape.grid) * config["out_channels"] * FP32
    return shape.batch * (kept + 3 * FP32 * dim + config["timestep_embed_dim"] * c)


def stage_activations(model: Model, shape: Shape, mesh: MeshSettings, job: Job) -> list[StageActivations]:
    """What is kept in each stage of the U."""
    kept = iter(kept_by_block(model, shape, mesh, job))
    return [
        StageActivations(rate, depth, sum(itertools.islice(kept, depth)))
        for depth, rate in zip(model.depths, model.rates, strict=True)
    ]


# --- Memory of a training step ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. Not all of it is there at once: gradients come as activations go, so that `peak`,
    the most at any moment of a step, is less than the sum.

    `working`: what the busiest moment of the backward pass needs besides: a block that is computed again,
    gradients of activations, weights that FSDP has gathered. `host`: what is in the host's memory instead.
    """

    parameters: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    working: int
    peak: int
    host: int


def training_memory(model: Model, shape: Shape, mesh: MeshSettings, job: Job) -> Memory:
    """What a step needs of each device of `mesh`, whose sizes are all known. A mesh of one device is the
    trainer without FSDP, with a copy of the weights where they compute in a lower precision.
    """
    job.check(model)
    mesh.check_model(model.heads)
    alone = devices_of(mesh) == 1
    if alone and job.cpu_offload:
        raise ValueError("cpu_offload is FSDP's, which takes at least 2 devices")
    shards = mesh.dp_shard * mesh.sp
    master, compute = BYTES[job.master], BYTES[job.compute]
    own = model.numbers(tp=mesh.tp, shards=shards)
    parameters = gradients = own * master
    optimizer = 2 * own * master
    ema = own * FP32 if job.ema else 0
    host = ema if job.ema == "host" else 0
    if job.cpu_offload:
        host = parameters + gradients + optimizer + ema
    on_device = parameters + optimizer + ema - (host - (gradients if job.cpu_offload else 0))
    if alone and job.master != job.compute:
        on_device += own * compute
        parameters += own * compute

    kept = kept_by_block(model, shape, mesh, job)
    backward = _backward_peak(model, shape, mesh, job, kept=kept)
    after = 0 if job.cpu_offload else gradients
    peak = on_device + max(backward, after)
    held = sum(kept) + kept_outside(model, shape, mesh, job)
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        ema=ema,
        activations=held,
        working=max(backward - held, 0),
        peak=peak,
        host=host,
    )


def devices_of(mesh: MeshSettings) -> int:
    return math.prod(mesh.sizes().values())


def _backward_peak(model: Model, shape: Shape, mesh: MeshSettings, job: Job, *, kept: Sequence[int]) -> int:
    """Activations, gradients and what FSDP gathers, at the worst moment of a backward pass."""
    alone, shards = devices_of(mesh) == 1, mesh.dp_shard * mesh.sp
    master, compute = BYTES[job.master], BYTES[job.compute]
    whole = [model.numbers(unit=index, tp=mesh.tp) for index in range(len(model.blocks))]
    held, gradients = sum(kept) + _kept_before(model, shape, mesh, job), 0
    if not alone:  # what is outside of blocks stays whole all the time
        held += model.numbers(unit=ROOT, tp=mesh.tp) * compute
    if job.accumulate > 1 and not job.cpu_offload:  # from the micro-batches before
        gradients = model.numbers(tp=mesh.tp, shards=shards) * master
    # In the last norm two tensors in fp32.
    own = shared_tokens(model, shape, mesh) // (mesh.sp * mesh.tp)
    numbers = model.dim * shape.batch * own
    most = held + _kept_behind(model, shape, mesh, job) + 2 * FP32 * numbers + gradients
    for index in reversed(range(len(model.blocks))):
        gathered = 0
        if not alone:
            # This block's weights and gradients, the next one's weights, which come already, and gradients
            # of the one before on their way to other ranks.
            ahead = whole[index - 1] if index else 0
            before = whole[index + 1] if index + 1 < len(whole) else 0
            gathered = (2 * whole[index] + ahead) * compute + before * FP32
        again = working_memory(model, index, shape, mesh, job)
        most = max(most, held + again + gathered + gradients)
        held -= kept[index]
        if alone and (job.master != job.compute or job.accumulate == 1):
            gradients += whole[index] * compute
        elif not alone and not job.cpu_offload and job.accumulate == 1:
            gradients += model.numbers(unit=index, tp=mesh.tp, shards=shards) * master
    return max(most, gradients)


def working_memory(model: Model, index: int, shape: Shape, mesh: MeshSettings, job: Job) -> int:
    """What the backward pass of a block needs at most besides what is kept.

    That is behind GELU, whose output's gradient there is then, besides the stream's; or, where the block is
    computed again, at the end of that, in `add_gated`: two sums in fp32, and where the stream is in less its
    copy and both updates before theirs.
    """
    block, c, dim = model.blocks[index], BYTES[job.compute], model.dim
    activations = block_activations(model, block, shape, mesh, job)
    joined = shared_tokens(model, shape, mesh) // mesh.sp
    own = joined // mesh.tp
    backward = own * dim * c + joined * (4 * dim // mesh.tp + (dim if mesh.tp > 1 else 0)) * c
    if index < job.recompute_blocks:
        forward = own * dim * (c + 2 * FP32 + (FP32 + 2 * c if c < FP32 else 0))
        # In fp32 what the first norm keeps is the block's input, unless a skip Linear comes before it.
        shared = own * dim * c if c == FP32 and not block.skip else 0
        kept = activations.attended if job.keep_attention else 0
        return activations.computed - kept + shape.batch * (max(backward, forward) - shared)
    again = activations.feed_forward if index < job.recompute_feed_forwards else 0
    return again + shape.batch * backward


# --- Communication ------------------------------------------------------------------------------------------

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


@dataclass(frozen=True)
class Collective:
    """One of parallel/collectives.py. `whole`: bytes of what is gathered, of what is summed up, or, of an
    all-to-all, of what a rank has.
    """

    group: Literal["sp", "tp", "weights", "replicas"]
    kind: Kind
    whole: int
    ranks: int
    backward: bool = False

    @property
    def sent(self) -> int:
        """What a rank sends: all but its own part once; for a sum that all ranks get, twice."""
        return (2 if self.kind == "all_reduce" else 1) * self.whole * (self.ranks - 1) // self.ranks


def collectives_of_block(
    model: Model, block: Block, shape: Shape, mesh: MeshSettings, job: Job
) -> list[Collective]:
    """What ranks of one sample send each other in one block, forward and backward, nothing computed again.

    tp: gathers the video tokens before attention and feed-forward and sums them up in parts behind, and the
    text; joins the modulations. Ulysses: exchanges q, k, v and the output, gathers the text's heads. The few
    bytes of norms' gradients are left out.
    """
    c, dim, batch = BYTES[job.compute], model.dim, shape.batch
    text_out = not block.last
    tokens = shared_tokens(model, shape, mesh)
    padded = math.ceil(tokens / block.rate**2) * block.rate**2
    video = batch * padded // mesh.sp * dim * c
    text = batch * shape.text * dim * c
    found: list[Collective] = []

    def add(group: Literal["sp", "tp"], kind: Kind, whole: int, *, backward: bool) -> None:
        found.append(Collective(group, kind, whole, getattr(mesh, group), backward))

    if mesh.tp > 1:
        for _ in ("norm1", "norm2"):
            add("tp", "all_gather", batch * 6 * dim * c, backward=False)
            add("tp", "all_reduce", batch * 3 * dim * c, backward=True)
            add("tp", "all_reduce", batch * model.config["timestep_embed_dim"] * c, backward=True)
        for layer in ("attention", "feed-forward"):
            for backward in (False, True):
                add("tp", "all_gather", video, backward=backward)
                add("tp", "reduce_scatter", video, backward=backward)
            if text_out:
                add("tp", "all_reduce", text, backward=False)
            if text_out or layer == "attention":
                add("tp", "all_reduce", text, backward=True)
    if mesh.sp > 1:
        for backward in (False, True):
            for _ in ("q", "k", "v", "output"):
                add("sp", "all_to_all", video // mesh.tp, backward=backward)
        add("sp", "all_gather", text // mesh.tp, backward=False)
        if text_out:
            add("sp", "reduce_scatter", text // mesh.tp, backward=True)
        if tokens > shape.tokens(model.config["patch_size"]):
            add("sp", "all_gather", batch * padded, backward=False)  # the key mask
    return found


def collectives_outside(model: Model, shape: Shape, mesh: MeshSettings, job: Job) -> list[Collective]:
    """What ranks of one sample send each other outside of blocks: tokens are joined behind the last
    projection, and so is the last modulation; tp ranks have a copy of the embedded tokens, whose gradients
    they join.
    """
    c, dim, batch, config = BYTES[job.compute], model.dim, shape.batch, model.config
    tokens = batch * shared_tokens(model, shape, mesh)
    made = tokens * config["patch_size"] ** 2 * config["out_channels"] * c
    found: list[Collective] = []
    if mesh.tp > 1:
        found.append(Collective("tp", "all_gather", made // mesh.sp, mesh.tp))
        found.append(Collective("tp", "all_gather", tokens // mesh.sp * dim * c, mesh.tp, True))
        found.append(Collective("tp", "all_gather", batch * 2 * dim * c, mesh.tp))
        found.append(Collective("tp", "all_reduce", batch * 2 * dim * c, mesh.tp, True))
        found.append(Collective("tp", "all_reduce", batch * config["timestep_embed_dim"] * c, mesh.tp, True))
    if mesh.sp > 1:
        found.append(Collective("sp", "all_gather", made, mesh.sp))
        found.append(Collective("sp", "reduce_scatter", made, mesh.sp, True))
    return found


def collectives_of_weights(model: Model, unit: int, mesh: MeshSettings, job: Job) -> list[Collective]:
    """What FSDP sends of one unit in a micro-batch."""
    if devices_of(mesh) == mesh.tp:
        return []
    shards, numbers = mesh.dp_shard * mesh.sp, model.numbers(unit=unit, tp=mesh.tp)
    compute = BYTES[job.compute]
    found = [Collective("weights", "all_gather", numbers * compute, shards)]
    if unit != ROOT:  # which stays whole until its backward pass
        found.append(Collective("weights", "all_gather", numbers * compute, shards, backward=True))
    found.append(Collective("weights", "reduce_scatter", numbers * FP32, shards, backward=True))
    if mesh.dp_replicate > 1:
        own = math.ceil(numbers / shards) * FP32
        found.append(Collective("replicas", "all_reduce", own, mesh.dp_replicate, backward=True))
    return found


def sent_by_step(model: Model, shape: Shape, mesh: MeshSettings, job: Job) -> int:
    """Bytes that a rank sends in a whole step of all its micro-batches."""
    outside = collectives_outside(model, shape, mesh, job)
    total = sum(collective.sent for collective in outside) * job.accumulate
    for index, block in enumerate(model.blocks):
        again = 2 if index < job.recompute_blocks else 1
        for collective in collectives_of_block(model, block, shape, mesh, job):
            total += collective.sent * (1 if collective.backward else again) * job.accumulate
    for unit in (ROOT, *range(len(model.blocks))):
        for collective in collectives_of_weights(model, unit, mesh, job):
            total += collective.sent * job.accumulate
    return total


# --- Which mesh ---------------------------------------------------------------------------------------------


def meshes_of(devices: int, *, heads: int, machine: int) -> Iterator[MeshSettings]:
    """Every way to arrange that many devices: tp within a machine of so many, sp * tp dividing the heads."""
    for tp in _divisors(math.gcd(devices, machine)):
        for sp in _divisors(devices // tp):
            if heads % (sp * tp):
                continue
            for shard in _divisors(devices // (tp * sp)):
                yield MeshSettings(dp_replicate=devices // (tp * sp * shard), dp_shard=shard, sp=sp, tp=tp)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def cheapest_mesh(
    model: Model,
    shape: Shape,
    job: Job,
    *,
    memory: int,
    machine: int = 8,
    most_devices: int = 1024,
    others: int = 0,
) -> MeshSettings:
    """The mesh of fewest devices whose peak, and `others` besides, fit into `memory` bytes of each; of those
    the one that sends the fewest bytes for a sample. Beyond one machine only 2, 4, 8... machines are tried.

    Raises ValueError with the least need of all meshes if none fits.
    """
    job.check(model)
    counts = [*range(1, min(machine, most_devices) + 1)]
    while counts[-1] * 2 <= most_devices:
        counts.append(counts[-1] * 2)
    least: tuple[int, MeshSettings] | None = None
    for devices in counts:
        fitting: list[tuple[float, int, MeshSettings]] = []
        for mesh in meshes_of(devices, heads=model.heads, machine=machine):
            if devices == 1 and job.cpu_offload:
                continue
            need = training_memory(model, shape, mesh, job).peak + others
            if least is None or need < least[0]:
                least = need, mesh
            if need <= memory:
                sent = sent_by_step(model, shape, mesh, job) * mesh.sp * mesh.tp
                fitting.append((sent, need, mesh))
        if fitting:
            return min(fitting, key=lambda one: one[:2])[2]
    assert least is not None
    raise ValueError(
        f"no mesh of up to {counts[-1]} devices fits into {memory / 1e9:.1f} GB: the least is "
        f"{least[0] / 1e9:.1f} GB a device, with {said(least[1].sizes())}. More recompute, cpu_offload, a "
        f"smaller batch or shape need less"
    )


# --- The feature cache, and generating ----------------------------------------------------------------------


def cache_bytes(model: Model, shape: Shape, *, moments: str = "fp32", states: str = "bf16") -> int:
    """What one sample takes in the feature cache: posterior moments, and the states of one caption."""
    video = 2 * model.config["out_channels"] * math.prod(shape.grid) * BYTES[moments]
    text = shape.text * model.config["caption_channels"] + model.config["pooled_projection_dim"]
    return video + text * BYTES[states]


def forward_memory(model: Model, shape: Shape, compute: str, *, kind: Weights = "whole") -> int:
    """What one forward pass without gradients needs besides weights of this kind. The busiest moments of a
    block are GELU (its input and output, and five tensors of the stream's width; in fp8 its output, scaled
    and rounded) and the norm of k (seven of them, and three in fp32); earlier stages' outputs wait for the
    later ones.
    """
    c, tokens = BYTES[compute], shape.tokens(model.config["patch_size"])
    waiting = len(model.depths) // 2 if model.config["skip_connection"] else 0
    numbers = shape.batch * (tokens + shape.text) * model.dim
    busiest = 15 if kind == "fp8" else 13
    return numbers * (max(busiest * c, 7 * c + 3 * FP32) + waiting * c)


def vector_bytes(model: Model, compute: str, *, steps: int) -> int:
    """What AdaLN's linear layers give to all steps of a guided video (models/modulation.py)."""
    numbers = sum(weight.shape[0] for weight in model.weights if weight.adaln and len(weight.shape) > 1)
    return 2 * steps * numbers * BYTES[compute]


def decoding_memory(
    shape: Shape,
    compute: str,
    *,
    base: int = 160,
    chunk: int = 4,
    tiling: tuple[int, int] | None = None,
) -> int:
    """What the VAE of `base` channels needs to decode besides weights, `chunk` latent frames at a time,
    perhaps in tiles (size and overlap in pixels).

    The busiest is the resnet behind the last upsampling: three tensors of 2 base channels, and inputs of
    stages that wait; two frames that the convolution puts in front, and those that convolutions keep from
    chunk to chunk, of that width 11 frames, of the stage before as much as 8. Of tiles, one is computed at a
    time, and all of them keep theirs, and their pixels.
    """
    frames, *sides = shape.grid
    largest, all_of_them = math.prod(sides), math.prod(sides)
    if tiling is not None:
        tile, overlap = (size // SPATIAL_STRIDE for size in tiling)
        lengths = [[min(tile, side - start) for start in tile_starts(side, tile, overlap)] for side in sides]
        largest, all_of_them = (math.prod(map(of, lengths)) for of in (max, sum))
    chunk = latents_at_a_time(chunk, frame=shape.batch * 2 * base * 16 * largest)
    rest = min(frames - 1, chunk)  # of the first chunk besides frame 0
    wide = (3.2 * (1 + 4 * rest) + 2) * largest + 19 * all_of_them
    pixels = 0 if tiling is None else COLOURS * (1 + 8 * rest) * 64 * (2 * all_of_them + math.prod(sides))
    return int(shape.batch * (2 * base * wide * 16 + pixels) * BYTES[compute])
