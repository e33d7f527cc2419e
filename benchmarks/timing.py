"""What the benchmarks share: seconds of a call, and how fast this machine multiplies and convolves."""

import ctypes
import gc
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from opensoraplan.device import prepare, resolve_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def ready(name: str | None) -> torch.device:
    """The device of that name, prepared as `osp` prepares it."""
    device = resolve_device(name)
    prepare(device)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)  # the one that `wait` waits for
    return device


def resident_peak() -> int:
    """The most bytes of memory that this process had, on Linux. Not getrusage's, which begins with what the
    process had that started this one.
    """
    return resident("VmHWM")


def begin_peak() -> int:
    """Let `resident_peak` begin anew, after all that is free has gone back to the kernel; the bytes that are
    resident now. For glibc.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """Bytes that this process has resident (VmRSS), or had at most (VmHWM); of Linux."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def seconds(work: Callable[[], object], *, repeat: int = 1, warm: int = 1, calls: int = 1) -> float:
    """The least of `repeat` times that `work` takes, each the mean of `calls`, after `warm` calls that
    are not timed.
    """
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeat):
        wait()
        began = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        times.append((time.perf_counter() - began) / calls)
    return min(times)


def wait() -> None:
    """Until the accelerator, if there is one, has done what it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def gemm_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large product of random matrices."""
    size, calls = (4096, 1) if device.type == "cpu" else (8192, 20)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, repeat=5, warm=2, calls=calls)


def conv_peak(
    dtype: torch.dtype,
    device: torch.device,
    *,
    channels: int = 320,
    shape: tuple[int, int, int] = (10, 64, 64),
) -> float:
    """FLOP/s of a 3 x 3 x 3 convolution, the better of both layouts."""
    layer = torch.nn.Conv3d(channels, channels, 3, padding=1).to(device, dtype).requires_grad_(False)
    x = torch.randn(1, channels, *shape, device=device).to(dtype)
    flops = 2 * 27 * channels**2 * shape[0] * shape[1] * shape[2]
    times = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        laid_out, conv = x.contiguous(memory_format=layout), layer.to(memory_format=layout)  # type: ignore[call-overload]
        calls = 1 if device.type == "cpu" else 20
        times.append(seconds(lambda x=laid_out, conv=conv: conv(x), repeat=3, calls=calls))
    return flops / min(times)


def machine(device: torch.device) -> str:
    """The device and versions, for a table's caption."""
    if device.type == "cpu":
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    else:
        name = getattr(torch, device.type).get_device_name(device)
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for that, on Linux."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(_of_cpu("flags").split()))


def _cpu_name() -> str:
    return _of_cpu("model name") or platform.processor() or platform.machine()


def _of_cpu(field: str) -> str:
    """What Linux says of the first CPU; empty elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith(field))
    except (OSError, StopIteration):
        return ""
