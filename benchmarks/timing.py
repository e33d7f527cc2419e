"""What the benchmarks share: seconds of a call, and how fast this machine multiplies and convolves."""

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
    return device


def resident_peak() -> int:
    """The most bytes of memory that this process had, on Linux. Not getrusage's, which begins with what the
    process had that started this one.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def seconds(work: Callable[[], object], *, repeat: int = 1, warm: int = 1) -> float:
    """The least of `repeat` times that `work` takes, after `warm` calls that are not timed."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeat):
        _wait()
        began = time.perf_counter()
        work()
        _wait()
        times.append(time.perf_counter() - began)
    return min(times)


def gemm_peak(dtype: torch.dtype, device: torch.device, *, size: int = 4096) -> float:
    """FLOP/s of a large product of random matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, repeat=5, warm=2)


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
        times.append(seconds(lambda x=laid_out, conv=conv: conv(x), repeat=3))
    return flops / min(times)


def machine(device: torch.device) -> str:
    """The device and versions, for a table's caption."""
    if device.type == "cpu":
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    else:
        name = getattr(torch, device.type).get_device_name(device)
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
