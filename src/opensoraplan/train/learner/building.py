"""The denoiser to train: whole, in one process, or what each rank of a mesh has of it. Weights are read, or
drawn, one tensor at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from opensoraplan.device import DTYPES
from opensoraplan.formats.assemble import open_denoiser
from opensoraplan.models.attention import attention, set_backend
from opensoraplan.models.initial_weights import initial_weights
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.strict import name_wrong_types
from opensoraplan.parallel.apply import parallelize
from opensoraplan.parallel.mesh import Mesh
from opensoraplan.parallel.shards import fill
from opensoraplan.runtime.quantisation import quantise_weights
from opensoraplan.runtime.streaming import stream_frozen_blocks
from opensoraplan.train.config import MemorySettings, ModelSettings, TrainSettings
from opensoraplan.train.learner.adapter import add_adapter, fill_with_adapter


def build(settings: TrainSettings, *, device: torch.device, mesh: Mesh | None = None) -> SparseUMMDiT:
    """A checkpoint's denoiser, or a new one, in the optimizer's precision on `device`; on a mesh, whose ranks
    all call this, in shards (on the CPU, if they are offloaded).

    Raises ValueError for a checkpoint or settings that make no model, and for an attention that is not to be
    had here, before weights are read.
    """
    model, weights = _blueprint(settings.model, seed=settings.seed)
    adapts = settings.adapter.kind != "none"
    _set_recompute(model, settings.memory)
    if settings.model.attention is not None:
        nn.Module.to(model, DTYPES[settings.model.compute])  # in which it is tried
        _set_attention(model, settings.model.attention, device, batch_size=settings.data.batch_size)
    master, compute = DTYPES[settings.model.master], DTYPES[settings.model.compute]
    if adapts:
        add_adapter(model, settings.adapter)
    for parameter in model.parameters():  # what is frozen needs no more than it is computed in
        frozen = not parameter.requires_grad and mesh is None
        parameter.data = parameter.data.to(compute if frozen else master)
    if mesh is not None:
        parallelize(
            model,
            mesh,
            compute=compute,
            compiled=settings.memory.compile,
            cpu_offload=settings.parallel.cpu_offload,
        )
        if settings.model.attention is not None:  # sequence parallelism has processors of its own
            model.set_attention_backend(settings.model.attention)
        if settings.parallel.cpu_offload:
            device = torch.device("cpu")
    if adapts:
        assert settings.adapter.base != "auto"
        quantise_weights(model, settings.adapter.base)
        streamed = settings.memory.placement == "streamed"
        model.to_empty(device="cpu" if streamed else device)
        fill_with_adapter(model, weights, seed=settings.seed)
        if streamed:
            stream_frozen_blocks(model, device)
        return model
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
    SparseUMMDiT.check_config(config, where="model.config")
    with torch.device("meta"), name_wrong_types("model.config"):
        model = SparseUMMDiT(**config)  # type: ignore[arg-type] (values are checked there)
    if rates is not None:
        model.set_sparsity(rates)
    return model, initial_weights(model, seed=seed, kind=settings.init)


def _set_attention(model: SparseUMMDiT, name: str, device: torch.device, *, batch_size: int) -> None:
    """As `set_backend`, but gradients are tried, too."""
    why = f"data.batch_size {batch_size} makes batches of captions of several lengths"
    set_backend(model, name, device, masked=why if batch_size > 1 else None)
    shape = (1, 128, 2, model.config["attention_head_dim"])
    q = torch.zeros(shape, dtype=model.dtype, device=device, requires_grad=True)
    try:
        attention(q, q, q, None, backend=name).sum().backward()
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"attention {name!r} gives no gradients on {device} here: {reason}") from None


def _set_recompute(model: SparseUMMDiT, memory: MemorySettings) -> None:
    depth = len(model.transformer_blocks)
    for name in ("recompute_blocks", "recompute_feed_forwards"):
        if (count := getattr(memory, name)) > depth:
            raise ValueError(f"memory.{name} is {count}, but the model has {depth} blocks")
    model.set_recompute(
        blocks=depth if memory.placement == "streamed" else memory.recompute_blocks,
        feed_forwards=memory.recompute_feed_forwards,
        keep_attention=memory.keep_attention,
        inputs_on_host=memory.inputs_on_host,
    )
