"""What torch has for a device under its name: `torch.npu`, here of the simulated card.

Pinned memory, generators and the size of storages belong to hooks in C++ that Python cannot fill, so
`torch.empty`, `Tensor.is_pinned`, `Tensor.pin_memory`, `torch.Generator` and three methods of
`torch.UntypedStorage` are wrapped.
"""

import types
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from simulated import streams
from simulated.device import CARD, CardError, is_pinned


class Backend(types.ModuleType):
    """`torch.npu`, as far as torch, diffusers and accelerate ask for it."""

    Stream = streams.Stream
    Event = streams.Event
    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.config = types.SimpleNamespace(allow_internal_format=True)
        self.jit_compile = True

    def set_compile_mode(self, *, jit_compile: bool) -> None:
        self.jit_compile = jit_compile

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any) -> None:  # noqa: ANN401
        index = device if isinstance(device, int) else torch.device(device).index
        if index:
            raise RuntimeError(f"there is one simulated card, not npu:{index}")

    def get_device_name(self, device: object = None) -> str:  # noqa: ARG002
        return "simulated"

    def get_device_capability(self, device: object = None) -> None:  # noqa: ARG002
        return None

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed(self, seed: int) -> None:
        CARD.generator.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        CARD.generator.manual_seed(seed)

    def get_rng_state(self, device: object = None) -> Tensor:  # noqa: ARG002
        return CARD.generator.get_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:  # noqa: ARG002
        CARD.generator.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def current_stream(self, device: object = None) -> streams.Stream:  # noqa: ARG002
        return streams.current()

    def stream(self, stream: streams.Stream | None) -> Any:  # noqa: ANN401
        return streams.used(stream)

    def synchronize(self, device: object = None) -> None:  # noqa: ARG002
        streams.synchronize_all()

    def empty_cache(self) -> None:
        CARD.calls["empty_cache"] = CARD.calls.get("empty_cache", 0) + 1

    def mem_get_info(self, device: object = None) -> tuple[int, int]:  # noqa: ARG002
        return CARD.memory.capacity - CARD.memory.now, CARD.memory.capacity

    def memory_allocated(self, device: object = None) -> int:  # noqa: ARG002
        return CARD.memory.now

    def max_memory_allocated(self, device: object = None) -> int:  # noqa: ARG002
        return CARD.memory.peak

    def max_memory_reserved(self, device: object = None) -> int:  # noqa: ARG002
        return CARD.memory.peak

    def reset_peak_memory_stats(self, device: object = None) -> None:  # noqa: ARG002
        CARD.memory.peak = CARD.memory.now


def register(name: str) -> None:
    """Give the card its name, and torch what it asks a device for."""
    _setup_privateuseone_for_python_backend(name, backend_module=Backend(f"torch.{name}"))
    _wrap_pinning()
    _wrap_generators(name)
    _wrap_record_stream(name)
    _wrap_resizing(name)
    _wrap_printing(name)


def _wrap_pinning() -> None:
    _device_constructors()  # it remembers what `torch.empty` is before it is wrapped
    empty = torch.empty

    def pin(x: Tensor) -> Tensor:
        size = x.untyped_storage().nbytes()
        if CARD.pinnable is not None and sum(CARD.pinned.values()) + size > CARD.pinnable:
            raise RuntimeError(f"NPU out of memory: {size} bytes of the host cannot be pinned")
        storage = x.untyped_storage()
        address = storage.data_ptr()
        if address:
            CARD.pinned[address] = size
            weakref.finalize(_tied(storage), CARD.pinned.pop, address, None)
        return x

    def wrapped_empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:  # noqa: ANN401
        made = empty(*args, **kwargs)
        return pin(made) if pin_memory and made.device.type == "cpu" else made

    def pin_memory(self: Tensor, device: object = None) -> Tensor:  # noqa: ARG001
        if self.device.type != "cpu":
            raise CARD.fail(CardError, "only memory of the host can be pinned")
        return self if is_pinned(self) else pin(torch.empty_like(self)).copy_(self)

    torch.empty = wrapped_empty
    Tensor.pin_memory = pin_memory  # type: ignore[assignment]
    Tensor.is_pinned = lambda self, device=None: self.device.type == "cpu" and is_pinned(self)  # type: ignore[assignment]  # noqa: ARG005


class _Tie:
    """Something that dies with the storage that it hangs on."""


def _tied(storage: torch.UntypedStorage) -> _Tie:
    storage._tie = tie = _Tie()  # type: ignore[attr-defined]
    return tie


def _wrap_generators(name: str) -> None:
    plain = torch.Generator

    class Kind(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, plain)

    class Generator(metaclass=Kind):
        """torch.Generator, where the card's are the host's."""

        def __new__(cls, device: Any = "cpu") -> torch.Generator:  # noqa: ANN401
            kind = torch.device(device).type
            return plain("cpu" if kind == name else device)

    torch.Generator = Generator  # type: ignore[misc]


def _wrap_record_stream(name: str) -> None:
    plain = Tensor.record_stream

    def record_stream(self: Tensor, stream: Any) -> None:  # noqa: ANN401
        if self.device.type != name:
            plain(self, stream)
            return
        self.untyped_storage()._block.recorded.add(stream)

    Tensor.record_stream = record_stream  # type: ignore[assignment]


def _wrap_resizing(name: str) -> None:
    storage = torch.UntypedStorage
    plain, count = storage.resize_, storage.nbytes

    def resize_(self: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if self.device.type != name:
            return plain(self, size)
        self._block.resize(size)  # type: ignore[attr-defined]
        return self

    def nbytes(self: torch.UntypedStorage) -> int:
        return self._block.size if self.device.type == name else count(self)  # type: ignore[attr-defined]

    storage.resize_ = resize_  # type: ignore[method-assign]
    storage.nbytes = storage.size = nbytes  # type: ignore[method-assign]


def _wrap_printing(name: str) -> None:
    plain = Tensor.__repr__  # which computes in fp64

    def shown(self: Tensor, **kwargs: Any) -> str:  # noqa: ANN401
        return f"{name}: {plain(self.detach().cpu())}" if self.device.type == name else plain(self, **kwargs)

    Tensor.__repr__ = shown  # type: ignore[assignment]
