"""What ranks send each other in a training step, by formula. Bytes of a rank, unless it says otherwise."""

import math
from dataclasses import dataclass
from typing import Literal

from opensoraplan.models.sizes import FP32, ROOT, Block
from opensoraplan.plan.step import TrainingStep

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


def collectives_of_block(step: TrainingStep, block: Block) -> list[Collective]:
    """What ranks of one sample send each other in one block, forward and backward, nothing computed again.

    tp: gathers the video tokens before attention and feed-forward and sums them up in parts behind, and the
    text; joins the modulations. Ulysses: exchanges q, k, v and the output, gathers the text's heads. The few
    bytes of norms' gradients are left out.
    """
    model, shape, mesh = step.model, step.shape, step.mesh
    c, dim, batch = step.compute_bytes, model.dim, shape.batch
    text_out = not block.last
    padded = step.padded(block.rate)
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
        if step.tokens > shape.tokens(model.config["patch_size"]):
            add("sp", "all_gather", batch * padded, backward=False)  # the key mask
    return found


def collectives_outside(step: TrainingStep) -> list[Collective]:
    """What ranks of one sample send each other outside of blocks: tokens are joined behind the last
    projection, and so is the last modulation; tp ranks have a copy of the embedded tokens, whose
    gradients they join.
    """
    c, dim, batch, mesh = step.compute_bytes, step.model.dim, step.shape.batch, step.mesh
    config = step.model.config
    tokens = batch * step.tokens
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


def collectives_of_weights(step: TrainingStep, unit: int) -> list[Collective]:
    """What FSDP sends of one unit in a micro-batch."""
    mesh, compute = step.mesh, step.compute_bytes
    if step.devices == mesh.tp:
        return []
    shards, numbers = step.weight_shards, step.model.numbers(unit=unit, tp=mesh.tp)
    found = [Collective("weights", "all_gather", numbers * compute, shards)]
    if unit != ROOT:  # which stays whole until its backward pass
        found.append(Collective("weights", "all_gather", numbers * compute, shards, backward=True))
    found.append(Collective("weights", "reduce_scatter", numbers * FP32, shards, backward=True))
    if mesh.dp_replicate > 1:
        own = math.ceil(numbers / shards) * FP32
        found.append(Collective("replicas", "all_reduce", own, mesh.dp_replicate, backward=True))
    return found


def sent_by_step(step: TrainingStep) -> int:
    """Bytes that a rank sends in a whole step of all its micro-batches."""
    model, options = step.model, step.options
    total = sum(collective.sent for collective in collectives_outside(step)) * options.accumulate
    for index, block in enumerate(model.blocks):
        again = 2 if index < options.recompute_blocks else 1
        for collective in collectives_of_block(step, block):
            total += collective.sent * (1 if collective.backward else again) * options.accumulate
    for unit in (ROOT, *range(len(model.blocks))):
        for collective in collectives_of_weights(step, unit):
            total += collective.sent * options.accumulate
    return total
