"""`osp doctor`: one page about this machine, to be pasted into a report."""

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from opensoraplan.cli.options import Dtype, OptionalDevice

if TYPE_CHECKING:
    import torch

_PACKAGES = (
    "opensoraplan",
    "torch",
    "torch_npu",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "av",
    "decord",
    "torchcodec",
    "peft",
)
_PREFIXES = ("PYTORCH_", "TORCH_", "NCCL_", "HCCL_", "ASCEND_", "CUDA_VISIBLE", "TASK_QUEUE", "OMP_NUM")
# Where Ascend's toolkit says which version it is.
_CANN = ("latest/version.cfg", "latest/compiler/version.info", "version.cfg")


@dataclass(frozen=True)
class Doctor:
    """Show versions, devices, what works here (tried, not listed), how fast it is, and what that means for
    the released model. Paste it into bug reports. Takes about 20 seconds.
    """

    device: OptionalDevice = None
    """Device to try: cpu, cuda, cuda:1, npu, ..."""
    dtype: Dtype = "bf16"
    """Precision to try it in."""
    seconds: float = 10.0
    """Seconds to measure speed for; 0 leaves it out."""


def doctor(options: Doctor) -> None:
    """`osp doctor`."""
    if options.seconds < 0:
        raise ValueError(f"--seconds must be at least 0, got {options.seconds:g}")

    from opensoraplan.device import prepare, resolve_device, resolve_dtype

    device = resolve_device(options.device)
    prepare(device)
    dtype = resolve_dtype(options.dtype, device)
    for part in (_versions(), _devices(device), _attention(device, dtype), _codecs()):
        _write(part)
    if options.seconds:
        _write(_speed(device, dtype, seconds=options.seconds))


def _write(lines: Iterator[str]) -> None:
    for line in lines:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _versions() -> Iterator[str]:
    import torch

    yield f"Python {platform.python_version()}, {platform.platform()}, {platform.machine()}"
    found = []
    for name in _PACKAGES:
        try:
            # torch itself says which CUDA it was built for, its package need not.
            found.append(f"{name} {torch.__version__ if name == 'torch' else version(name)}")
        except PackageNotFoundError:
            continue
    yield ", ".join(found)
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)]
    yield "environment: " + (" ".join(settings) or "nothing that torch reads")


def _devices(chosen: "torch.device") -> Iterator[str]:
    import torch

    from opensoraplan.device import ACCELERATORS, free_memory, is_available, total_memory

    cpu = torch.device("cpu")
    capability = torch.backends.cpu.get_cpu_capability()
    yield (
        f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}, "
        f"{free_memory(cpu) / 1e9:.1f} of {total_memory(cpu) / 1e9:.1f} GB free"
    )
    for kind in ACCELERATORS:
        if not is_available(kind):
            continue
        api = getattr(torch, kind)
        for index in range(api.device_count()):
            device = torch.device(kind, index)
            free, total = free_memory(device), total_memory(device)
            yield f"{device}: {api.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        if kind == "cuda":
            yield f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        else:
            yield f"CANN {_cann() or 'of unknown version'}"
    yield f"tried below: {chosen}"


def _cann() -> str | None:
    """The version that Ascend's toolkit names; None if it is not found."""
    for home in (os.environ.get("ASCEND_HOME_PATH"), "/usr/local/Ascend/ascend-toolkit", "/usr/local/Ascend"):
        for name in _CANN if home else ():
            path = Path(str(home)) / name
            if path.is_file():
                return " ".join(path.read_text(errors="replace").split())[:80]
    return None


def _attention(device: "torch.device", dtype: "torch.dtype") -> Iterator[str]:
    from opensoraplan.runtime.trials import try_attention

    trials = list(try_attention(device, dtype))
    both = [trial.name for trial in trials if trial.masks]
    unmasked = [trial.name for trial in trials if trial.works and not trial.masks]
    yield f"attention that works: {', '.join(both) or 'none'}"
    yield f"attention that works, but for masked keys: {', '.join(unmasked) or 'none'}"
    yield f"attention that does not work: {', '.join(t.name for t in trials if not t.works) or 'none'}"


def _codecs() -> Iterator[str]:
    """What is written and read of a small video."""
    import torch

    from opensoraplan.data.reading import installed_reader, read_numbered
    from opensoraplan.data.video import VideoWriter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        try:
            with VideoWriter(path, fps=8, title="osp doctor") as writer:
                writer.write(torch.zeros(4, 32, 32, 3, dtype=torch.uint8))
        except Exception as error:
            yield f"writing mp4: {_first_line(error)}"
            return
        yield "writing mp4: works"
        for reader in ("pyav", "decord", "torchcodec"):
            if installed_reader(reader) != reader:  # which says why
                continue
            try:
                frames = read_numbered(path, [0, 3], reader=reader)
                said = "works" if frames.shape[0] == 2 else f"gives {frames.shape[0]} frames of 2"
            except Exception as error:
                said = _first_line(error)
            yield f"reading by {reader}: {said}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _speed(device: "torch.device", dtype: "torch.dtype", *, seconds: float) -> Iterator[str]:
    from opensoraplan.device import dtype_name, free_memory
    from opensoraplan.models.sizes import PRECISIONS, BatchShape, DenoiserSizes
    from opensoraplan.plan.report import FrozenParts, Precisions, needs_by_sizes
    from opensoraplan.runtime.placement import first_that_fits, plans_for
    from opensoraplan.runtime.trials import measure_speed, step_seconds

    speed = measure_speed(device, dtype, seconds=seconds)
    yield (
        f"{dtype_name(dtype)}: {speed.product:.3g} TFLOP/s in matrix products, {speed.attention:.3g} in "
        f"attention, {speed.convolution:.3g} in 3-D convolutions"
    )
    model, shape = DenoiserSizes({}), BatchShape((16, 72, 128), 512)
    took = step_seconds(speed, model, shape)
    yield (
        f"the release, 121 x 576 x 1024: about {took:,.3g} s a guided step, "
        f"{50 * took / 60:,.3g} min for 50 of them"
    )
    if device.type == "cpu":
        return
    precision = PRECISIONS[dtype]
    needs = needs_by_sizes(model, FrozenParts(), shape, Precisions(precision, precision))
    plans, free = plans_for([needs]), free_memory(device)
    try:
        yield f"it fits {device} as --memory {plans[first_that_fits(plans, free=free)]} (predicted)"
    except MemoryError as error:
        yield str(error)
