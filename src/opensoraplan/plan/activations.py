"""Activations of a training step, by formula: what autograd keeps of each operation of
models/sparse_ummdit.py, for the attention kernels that store no scores. Bytes of a rank; `c` those of a
number in the precision that blocks compute in.
"""

import itertools
import math
from dataclasses import dataclass

from opensoraplan.models.sizes import FP32, Block
from opensoraplan.plan.step import TrainingStep


@dataclass(frozen=True)
class BlockActivations:
    """Bytes of one block and rank: its `inputs`, and how much of them may wait on the host; what is kept of
    all that is `computed`, and how much of that is the feed-forwards' inner width, or the output and the
    log-sum-exp of attention.
    """

    inputs: int
    on_host: int
    computed: int
    feed_forward: int
    attended: int


@dataclass(frozen=True)
class StageActivations:
    """What is kept for backward in a stage: bytes of a rank."""

    rate: int
    depth: int
    kept: int


def block_activations(step: TrainingStep, block: Block) -> BlockActivations:
    """What autograd keeps of one block on one rank.

    Between attention and feed-forward a rank has 1 / (sp tp) of the tokens. In both it has 1 / sp of the
    tokens and 1 / tp of the width, in attention proper all tokens and 1 / (sp tp) of the heads. The text is
    whole on every rank.
    """
    model, batch, text = step.model, step.shape.batch, step.shape.text
    c, dim, sp, tp = step.compute_bytes, model.dim, step.mesh.sp, step.mesh.tp
    padded = step.padded(block.rate)
    joined, own = padded // sp, padded // (sp * tp)
    text_out = not block.last

    norm, update = _norm_bytes(step, dim), 0
    if (
        step.trains_modulation
    ):  # a norm's output, for the gradient of the scale; updates, for those of the gates
        norm, update = norm + FP32 * dim, FP32 * dim
    # q and k in fp32, with what rms_norm keeps of them; the text's, too.
    qk = 2 * (_rms_bytes(step, model.head_dim) * model.heads) // tp
    inner = 2 * 4 * dim * c // tp  # before and after GELU
    attended = (padded + block.rate * text) // (sp * tp)  # q, k, v, output and log-sum-exp of the scores
    attention = attended * (4 * dim * c + FP32 * model.heads)
    if step.tokens % block.rate**2:
        attention += (padded + block.rate * text) * c  # the key mask, as numbers

    # What q, k and v take, and the feed-forward; both updates.
    of_video = own * (2 * norm + 2 * update) + joined * (2 * dim * c + qk)
    if batch * block.rate * sp > 1:  # what to_out takes is a copy, unless there is one sequence alone
        of_video += joined * dim * c // tp
    of_text = text * (norm + dim * c + qk)
    if text_out:  # what to_add_out and the feed-forward take, both updates
        of_text += text * (dim * c // tp + dim * c + 2 * update)
        if model.config["double_ff"]:
            of_text += text * norm
    tokens = joined + (text if text_out else 0)
    low_rank = tokens * _low_rank_bytes(step, layers=4, widths=4)
    feed_forward = tokens * (inner + _low_rank_bytes(step, layers=2, widths=5))
    # Of both modulations: all six vectors, (1 + scale) of both streams, the Linear's input.
    vectors = 2 * (6 * dim * FP32 + 2 * dim * FP32 + model.config["timestep_embed_dim"] * c)
    inputs = (own + text) * dim * c
    skipped = 0
    if block.skip:
        joined_width = 2 * dim
        skip = joined_width * c if step.trains_skips else 0
        if not model.config["skip_connection_zero_init"]:
            skip += _norm_bytes(step, joined_width)
        skipped = (own + text) * skip
        # The kept text is the next stage's input as well.
        inputs += 0 if block.shares_kept else own * dim * c

    computed = of_video + of_text + attention + feed_forward + low_rank + vectors + skipped
    weights = 0
    if step.options.compute != "fp32":  # norms compute with fp32 copies of their weights
        weights = FP32 * (8 * dim + 4 * model.head_dim)
    return BlockActivations(
        inputs=batch * inputs,
        on_host=batch * (own + text) * dim * c,
        computed=batch * computed + weights,
        feed_forward=batch * feed_forward,
        attended=batch * attended * (dim * c + FP32 * model.heads),
    )


def _low_rank_bytes(step: TrainingStep, *, layers: int, widths: int) -> int:
    """What the adapters of so many layers keep of a token: what goes from one factor to the other; of DoRA
    both results, which the magnitudes scale, together `widths` times as wide as the stream.
    """
    adapter = step.options.adapter
    if adapter is None:
        return 0
    numbers = layers * adapter.rank + (2 * widths * step.model.dim if adapter.dora else 0)
    return numbers * step.compute_bytes


def _rms_bytes(step: TrainingStep, width: int) -> int:
    """What rms_norm keeps of a vector: itself in fp32, 1 / rms, and the quotient if its weight is trained."""
    return width * FP32 * (2 if step.options.adapter is None else 1) + FP32


def _norm_bytes(step: TrainingStep, width: int) -> int:
    """What a norm of the config's kind keeps of a vector."""
    if step.model.config["norm_cls"] == "rms_norm":
        return _rms_bytes(step, width)
    return width * FP32 + 2 * FP32  # itself, mean and 1 / std


def kept_by_block(step: TrainingStep) -> list[int]:
    """What is kept of each block until its backward pass, with the recompute of its options."""
    options, kept = step.options, []
    for index, block in enumerate(step.model.blocks):
        activations = block_activations(step, block)
        if index < options.recompute_blocks:
            inputs = activations.inputs - (activations.on_host if options.inputs_on_host else 0)
            kept.append(inputs + (activations.attended if options.keep_attention else 0))
        elif index < options.recompute_feed_forwards:
            kept.append(activations.computed - activations.feed_forward)
        else:
            kept.append(activations.computed)
    return kept


def inputs_on_host(step: TrainingStep) -> int:
    """What waits on the host for the backward pass."""
    if not step.options.inputs_on_host:
        return 0
    blocks = step.model.blocks[: step.options.recompute_blocks]
    return sum(block_activations(step, block).on_host for block in blocks)


def kept_outside(step: TrainingStep) -> int:
    """What is kept outside of the blocks: before them until the very end, behind them not for long."""
    return kept_before(step) + kept_behind(step)


def kept_before(step: TrainingStep) -> int:
    """What embeddings take; cosines and sines in both orders of each rate, once for the whole batch."""
    c, model, shape = step.compute_bytes, step.model, step.shape
    config, cells = model.config, math.prod(shape.grid)
    embed = config["timestep_embed_dim"]
    inputs = cells * config["in_channels"] * c + shape.text * config["caption_channels"] * c
    inputs += (5 * embed + config["pooled_projection_dim"]) * c + embed * FP32
    angles, tables = model.head_dim * FP32, 0
    for rate in set(model.rates):
        tables += step.padded(rate) // step.mesh.sp * angles * (1 if rate == 1 else 2)
    return shape.batch * inputs + tables


def kept_behind(step: TrainingStep) -> int:
    """What the last norms, projection and loss keep; behind these samples are whole again on every rank."""
    c, dim, shape = step.compute_bytes, step.model.dim, step.shape
    config = step.model.config
    norms = 2 * _norm_bytes(step, dim) + FP32 * dim  # one of them is modulated
    kept = step.tokens_of_rank * (norms + dim * c)
    kept += math.prod(shape.grid) * config["out_channels"] * FP32
    return shape.batch * (kept + 3 * FP32 * dim + config["timestep_embed_dim"] * c)


def stage_activations(step: TrainingStep) -> list[StageActivations]:
    """What is kept in each stage of the U."""
    kept = iter(kept_by_block(step))
    return [
        StageActivations(rate, depth, sum(itertools.islice(kept, depth)))
        for depth, rate in zip(step.model.depths, step.model.rates, strict=True)
    ]
