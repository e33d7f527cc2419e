"""A denoiser whose blocks are on the device only while they compute; meanwhile the next one arrives.

Not by diffusers' group offloading: with streams it learns the order of blocks by hooks that, when they come
off, take those of a step cache with them, and it pins each weight by itself, in up to twice the memory.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
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
        if self.name in self.owner._parameters:
            self.owner.get_parameter(self.name).data = self.of(store)
        else:
            self.owner._buffers[self.name] = self.of(store)


class _Block(NamedTuple):
    places: Sequence[_Place]
    host: Tensor  # uint8 [bytes]


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
    for owner in block.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                places.append(_Place(owner, name, size, tensor.shape, tensor.dtype))
                size += -(-tensor.numel() * tensor.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    host = _host_memory(size, pinned=pinned)
    for place in places:
        tensor = place.owner._parameters.get(place.name, place.owner._buffers.get(place.name))
        assert tensor is not None
        place.of(host).copy_(tensor.detach())
        place.use(host)
    return _Block(places, host)


def _host_memory(size: int, *, pinned: bool) -> Tensor:
    """uint8 [size]; without pinning, which makes copies slower, if there is no more memory to pin."""
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            logger.warning("weights are not pinned, which makes their copies slower: %s", error)
    return torch.empty(size, dtype=torch.uint8)
