"""Offloading: keeps weights on the device only while they are used. Streams a denoiser's blocks, prefetching
the next one, in denoising and in training, or moves whole models in turn.

Not diffusers' group offloading: with streams, removing the hooks by which it learns the order of blocks also
removes those of a step cache, and it pins each weight separately, which may take twice the memory. Nor its
model offloading, which copies weights back to the host, although they are still there.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.hooks.group_offloading import apply_group_offloading
from torch import Tensor, nn

from opensoraplan.models.sparse_ummdit import SparseUMMDiT

logger = logging.getLogger(__name__)

# Blocks on the device at a time: one computes while the next is copied.
SLOTS = 2
_ALIGNMENT = 256  # bytes, of each tensor


class _Place(NamedTuple):
    """A parameter or buffer of a block: the module that owns it, its name there, its bytes in
    the block's store.
    """

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
        """Let the owner compute with the tensor in this store."""
        _set(self.owner, self.name, self.of(store))


class _Block(NamedTuple):
    places: Sequence[_Place]
    host: Tensor  # uint8 [bytes]

    def use(self, store: Tensor) -> None:
        """Let the block compute with the tensors in this store."""
        for place in self.places:
            place.use(store)


def stream_layers(model: nn.Module, device: torch.device) -> None:
    """Keep each layer's weights on the device only while it computes, without prefetching."""
    apply_group_offloading(model, device, offload_type="leaf_level")


@contextmanager
def brought(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a model on the device inside the block. One that is elsewhere is used there again after it, and
    nothing is copied back.
    """
    there = all(_is_on(tensor, device) for _, _, tensor in _tensors_of(model))
    elsewhere = [] if there else _bring(model, device)
    try:
        yield
    finally:
        for owner, name, tensor in elsewhere:
            _set(owner, name, tensor)


class InTurn:
    """Keeps one model on the device at a time. A model is moved there when one of its `doors` (modules in
    it) is called, and stays until a door of another model is called. The host keeps its tensors, so
    nothing is copied back.
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
        """Free the device's memory."""
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
        self._tensors = _bring(model, self._device)


def stream_blocks(model: SparseUMMDiT, device: torch.device) -> None:
    """Make the model compute on the device while its blocks' weights stay on the host, pinned if possible.
    Only for denoising; do not move the model afterwards.
    """
    stream = _BlockStreamer(model.transformer_blocks, device)
    for index, block in enumerate(model.transformer_blocks):
        block.forward = partial(stream.run, index, block.forward)
    model.register_forward_hook(lambda *_: stream.release())
    for part in model.children():
        if part is not model.transformer_blocks:
            part.to(device)


def stream_frozen_blocks(model: SparseUMMDiT, device: torch.device) -> None:
    """Keep the frozen weights of a model's blocks on the host, pinned if possible, and train the rest on the
    device. All blocks must be recomputed (`set_recompute`). Nothing is copied back. Do not move the model
    to another device afterwards.
    """
    assert all(block.gradient_checkpointing for block in model.transformer_blocks)
    stream = _TrainingStreamer(model.transformer_blocks, device)
    for index, block in enumerate(model.transformer_blocks):
        block.forward = partial(stream.run, index, block.forward)
    for part in model.children():
        if part is not model.transformer_blocks:
            part.to(device)
    for parameter in model.transformer_blocks.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device)


