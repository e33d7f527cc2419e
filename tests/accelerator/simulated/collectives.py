"""Collectives between processes that have a simulated card each: gloo in the place of HCCL.

Torch takes no backend that is written in Python, but its collectives are operations like any other. Each runs
on the host's memory that stands for the card's, by the gloo of the same process group, in the current stream.
Asynchronous collectives, which would run beside others, have come to an end when they return.
"""

import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from simulated.device import NAME, as_hosts, begin, tensors_of

BACKEND = "hccl"
# What they write is their first argument.
_WRITING = (
    *("allreduce_", "broadcast_", "reduce_", "allgather_", "_allgather_base_", "reduce_scatter_"),
    *("_reduce_scatter_base_", "alltoall_", "alltoall_base_", "scatter_", "gather_"),
    *("allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_", "barrier"),
)


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
    def run(*args: Any) -> Any:  # noqa: ANN401
        begin(op.name(), tensors_of(args), tensors_of(args[:1]))
        out = op(*as_hosts(args))
        work = out[-1] if isinstance(out, tuple) else out
        dist.Work.unbox(work).wait()
        return (args[0], work) if isinstance(out, tuple) else work

    return run
