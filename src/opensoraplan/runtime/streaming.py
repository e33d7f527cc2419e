"""Weights that are on the device only while they compute: of a denoiser's blocks, while the next one arrives,
or of whole models in turn.

Not by diffusers' group offloading: with streams it learns the order of blocks by hooks that, when they come
off, take those of a step cache with them, and it pins each weight by itself, in up to twice the memory. Nor
by its model offloading, which copies weights back to the host, where they have been all along.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.hooks.group_offloading import apply_group_offloading
from torch import Tensor, nn

from opensoraplan.models.sparse_ummdit import SparseUMMDiT

logger = logging.getLogger(__name__)

# Blocks that are on the device at a time: one computes, one arrives.
SLOTS = 2
_ALIGNMENT = 256  # bytes, of each tensor


class _Place(NamedTuple):
    """Where a parameter or buffer of a block is: its owner and name there, its bytes in the block's store."""

    owner: nn.Module
    name: str
    start: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, store: Tensor) -> Tensor:
        """The tensor in a store, uint8 [bytes]."""
        stop = self.start + self.shape.numel() * self.dtype.itemsize
        return store[self.start : stop].view(self.dtype).view(self.shape)

    def use(self, store: Tensor) -> None:
        """Have the block compute with what is in that store."""
        _set(self.owner, self.name, self.of(store))


class _Block(NamedTuple):
    places: Sequence[_Place]
    host: Tensor  # uint8 [bytes]


def stream_layers(model: nn.Module, device: torch.device) -> None:
    """Have each layer's weights on the device only while it computes, without reading ahead."""
    apply_group_offloading(model, device, offload_type="leaf_level")


class InTurn:
    """Has models on the device one at a time: each from the moment one of its `doors`, modules in it, is
    called until one of another model's is. The host's tensors are kept meanwhile, so nothing is copied back.
    """

    def __init__(self, models: Iterable[tuple[nn.Module, Iterable[nn.Module]]], device: torch.device) -> None:
        self._device = device
        self._there: nn.Module | None = None
        self._tensors: list[tuple[nn.Module, str, Tensor]] = []  # the host's, of the model that is there
        self._handles = [
            door.register_forward_pre_hook(lambda *_, model=model: self._bring(model))
            for model, doors in models
            for door in doors
        ]

    def release(self) -> None:
        """Give the device's memory back."""
        for owner, name, host in self._tensors:
            _set(owner, name, host)
        self._there, self._tensors = None, []
        if self._device.type != "cpu":
            getattr(torch, self._device.type).empty_cache()

    def end(self) -> None:
        """Leave the models on the host."""
        self.release()
        for handle in self._handles:
            handle.remove()

    def _bring(self, model: nn.Module) -> None:
        if self._there is model:
            return
        self.release()
        self._there = model
        seen: set[int] = set()  # parameters that two modules share are one
        for owner, name, tensor in _tensors_of(model):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                host = tensor.data
                self._tensors.append((owner, name, host))
                _set(owner, name, torch.empty_like(host, device=self._device).copy_(host))


def stream_blocks(model: SparseUMMDiT, device: torch.device) -> None:
    """Compute on the device from now on, with the blocks' weights on the host, pinned if they can be. For
    denoising only; the model is not to be moved afterwards.
    """
    stream = _Stream(model.transformer_blocks, device)
    for index, block in enumerate(model.transformer_blocks):
        block.forward = partial(stream.run, index, block.forward)
    model.register_forward_hook(lambda *_: stream.release())
    for part in model.children():
        if part is not model.transformer_blocks:
            part.to(device)


class _Stream:
    """Copies of weights on their way, in the order of the blocks."""

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device) -> None:
        self.device = device
        self.blocks = [_stored(block, pinned=device.type != "cpu") for block in blocks]
        self.size = max(len(block.host) for block in self.blocks)
        self.slots: list[Tensor] = []
        self.arriving: int | None = None  # the block that was sent for last
        self._api = None if device.type == "cpu" else getattr(torch, device.type)
        self._copies = None if self._api is None else self._api.Stream(device)

    def run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """The block's forward pass."""
        if not self.slots:
            self.slots = [torch.empty(self.size, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)]
        if self.arriving != index:
            self._send(index)
        self._wait()
        places, host = self.blocks[index]
        store = self.slots[index % SLOTS]
        if index + 1 < len(self.blocks):
            self._send(index + 1)
        for place in places:
            place.use(store)
        try:
            return forward(*args, **kwargs)
        except BaseException:
            self.release()
            raise
        finally:
            for place in places:
                place.use(host)

    def release(self) -> None:
        """Give the device's memory back until the next pass."""
        self._wait()  # for a block that was sent but, by a step cache, not used
        self.slots, self.arriving = [], None

    def _wait(self) -> None:
        """Have what is computed from now on wait for the copies."""
        if self._api is not None:
            self._api.current_stream(self.device).wait_stream(self._copies)

    def _send(self, index: int) -> None:
        """Begin to copy a block, once what computes in its slot has come to an end."""
        host = self.blocks[index].host
        self.arriving = index
        target = self.slots[index % SLOTS][: len(host)]
        if self._api is None:
            target.copy_(host)
            return
        assert self._copies is not None
        self._copies.wait_stream(self._api.current_stream(self.device))
        with self._api.stream(self._copies):
            target.copy_(host, non_blocking=True)


def _stored(block: nn.Module, *, pinned: bool) -> _Block:
    """The block's tensors moved into one piece of host memory; each lets go of its own."""
    places: list[_Place] = []
    size = 0
    for owner, name, tensor in _tensors_of(block):
        places.append(_Place(owner, name, size, tensor.shape, tensor.dtype))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    host = _host_memory(size, pinned=pinned)
    for place in places:
        tensor = place.owner._parameters.get(place.name, place.owner._buffers.get(place.name))
        assert tensor is not None
        place.of(host).copy_(tensor.detach())
        place.use(host)
    return _Block(places, host)


def _tensors_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Its parameters and buffers, each with the module that has it and the name there."""
    for owner in model.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                yield owner, name, tensor


def _set(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Have the module compute with this tensor as its parameter or buffer of that name."""
    if name in owner._parameters:
        owner.get_parameter(name).data = tensor
    else:
        owner._buffers[name] = tensor


def _host_memory(size: int, *, pinned: bool) -> Tensor:
    """uint8 [size]; without pinning, which makes copies slower, if there is no more memory to pin."""
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            logger.warning("weights are not pinned, which makes their copies slower: %s", error)
    return torch.empty(size, dtype=torch.uint8)
