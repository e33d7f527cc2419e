"""What works on a device here, and how fast: tried, not looked up. For `osp doctor`."""

import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    attention_backend,
    dispatch_attention_fn,
)
from torch import Tensor
from torch.nn import functional as F

from opensoraplan.models.attention import attention
from opensoraplan.models.convolution import channels_last
from opensoraplan.models.sizes import BatchShape, DenoiserSizes, attention_flops, forward_flops

_HEAD = 128  # the release's head width
# Side of a matrix, tokens of attention, channels and width of a convolution.
_CARD_SIZES, _CPU_SIZES = (8192, 8192, 320, 128), (1024, 1024, 64, 64)


class Trial(NamedTuple):
    """An attention backend: whether it works, whether it also masks keys; else why not, in a sentence."""

    name: str
    works: bool
    masks: bool
    reason: str


class Speed(NamedTuple):
    """TFLOP/s of a matrix product, of attention, and of a 3-D convolution as the VAE has them."""

    product: float
    attention: float
    convolution: float


def try_attention(device: torch.device, dtype: torch.dtype) -> Iterator[Trial]:
    """Each of diffusers' backends on the device, but for those that would download kernels."""
    q = torch.randn(1, 256, 2, _HEAD).to(device, dtype)
    mask = (torch.arange(256) < 200).to(device)[None, None, None]
    for backend in AttentionBackendName:
        if "hub" in backend.value:
            continue
        reason = _failure(backend.value, lambda: dispatch_attention_fn(q, q, q))
        masked = reason or _failure(backend.value, lambda: attention(q, q, q, mask))
        yield Trial(backend.value, not reason, not masked, reason or masked)


def _failure(backend: str, work: Callable[[], object]) -> str:
    """The first line of what is wrong with some work under a backend; empty if nothing is."""
    try:
        with attention_backend(backend), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except Exception as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return ""


@torch.no_grad()
def measure_speed(device: torch.device, dtype: torch.dtype, *, seconds: float = 10.0) -> Speed:
    """Each for a third of the seconds, the best call counts. Sizes are the release's on a card, and such that
    a call takes a fraction of a second on a CPU.
    """
    side, tokens, channels, width = _CPU_SIZES if device.type == "cpu" else _CARD_SIZES
    a = torch.randn(side, side).to(device, dtype)
    q = torch.randn(1, tokens, 8, _HEAD).to(device, dtype)
    x = channels_last(torch.randn(1, channels, 4, width, width).to(device, dtype))
    weight = torch.randn(channels, channels, 3, 3, 3).to(device, dtype)
    works: list[tuple[int, Callable[[], Tensor]]] = [
        (2 * side**3, lambda: a @ a),
        (4 * tokens**2 * 8 * _HEAD, lambda: attention(q, q, q, None)),
        (2 * 27 * channels**2 * x[0, 0].numel(), lambda: F.conv3d(x, weight, padding=1)),
    ]
    return Speed(*(flops / _best(work, device, seconds / 3) / 1e12 for flops, work in works))


def _best(work: Callable[[], Tensor], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into so many, after a first one."""

    def timed() -> float:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize(device)
        return time.perf_counter() - start

    end = time.perf_counter() + seconds
    timed()
    best = timed()
    while time.perf_counter() < end:
        best = min(best, timed())
    return best


def step_seconds(speed: Speed, model: DenoiserSizes, shape: BatchShape) -> float:
    """Of a guided step of this size, at these speeds of products and of attention."""
    tokens = shape.tokens(model.config["patch_size"])
    flops = forward_flops(model.config, shape)
    attended = sum(attention_flops(model.dim, tokens, shape.text, rate=block.rate) for block in model.blocks)
    return 2 * ((flops - attended) / speed.product + attended / speed.attention) / 1e12
