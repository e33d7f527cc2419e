"""Device and dtype names from a user: checked, with what to use instead, before any heavy work."""

import logging

import torch

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(name: str | None) -> torch.device:
    """The device of that name; None or "auto" takes the first of cuda, npu, cpu that is there.

    "npu" imports torch_npu. Raises ValueError if there is no such device on this machine.
    """
    if name in (None, "auto"):
        return next(
            (torch.device(kind) for kind in ("cuda", "npu") if _is_available(kind)), torch.device("cpu")
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not one of cpu, cuda, npu (or cuda:1 and so on)") from None
    if device.type in ("cuda", "npu") and not _is_available(device.type):
        extra = " (torch_npu is not installed or finds no card)" if device.type == "npu" else ""
        raise ValueError(
            f"there is no {device.type} device on this machine{extra}: use --device {available()}"
        )
    if device.type not in ("cpu", "cuda", "npu"):
        raise ValueError(f"device {name!r} is not one of cpu, cuda, npu")
    if device.index is not None and device.type != "cpu":
        count = getattr(torch, device.type).device_count()
        if device.index >= count:
            raise ValueError(f"device {name!r}: there are {count}, the last is {device.type}:{count - 1}")
    return device


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name ("bf16", "fp16", "fp32"; None: bf16) to compute in on `device`.

    fp16 on a CPU runs as bf16, with a warning: its matrix products are hundreds of times slower there.
    """
    name = name or "bf16"
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    if name == "fp16" and device.type == "cpu":
        logger.warning("fp16 is hundreds of times slower than bf16 on a CPU: computing in bf16")
        return torch.bfloat16
    return DTYPES[name]


def available() -> str:
    """The devices of this machine, for messages: "cpu", "cuda or cpu", ..."""
    return " or ".join([kind for kind in ("cuda", "npu") if _is_available(kind)] + ["cpu"])


def _is_available(kind: str) -> bool:
    if kind == "npu":
        try:
            import torch_npu  # noqa: F401  # type: ignore[import-not-found]  (its import registers torch.npu)
        except ImportError:
            return False
    return getattr(torch, kind).is_available()