class _BlockStreamer:
    """Copies the blocks' weights to the device, in order."""

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device, *, frozen: bool = False) -> None:
        self.device = device
        pinned = device.type != "cpu"
        self.blocks = [_store_on_host(block, pinned=pinned, frozen=frozen) for block in blocks]
        self.size = max(len(block.host) for block in self.blocks)
        self.slots: list[Tensor] = []
        self.held: list[int | None] = [
            None
        ] * SLOTS  # the block that is in each slot, or is being copied to it
        self._api = None if device.type == "cpu" else getattr(torch, device.type)
        self._copies = None if self._api is None else self._api.Stream(device)

    def run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the block's forward pass."""
        try:
            return self._run(index, forward, *args, **kwargs)
        except BaseException:
            self.release()
            raise

    def _run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if not self.slots:
            self.slots = [torch.empty(self.size, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)]
        self._send(index)
        self._wait()
        following = self._following(index)
        if 0 <= following < len(self.blocks):
            self._send(following)
        return forward(*args, **kwargs)

    def _following(self, index: int) -> int:
        """The block that is wanted after this one."""
        return index + 1

    def release(self) -> None:
        """Free the device's memory until the next pass."""
        self._wait()  # a step cache may skip a block that is being copied
        for slot in range(SLOTS):
            self._empty(slot)
        self.slots = []

    def _empty(self, slot: int) -> None:
        """Let the block that has the slot go back to the host's memory."""
        if (index := self.held[slot]) is not None:
            self.blocks[index].use(self.blocks[index].host)
            self.held[slot] = None

    def _wait(self) -> None:
        """Let later computations wait for the copies."""
        if self._api is not None:
            self._api.current_stream(self.device).wait_stream(self._copies)

    def _send(self, index: int) -> None:
        """Start to copy a block, unless it is there, when the computation that uses its slot has finished."""
        slot, block = index % SLOTS, self.blocks[index]
        if self.held[slot] == index:
            return
        self._empty(slot)
        self.held[slot] = index
        block.use(self.slots[slot])
        target = self.slots[slot][: len(block.host)]
        if self._api is None:
            target.copy_(block.host)
            return
        assert self._copies is not None
        self._copies.wait_stream(self._api.current_stream(self.device))
        with self._api.stream(self._copies):
            target.copy_(block.host, non_blocking=True)


class _TrainingStreamer(_BlockStreamer):
    """Copies the blocks' frozen weights to the device, from the first to the last, and back again when they
    are recomputed one by one. The backward pass of a block, which reads them, comes to its end before the
    block before it is recomputed, so that its slot is free by then. The last two blocks stay for the backward
    pass, the first two for the next step.
    """

    def __init__(self, blocks: Iterable[nn.Module], device: torch.device) -> None:
        super().__init__(blocks, device, frozen=True)
        self.before = -1  # the block that ran last

    def run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the block's forward pass, the first or another one. To end the latter early, torch raises."""
        try:
            return self._run(index, forward, *args, **kwargs)
        finally:
            self.before = index

    def _following(self, index: int) -> int:
        return index + 1 if index == 0 or index > self.before else index - 1


def _store_on_host(block: nn.Module, *, pinned: bool, frozen: bool) -> _Block:
    """Move the block's tensors, or only the `frozen` ones, into one piece of host memory."""
    places: list[_Place] = []
    size = 0
    for owner, name, tensor in _tensors_of(block):
        if frozen and tensor.requires_grad:
            continue
        places.append(_Place(owner, name, size, tensor.shape, tensor.dtype))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    host = _host_memory(size, pinned=pinned)
    for place in places:
        tensor = place.owner._parameters.get(place.name, place.owner._buffers.get(place.name))
        assert tensor is not None
        place.of(host).copy_(tensor.detach())
        place.use(host)
    return _Block(places, host)


def _bring(model: nn.Module, device: torch.device) -> list[tuple[nn.Module, str, Tensor]]:
    """Let the model compute with copies of its tensors on the device; returns the tensors."""
    before: list[tuple[nn.Module, str, Tensor]] = []
    seen: set[int] = set()  # parameters that two modules share are one
    for owner, name, tensor in _tensors_of(model):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            before.append((owner, name, tensor.data))
            _set(owner, name, torch.empty_like(tensor.data, device=device).copy_(tensor.data))
    return before


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    """Of a device without a number, its current one is meant."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _tensors_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the parameters and buffers, each with the module that owns it and its name there."""
    for owner in model.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                yield owner, name, tensor


def _set(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter's data, or a buffer, of a module."""
    if name in owner._parameters:
        owner.get_parameter(name).data = tensor
    else:
        owner._buffers[name] = tensor


def _host_memory(size: int, *, pinned: bool) -> Tensor:
    """uint8 [size]. If no more memory can be pinned, it is not pinned, which makes copies slower."""
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            logger.warning("cannot pin weights, so their copies are slower: %s", error)
    return torch.empty(size, dtype=torch.uint8)
