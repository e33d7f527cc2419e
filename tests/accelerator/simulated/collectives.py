"""Collectives between processes that have a simulated card each: gloo in the place of HCCL.

Torch takes no backend that is written in Python, but its collectives are operations like any other. Each runs
on the host's memory that stands for the card's, by the gloo of the same process group, in a stream of their
own, which waits for the current one, as HCCL's does. A stream that has not waited for a collective's work may
neither write what is sent nor use what is received.
"""

import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from simulated import streams
from simulated.device import NAME, as_hosts, begin, block_of, is_there, tensors_of

BACKEND = "hccl"
# What they write is their first argument.
_WRITING = (
    *("allreduce_", "broadcast_", "reduce_", "allgather_", "_allgather_base_", "reduce_scatter_"),
    *("_reduce_scatter_base_", "alltoall_", "alltoall_base_", "scatter_", "gather_"),
    *("allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_", "barrier"),
)


class _Pending(dist.Work):
    """A collective that has not come to an end for whoever has not waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self._end = streams.COLLECTIVES.record_event()
        _alive.append(self)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:  # noqa: ARG002
        self._end.wait()
        if self in _alive:
            _alive.remove(self)
        return True


# Torch itself keeps the part of them that is in C++ only.
_alive: list[_Pending] = []


def register(library: torch.library.Library) -> None:
    """`library`: of the namespace "c10d"."""
    dist.Backend.register_backend(BACKEND, _gloo, devices=[NAME])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in _WRITING:
            op = getattr(torch.ops.c10d, name).default
            library.impl(name, _runner(op), "PrivateUse1", allow_override=True)


def _gloo(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    """What the process group has for the card, though it is the host's gloo that is given work."""
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


def _runner(op: Any) -> Callable[..., Any]:  # noqa: ANN401
    stream = streams.COLLECTIVES

    def run(*args: Any) -> Any:  # noqa: ANN401
        stream.wait_stream(streams.current())
        with streams.used(stream):
            begin(op.name(), tensors_of(args), tensors_of(args[:1]))
        for x in filter(is_there, tensors_of(args)):
            block_of(x).recorded.add(stream)  # as HCCL does, so that none is freed meanwhile
        out = op(*as_hosts(args))
        dist.Work.unbox(out[-1] if isinstance(out, tuple) else out).wait()
        work = _Pending().boxed()
        return (args[0], work) if isinstance(out, tuple) else work

    return run
