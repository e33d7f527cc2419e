"""Micro-batches with their latents and text features, for every process that works on them.

Processes of one sample (tp, sp) must have the same, also when a file cannot be read: one of them reads and
encodes it, and shares the results. With `parallel.encoder_dp` they take turns at it, else it is the first.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from opensoraplan.ahead import map_ahead
from opensoraplan.data.buckets import BucketSampler, Draw
from opensoraplan.data.dataset import Failure
from opensoraplan.device import explain_full_memory
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.parallel.mesh import SAMPLE
from opensoraplan.parallel.ranks import Ranks
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.inputs.loading import micro_batches
from opensoraplan.train.inputs.sources import Encoded, Source
from opensoraplan.train.methods.flow_loss import Drawn, draw

_FULL = (
    "a batch of clips cannot be encoded, memory is full: lower vae.chunk, data.batch_size or the sizes of "
    "data.selection, or train from features that osp cache has written"
)


class Turn(NamedTuple):
    """A micro-batch and what is drawn for it, on the device; the seconds that this process has waited for
    clips or features and taken to encode them.
    """

    drawn: Drawn
    encoded: Encoded
    waited: float = 0.0
    encoding: float = 0.0


def encoded_batches(
    source: Source,
    sampler: BucketSampler,
    settings: TrainSettings,
    ranks: Ranks,
    *,
    start: int,
    account: Callable[[Sequence[Failure]], None],
) -> Generator[Turn, None, None]:
    """The micro-batches of this process's share of every step from `start` on, in order. Close the generator
    to end the processes that read them.

    `account` takes note of what this process could not read, and may raise. What goes wrong in one of several
    processes is a JointError in all.
    """
    accumulate, steps = settings.optimizer.accumulate, range(start, settings.optimizer.steps)

    def order() -> Generator[list[Draw], None, None]:
        for step in steps:
            yield from sampler.share(
                step, rank=ranks.data_rank, ranks=ranks.data_ranks, accumulate=accumulate
            )

    mesh = ranks.mesh
    turns = ranks.sample_ranks if settings.parallel.encoder_dp else 1
    shared = mesh is not None and ranks.sample_ranks > 1
    own = mesh.rank(SAMPLE) if mesh is not None and shared else 0

    def drawn_for(draws: list[Draw]) -> Drawn:
        shape = source.latent_shape(draws[0].index)
        drawn = draw(draws, shape, settings.flow, conditions=settings.conditions, seed=settings.seed)
        return drawn.to(source.device)

    batches = micro_batches(
        source.dataset,
        lambda: islice(order(), own, None, turns),
        workers=settings.data.workers,
        collate=source.collate,
        batch_bytes=settings.data.batch_size * source.largest,
    )

    def made(drawn: Drawn) -> Turn:
        began = time.perf_counter()
        batch = next(batches)
        there = time.perf_counter()
        account(batch.failures)
        with explain_full_memory(_FULL):
            encoded = source.encode(batch)
        return Turn(drawn, encoded, there - began, time.perf_counter() - there)

    rest = map_ahead(drawn_for, order())
    with closing(batches):
        while together := list(islice(rest, turns)):
            mine = ranks.all_or_none(lambda now=together: made(now[own]) if own < len(now) else None)
            for turn, drawn in enumerate(together):
                own_turn = mine if turn == own else None
                if mesh is not None and shared:
                    group = mesh.group(SAMPLE)
                    own_turn = _shared(own_turn, drawn, turn, group=group, device=source.device)
                assert own_turn is not None
                yield own_turn


def _shared(
    mine: Turn | None, drawn: Drawn, turn: int, *, group: dist.ProcessGroup, device: torch.device
) -> Turn:
    """In all processes of the group, what number `turn` of them, which has it as `mine`, has encoded."""
    tensors = None
    if mine is not None:
        tensors = {"moments": mine.encoded.moments, **mine.encoded.prompt.tensors}
        if mine.encoded.last is not None:
            tensors["last"] = mine.encoded.last
    like = [None if tensors is None else {name: (t.shape, t.dtype) for name, t in tensors.items()}]
    dist.broadcast_object_list(like, group=group, group_src=turn)
    assert like[0] is not None
    received: dict[str, Tensor] = {}
    for name, (shape, dtype) in like[0].items():
        tensor = torch.empty(shape, dtype=dtype, device=device) if tensors is None else tensors[name]
        received[name] = tensor.contiguous()
        dist.broadcast(received[name], group=group, group_src=turn)
    if mine is not None:
        return mine
    moments, last = received.pop("moments"), received.pop("last", None)
    return Turn(drawn, Encoded(moments, PromptEmbeds(**received), last))
