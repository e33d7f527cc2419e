"""The denoiser to train: whole, in one process, or what each rank of a mesh has of it. Weights are read, or
drawn, one tensor at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from opensoraplan.convert.assemble import open_denoiser
from opensoraplan.device import DTYPES
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.strict import wrong_types_told
from opensoraplan.parallel.mesh import Mesh
from opensoraplan.parallel.plan import parallelize
from opensoraplan.parallel.shards import fill
from opensoraplan.train.config import MemorySettings, ModelSettings, TrainSettings


def build(settings: TrainSettings, *, device: torch.device, mesh: Mesh | None = None) -> SparseUMMDiT:
    """A checkpoint's denoiser, or a new one, in the optimizer's precision on `device`; on a mesh, whose ranks
    all call this, in shards (on the CPU, if they are offloaded).

    Raises ValueError for a checkpoint or settings that make no model, before weights are read.
    """
    model, weights = _blueprint(settings.model, seed=settings.seed)
    _set_recompute(model, settings.memory)
    nn.Module.to(model, DTYPES[settings.model.master])
    if mesh is not None:
        parallelize(
            model,
            mesh,
            compute=DTYPES[settings.model.compute],
            compiled=settings.memory.compile,
            cpu_offload=settings.parallel.cpu_offload,
        )
        if settings.parallel.cpu_offload:
            device = torch.device("cpu")
    model.to_empty(device=device)
    for name, value in weights:
        fill(model.get_parameter(name), value)
    return model


def _blueprint(settings: ModelSettings, *, seed: int) -> tuple[SparseUMMDiT, Iterator[tuple[str, Tensor]]]:
    """The model without values, and its weights one by one; sharding changes no names."""
    rates = None if settings.sparse_n is None else list(settings.sparse_n)
    if settings.pretrained is not None:
        opened = open_denoiser(settings.pretrained, settings.config, rates=rates)
        return opened.model, opened.weights()
    config = dict(settings.config or {})
    SparseUMMDiT.check_keys(config, where="model.config")
    with torch.device("meta"), wrong_types_told("model.config"):
        model = SparseUMMDiT(**config)  # type: ignore[arg-type] (values are checked there)
    if rates is not None:
        model.set_sparsity(rates)
    return model, model.initial_weights(seed=seed)


def _set_recompute(model: SparseUMMDiT, memory: MemorySettings) -> None:
    depth = len(model.transformer_blocks)
    for name in ("recompute_blocks", "recompute_feed_forwards"):
        if (count := getattr(memory, name)) > depth:
            raise ValueError(f"memory.{name} is {count}, but the model has {depth} blocks")
    model.set_recompute(blocks=memory.recompute_blocks, feed_forwards=memory.recompute_feed_forwards)
