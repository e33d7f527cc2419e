"""How operations on the simulated card run: each on the host's memory that stands for the card's.

A device tensor's data hangs on its *storage*, as a `Block` (memory.py), since `parameter.data = x` keeps the
tensor's Python object and swaps its storage. Torch keeps the Python object of a storage alive as long as the
storage is, so the block dies with the last tensor that uses it: that is how memory is counted.

One fallback runs every operation that torch leaves to a device: its arguments as tensors of the host, the
same operation there, and what came out as tensors of the card. A result that shares an argument's memory
shares it on the card, too; an argument that was written is returned itself.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from simulated import rules, streams
from simulated.memory import Block, Memory

NAME = "npu"
# Operations that torch would put together from others, but that cards have kernels for.
WHOLE = (
    "native_layer_norm",
    "native_layer_norm_backward",
    "native_group_norm",
    "native_group_norm_backward",
    "logsumexp",
    "stack",
    "embedding",
    "embedding_dense_backward",
)
VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten.as_strided.default,
    torch.ops.aten._reshape_alias.default,
)
_ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_set = torch.ops.aten.set_.source_Storage_storage_offset


class CardError(RuntimeError):
    """Something that a card would not compute, or compute wrong, or slowly."""


@dataclass
class Card:
    """The state of the simulated card: what is allocated, the rules it keeps, how often each operation was
    called. `faults`: whatever was wrong, also where the error was caught by somebody.

    A `hollow` card has memory that is counted but holds nothing: operations give shapes only, for sizes that
    no test could compute. `answer` is what the host then reads of a number that depends on data.
    """

    memory: Memory = field(default_factory=Memory)
    ascend: bool = True
    calls: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)
    pinned: dict[int, int] = field(default_factory=dict)  # address and bytes of the host's pinned memory
    pinnable: int | None = None  # bytes that may be pinned, None: any
    hollow: bool = False
    answer: Callable[[Tensor], Any] = lambda x: x.dtype == torch.bool

    def reset(self) -> None:
        """As at the start, but for what is still allocated or pinned."""
        streams.forget()
        fresh = type(self)()
        for one in fields(self):
            if one.name not in ("memory", "pinned"):
                setattr(self, one.name, getattr(fresh, one.name))
        self.memory.capacity, self.memory.peak = fresh.memory.capacity, self.memory.now
        self.generator.manual_seed(0)

    def fail(self, kind: type[Exception], message: str) -> Exception:
        self.faults.append(message)
        return kind(message)


CARD = Card()
_thread = threading.local()


def install() -> Card:
    """Make the card this process's accelerator, "npu". Once; it cannot be taken back."""
    from simulated import autocast, backend, collectives, fused

    backend.register(NAME)
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for name in WHOLE:
        for overload in getattr(torch.ops.aten, name).overloads():
            op = getattr(getattr(torch.ops.aten, name), overload)
            aten.impl(op.name().removeprefix("aten::"), _runner(op), "PrivateUse1")
    for op in VIEWS:
        aten.impl(op.name().removeprefix("aten::"), _view(op), "PrivateUse1")
    aten.impl("empty.memory_format", _empty, "PrivateUse1")
    # torch_npu allows it, too: `.data = ` between the host's and the card's tensors.
    aten.impl("_has_compatible_shallow_copy_type", lambda _a, _b: True, "PrivateUse1")
    fused.register(aten)
    autocast.register(everything, aten)
    c10d = torch.library.Library("c10d", "IMPL")
    collectives.register(c10d)
    _kept.extend((everything, aten, c10d))
    CARD.memory.on_free = streams.note_freed
    return CARD


_kept: list[torch.library.Library] = []  # what is registered lasts as long as they do


def is_there(x: object) -> bool:
    """Whether it is a tensor of the card."""
    return isinstance(x, Tensor) and x.device.type == NAME


def block_of(x: Tensor) -> Block:
    return x.untyped_storage()._block  # type: ignore[attr-defined]


def on_host(x: Tensor) -> Tensor:
    """The host's tensor that stands for one of the card."""
    storage = block_of(x).host
    return torch.empty(0, dtype=x.dtype, device=storage.device).set_(
        storage, x.storage_offset(), x.size(), x.stride()
    )


def to_card(x: Tensor) -> Tensor:
    """A new tensor of the card that takes over a host's tensor and its memory."""
    host = x.untyped_storage()
    address = host.data_ptr() or 64  # which torch wants, also of nothing
    storage = torch._C._construct_storage_from_data_pointer(address, torch.device(NAME, 0), host.nbytes())
    stream = streams.current()
    if wrong := streams.taken_too_early(stream):
        CARD.faults.append(wrong)
    storage._block = block = Block(CARD.memory, host, stream)
    block.writer = stream, stream.clock
    return _placed(torch._C._acc.create_empty_tensor((0,), x.dtype), storage, x)


