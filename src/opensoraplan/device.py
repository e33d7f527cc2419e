"""Device and dtype names from a user: checked, with what to use instead, before any heavy work."""

import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from opensoraplan.names import did_you_mean

logger = logging.getLogger(__name__)

ACCELERATORS = ("cuda", "npu")
# The last: cuDNN, if its workspace does not fit.
_FULL = ("out of memory", "can't allocate memory", "alloc_failed", "unable to find an engine")
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Where control groups, of version 2 and 1, say what memory may be had, what is, and, in memory.stat, what of
# that is cached files.
_CONTROL_GROUPS = (
    ("", "memory.max", "memory.current", "file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
)
# Read by Ascend's libraries when they start. Seconds that processes wait for each other to begin, and to take
# part in a collective; memory in segments that grow, so that it does not fall into pieces.
_NPU_ENVIRONMENT = {
    "HCCL_CONNECT_TIMEOUT": "1800",
    "HCCL_EXEC_TIMEOUT": "7200",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(name: str | None) -> torch.device:
    """The device of that name; None or "auto" takes the first of cuda, npu, cpu that is there.

    "npu" imports torch_npu. Raises ValueError if there is no such device on this machine.
    """
    if name is None or name == "auto":
        return torch.device(next((kind for kind in ACCELERATORS if is_available(kind)), "cpu"))
    kind, _, index = name.partition(":")
    if kind not in (*ACCELERATORS, "cpu") or (":" in name and not index.isdecimal()):
        raise ValueError(
            f"device {name!r} is not one of cpu, cuda, npu (or cuda:1 and so on): use {available()}"
        )
    if kind == "cpu":
        return torch.device("cpu")
    if not is_available(kind):
        extra = " (torch_npu is not installed, or finds no card)" if kind == "npu" else ""
        raise ValueError(f"there is no {kind} device on this machine{extra}: use {available()}")
    count = getattr(torch, kind).device_count()
    if index and int(index) >= count:
        raise ValueError(f"device {name!r}: there are {count}, the last is {kind}:{count - 1}")
    return torch.device(name)


def resolve_dtype(name: str | None, device: torch.device, *, use: str = "computing") -> torch.dtype:
    """The dtype of that name ("bf16", "fp16", "fp32"; None: bf16) to compute in on `device`. Warnings
    name the `use`, such as "decoding".

    fp16 on a CPU runs as bf16, with a warning: its matrix products are hundreds of times slower there. bf16
    on a CPU that has no instructions for it is warned about.
    """
    name = name or "bf16"
    if name not in DTYPES:
        hint = did_you_mean(name, DTYPES, cutoff=0.5)
        raise ValueError(f"dtype {name!r} is not one of {', '.join(DTYPES)}{hint}")
    if name == "fp16" and device.type == "cpu":
        logger.warning("fp16 is hundreds of times slower than bf16 on a CPU: %s in bf16", use)
        return torch.bfloat16
    if name == "bf16" and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        logger.warning("this CPU has no bf16 instructions: fp32 is several times faster, in twice the memory")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """As torch calls it, without "torch.": "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def available() -> str:
    """The devices of this machine, for messages: "cpu", "cuda or cpu", ..."""
    return " or ".join([*(kind for kind in ACCELERATORS if is_available(kind)), "cpu"])


def is_available(kind: str) -> bool:
    """Whether there is a device of that kind, one of ACCELERATORS."""
    if kind == "npu" and not hasattr(torch, "npu"):  # which torch_npu adds; `import torch` may have loaded it
        try:
            import torch_npu  # noqa: F401  # type: ignore[import-not-found]  (its import registers torch.npu)
        except (ImportError, OSError):  # OSError: it is installed, Ascend's libraries are not
            return False
    return getattr(torch, kind).is_available()


def prepare(device: torch.device, *, allow_tf32: bool | None = None) -> None:
    """Make this process ready for heavy work on `device`.

    On CUDA, `allow_tf32` says whether fp32 matrix products and convolutions run in TF32; None leaves torch's
    settings as they are. On an NPU, tensors keep plain layouts and no kernel is compiled at run time, without
    which convolutions of video are slow or fail; what the environment does not set of time-outs and of the
    allocator is set. On a CPU with glibc, memory that is freed is kept for the next operation instead of
    going back to the kernel, which takes a third of the time otherwise.
    """
    if device.type == "cuda" and allow_tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        torch.backends.cudnn.allow_tf32 = allow_tf32
    if device.type == "npu":
        _prepare_npu()
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def _prepare_npu() -> None:
    for name, value in _NPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    api = getattr(torch, "npu")  # noqa: B009 (torch does not declare it)
    api.set_compile_mode(jit_compile=False)
    api.config.allow_internal_format = False


def free_memory(device: torch.device) -> int:
    """Bytes of a device that are free; of a CPU, those that programs can have without swapping, and no more
    than the container may have.
    """
    if device.type != "cpu":
        free, _total = getattr(torch, device.type).mem_get_info(device)
        return free
    available, allowed = psutil.virtual_memory().available, free_in_container(Path("/sys/fs/cgroup"))
    return available if allowed is None else min(available, allowed)


def total_memory(device: torch.device) -> int:
    """Bytes that a device has, free or not; of a CPU with swap, and no more than the container may have."""
    if device.type != "cpu":
        _free, total = getattr(torch, device.type).mem_get_info(device)
        return total
    total, allowed = psutil.virtual_memory().total, limit_of_container(Path("/sys/fs/cgroup"))
    return (total if allowed is None else min(total, allowed)) + psutil.swap_memory().total


def limit_of_container(folder: Path) -> int | None:
    """Bytes of memory that the control group in `folder` may have at most; None as in `free_in_container`."""
    for place, limit, *_ in _CONTROL_GROUPS:
        with suppress(OSError, ValueError):
            return int((folder / place / limit).read_text())
    return None


def free_in_container(folder: Path) -> int | None:
    """Bytes that the control group in `folder` may still have of memory; cached files make room. None: there
    is no limit, or no control group.
    """
    for place, limit, used, cached in _CONTROL_GROUPS:
        try:
            numbers = dict(line.split() for line in (folder / place / "memory.stat").read_text().splitlines())
            taken = int((folder / place / used).read_text()) - int(numbers[cached])
            return max(0, int((folder / place / limit).read_text()) - taken)
        except (OSError, ValueError, KeyError):  # other control groups, or no limit ("max")
            continue
    return None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised it for full memory. Only its own allocator for devices has a type for that: the
    CPU's, the one for pinned memory, an NPU's and the libraries of kernels say it in words.
    """
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(words in text for words in _FULL)


@contextmanager
def explain_full_memory(what: str) -> Iterator[None]:
    """Turn torch's out-of-memory errors into a MemoryError with the message `what`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(what) from error
