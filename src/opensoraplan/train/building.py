"""The denoiser to train: whole, in one process, or what each rank of a mesh has of it. No process reads or
draws more than one whole tensor at a time for the latter.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from opensoraplan.convert.assemble import load_denoiser, open_denoiser
from opensoraplan.device import DTYPES
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.parallel.mesh import Mesh
from opensoraplan.parallel.plan import parallelize
from opensoraplan.parallel.shards import fill
from opensoraplan.train.config import ModelSettings, TrainSettings


def build(settings: ModelSettings, *, seed: int) -> SparseUMMDiT:
    """The denoiser to train: a checkpoint's, or a new one, on the CPU."""
    if settings.pretrained is None:
        model = _new(settings)
        model.initialize_weights(seed=seed)
        return model
    return load_denoiser(
        settings.pretrained,
        config=settings.config,
        rates=_rates(settings),
        dtype=DTYPES[settings.master],
    )


def build_shards(settings: TrainSettings, mesh: Mesh, *, device: torch.device) -> SparseUMMDiT:
    """The same, with this rank's shards of the weights on its device (or, offloaded, on the CPU). All ranks
    call this.
    """
    model, weights = _blueprint(settings.model, seed=settings.seed)
    nn.Module.to(model, DTYPES[settings.model.master])
    offload = settings.parallel.cpu_offload
    parallelize(
        model,
        mesh,
        compute=DTYPES[settings.model.compute],
        compile_blocks=settings.memory.compile,
        cpu_offload=offload,
    )
    model.to_empty(device=torch.device("cpu") if offload else device)
    for name, value in weights:
        fill(model.get_parameter(name), value)
    return model


def _blueprint(settings: ModelSettings, *, seed: int) -> tuple[SparseUMMDiT, Iterator[tuple[str, Tensor]]]:
    """The model without values, and its weights one by one; sharding changes no names."""
    if settings.pretrained is not None:
        opened = open_denoiser(settings.pretrained, settings.config, rates=_rates(settings))
        return opened.model, opened.weights()
    with torch.device("meta"):
        model = _new(settings)
    return model, model.initial_weights(seed=seed)


def _new(settings: ModelSettings) -> SparseUMMDiT:
    config = dict(settings.config or {})
    SparseUMMDiT.check_keys(config, where="model.config")
    model = SparseUMMDiT(**config)  # type: ignore[arg-type] (values are checked there)
    if settings.sparse_n is not None:
        model.set_sparsity(settings.sparse_n)
    return model


def _rates(settings: ModelSettings) -> list[int] | None:
    return None if settings.sparse_n is None else list(settings.sparse_n)