def run_on_host(op: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """What an operation gives, with new tensors of the card for all that it returns."""
    begin(name, tensors_of([*args, *kwargs.values()]))
    out = op(*as_hosts(args), **_mapped(kwargs, _as_host))
    return _mapped(out, lambda x: to_card(x) if isinstance(x, Tensor) else x)


def as_hosts(args: Sequence[Any]) -> Sequence[Any]:
    """An operation's arguments as tensors of the host, in lists, too."""
    return _mapped(args, _as_host)


def begin(name: str, tensors: Sequence[Tensor], written: Sequence[Tensor] = ()) -> None:
    """Put an operation with these tensors into the current stream: its rules, and the order of streams."""
    CARD.calls[name] = CARD.calls.get(name, 0) + 1
    if wrong := rules.mixed(name, tensors) or (CARD.ascend and rules.of_operation(name, tensors)):
        raise CARD.fail(CardError, wrong)
    stream = streams.begin_operation()
    targets = {id(block_of(x)) for x in written if is_there(x)}
    try:
        for x in tensors:
            if is_there(x):
                block = block_of(x)
                streams.touch(stream, block, name=name, writes=id(block) in targets)
    except streams.OrderError as error:
        CARD.faults.append(str(error))
        raise


@dataclass(frozen=True)
class _Kind:
    """What an operation's schema says. `returned`: the place of the argument that each result is, if
    it is one.
    """

    name: str
    arguments: tuple[str, ...]
    written: tuple[int, ...]
    returned: tuple[int | None, ...]
    random: bool

    @classmethod
    def of(cls, op: Any) -> "_Kind":  # noqa: ANN401
        infos = [argument.alias_info for argument in op._schema.arguments]
        written = [place for place, info in enumerate(infos) if info is not None and info.is_write]
        returned = [
            next(
                (
                    place
                    for place in written
                    if alias is not None and infos[place].before_set == alias.before_set
                ),
                None,
            )
            for alias in (one.alias_info for one in op._schema.returns)
        ]
        names = tuple(argument.name for argument in op._schema.arguments)
        return cls(op.name(), names, tuple(written), tuple(returned), "generator" in names)

    def argument(self, place: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        return args[place] if place < len(args) else kwargs.get(self.arguments[place])


# What has no form for shapes alone, or whose shape depends on data: as if nothing were zero.
_HOLLOW: dict[str, Callable[..., Any]] = {
    "aten::nonzero": lambda x: torch.empty(x.numel(), x.dim(), dtype=torch.int64, device="meta"),
    "aten::_fused_adamw_": lambda *_, **__: None,
    "aten::_fused_adamw_.tensor_lr": lambda *_, **__: None,
}
_kinds: dict[Any, _Kind] = {}


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """The fallback: any operation on tensors of the card, or that makes one."""
    kind = _kinds.get(op) or _kinds.setdefault(op, _Kind.of(op))
    name = kind.name
    if name.startswith("aten::_copy_from"):
        return _copy(*args, **kwargs)
    tensors = tensors_of(args)
    to_host = False
    if kwargs:
        tensors += tensors_of(kwargs.values())
        if CARD.ascend and (wrong := rules.of_layout(name, kwargs.get("memory_format"))):
            raise CARD.fail(CardError, wrong)
        device = kwargs.get("device")
        to_host = device is not None and torch.device(device).type != NAME
    begin(name, tensors, tensors_of(kind.argument(place, args, kwargs) for place in kind.written))
    if name == "aten::_local_scalar_dense":
        streams.current().synchronize()
        return CARD.answer(args[0]) if CARD.hollow else on_host(args[0]).item()
    owners = {block_of(x).host._cdata: x.untyped_storage() for x in tensors if is_there(x)}
    options = _mapped(kwargs, _as_host)
    if kind.random:
        options["generator"] = None if CARD.hollow else options.get("generator") or CARD.generator
    if options.get("pin_memory"):
        options["pin_memory"] = False
    run = _HOLLOW.get(name, op) if CARD.hollow else op
    out = run(*as_hosts(args), **options)
    if out is None or to_host:
        return out

    def wrapped(x: Any) -> Any:  # noqa: ANN401
        if not isinstance(x, Tensor):
            return x
        if CARD.ascend and (wrong := rules.of_dtype(name, x.dtype)):
            raise CARD.fail(CardError, wrong)
        host = x.untyped_storage()._cdata
        storage = owners.get(host)
        if storage is None:
            made = to_card(x)
            owners[host] = made.untyped_storage()
            return made
        return _placed(torch._C._acc.create_empty_tensor((0,), x.dtype), storage, x)

    single = not isinstance(out, (tuple, list))
    results = (out,) if single else out
    if len(kind.returned) != len(results):  # one list of tensors
        return type(out)(map(wrapped, out))
    made = [
        _mapped(x, wrapped) if place is None else _written(kind.argument(place, args, kwargs), x)
        for x, place in zip(results, kind.returned, strict=True)
    ]
    return made[0] if single else type(out)(made)


def _empty(
    size: Sequence[int],
    dtype: torch.dtype | None = None,
    *_: Any,  # noqa: ANN401
    memory_format: torch.memory_format | None = None,
    **__: Any,  # noqa: ANN401
) -> Tensor:
    """What most results begin as."""
    name, dtype = "aten::empty.memory_format", dtype or torch.get_default_dtype()
    wrong = CARD.ascend and (rules.of_layout(name, memory_format) or rules.of_dtype(name, dtype))
    if wrong:
        raise CARD.fail(CardError, wrong)
    layout, device = memory_format or torch.contiguous_format, _host_device()
    return to_card(torch.empty(size, dtype=dtype, memory_format=layout, device=device))


def _view(op: Any) -> Callable[..., Any]:  # noqa: ANN401
    """Views are other shapes of the same memory, which they do not touch: the host's operation does it on the
    card's tensors themselves.
    """
    return lambda *args: op.redispatch(_ON_CPU, *args)


def _runner(op: Any) -> Callable[..., Any]:  # noqa: ANN401
    return lambda *args, **kwargs: _run(op, *args, **kwargs)


def _written(target: Tensor, x: Tensor) -> Tensor:
    """The argument that became x on the host; where that has other memory now, so has the argument."""
    if (
        block_of(target).host._cdata != x.untyped_storage()._cdata
        or block_of(target).size != x.untyped_storage().nbytes()
    ):
        fresh = to_card(x)
        _placed(target, fresh.untyped_storage(), x)
    elif target.size() != x.size() or target.stride() != x.stride():
        _placed(target, target.untyped_storage(), x)
    return target


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """A copy to, from or within the card. Without blocking it is made when somebody waits for it."""
    here = [x for x in (source, target) if is_there(x)]
    kind = "aten::_copy_from"
    CARD.calls[kind] = CARD.calls.get(kind, 0) + 1
    for x in here:
        if CARD.ascend and (wrong := rules.of_dtype("a copy", x.dtype)):
            raise CARD.fail(CardError, wrong)
    host = next((x for x in (source, target) if not is_there(x)), None)
    if host is not None and non_blocking and host.numel() and not is_pinned(host):
        raise CARD.fail(CardError, "a non-blocking copy of memory that is not pinned, which is slow on cards")
    stream = streams.begin_operation()
    try:
        for x in here:
            streams.touch(stream, block_of(x), name="a copy", writes=x is target)
    except streams.OrderError as error:
        CARD.faults.append(str(error))
        raise
    if CARD.hollow:
        return target
    inside, outside = (on_host(x) if is_there(x) else x for x in (source, target))
    if host is None or not non_blocking:
        outside.copy_(inside)
        if host is not None:
            stream.synchronize()
        return target
    version = source._version

    def copy() -> None:
        if host is source and source._version != version:
            CARD.faults.append("the host's memory was written while a copy of it was under way")
        with torch.no_grad():
            outside.copy_(inside)

    streams.start_copy(stream, copy, block_of(target) if is_there(target) else None)
    return target


def is_pinned(x: Tensor) -> bool:
    """Whether a host's tensor lies in pinned memory."""
    address = x.data_ptr()
    return any(start <= address < start + size for start, size in CARD.pinned.items())


def _placed(x: Tensor, storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    return _set.redispatch(_ON_CPU, x, storage, like.storage_offset(), like.size(), like.stride())


def _host_device() -> torch.device:
    return torch.device("meta" if CARD.hollow else "cpu")


def _as_host(x: Any) -> Any:  # noqa: ANN401
    if isinstance(x, torch.device):
        return _host_device()
    if is_there(x):
        return on_host(x)
    return x.to("meta") if CARD.hollow and isinstance(x, Tensor) else x


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """All tensors among the values and in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors_of(value)
    return found


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:  # noqa: ANN401
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(one, change) for one in value])
    if isinstance(value, dict):
        return {key: _mapped(one, change) for key, one in value.items()}
    return change(value)
