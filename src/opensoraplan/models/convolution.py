"""The causal 3 x 3 x 3 convolution on CPUs, without gradients: as torch's, but faster, in less memory.

Some frames at a time, so that no clip is copied to get two frames in front. In fp32 arithmetic is the limit,
and Winograd's F(2, 3) along time needs a third less of it (Lavin and Gray, arXiv 1509.09308): of frames d0 to
d3 and taps g0 to g2, each product a convolution in two dimensions,

    m0 = g0 * (d0 - d2)                      m1 = (g0 + g1 + g2) / 2 * (d1 + d2)
    m2 = (g0 - g1 + g2) / 2 * (d2 - d1)      m3 = g2 * (d1 - d3)

give the frames m0 + m1 + m2 and m1 - m2 - m3. In bf16 they would round too often. There oneDNN falls to
a third of its rate from 512 channels on; in two dimensions, over three frames' channels side by side,
it does not.

Shapes: B batch, C and O channels, T frames, H/W pixels; frames [T, C, H, W] are those of one clip.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WIDE = 512  # channels

# Fills out [T, O, H, W] from frames [T + 2, C, H, W].
_Convolve = Callable[[Tensor, Tensor], None]


def memory_format_of(device_type: str) -> torch.memory_format:
    """How 3-D convolutions of that type of device want their tensors: with channels last, but on Ascend NPUs,
    which know no such layout.
    """
    return torch.contiguous_format if device_type == "npu" else torch.channels_last_3d


def channels_last(x: Tensor) -> Tensor:
    """Clips [B, C, T, H, W] in the layout that their device convolves best, copied from any other."""
    return x.contiguous(memory_format=memory_format_of(x.device.type))


def applies(conv: nn.Conv3d, x: Tensor) -> bool:
    """Whether `causal_conv3d` is for this convolution, of clips x [B, C, T, H, W]. Weights that are stored in
    another dtype, or on another device, come when the module is called, which it then has to be.
    """
    made_for = conv.kernel_size == (3, 3, 3) and conv.stride == (1, 1, 1) and conv.padding == (0, 1, 1)
    on_cpu = x.device.type == conv.weight.device.type == "cpu"
    stored = x.dtype == conv.weight.dtype in (torch.float32, torch.bfloat16)
    return (
        made_for and on_cpu and stored and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    )


def causal_conv3d(
    front: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, *, group: int = 2**25
) -> Tensor:
    """The convolution [B, O, T, H, W] of clips x [B, C, T, H, W] by weight [O, C, 3, 3, 3], with zeros around
    each frame, after the two frames `front` [B, C, 2, H, W]; None: the first frame, twice.

    `group`: bytes of the frames that are computed at a time, which should stay in a cache; two at least.
    """
    out = torch.empty(
        (x.shape[0], weight.shape[0], *x.shape[2:]), dtype=x.dtype, memory_format=torch.channels_last_3d
    )
    if front is None:  # three times the same frame
        whole = _taps(weight).sum(0).permute(0, 3, 1, 2)
        out[:, :, 0] = F.conv2d(x[:, :, 0], whole, bias, padding=1)
        if x.shape[2] == 1:
            return out
    convolve = _in_groups(x.dtype, weight, bias)
    for clip in range(x.shape[0]):
        frames, made = x[clip].transpose(0, 1), out[clip].transpose(0, 1)
        before = [frames[:1]] * 2 if front is None else front[clip].transpose(0, 1).split(1)
        step = max(2, group // frames[:1].nbytes // 2 * 2)
        for start in range(1 if front is None else 0, len(frames), step):
            stop = min(len(frames), start + step)
            near = frames[start - 2 : stop] if start >= 2 else torch.cat([*before[start:], frames[:stop]])
            convolve(near, made[start:stop])
    return out


def _taps(weight: Tensor) -> Tensor:
    """[3, O, 3, 3, C], copied, of weight [O, C, 3, 3, 3]: so summing and convolving are fastest."""
    return weight.permute(2, 0, 3, 4, 1).contiguous()


def _in_groups(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> _Convolve:
    """How a group of frames is convolved, with what that needs of the weight."""
    if dtype == torch.float32:
        first, middle, last = _taps(weight).permute(0, 1, 4, 2, 3)
        outer, middle = (first + last) / 2, middle / 2
        return partial(_winograd, (first, outer + middle, outer - middle, last), weight, bias)
    if weight.shape[1] >= _WIDE:
        taps = weight.permute(0, 3, 4, 2, 1).flatten(3).permute(0, 3, 1, 2)  # [O, 3 C, 3, 3]
        return partial(_side_by_side, taps, bias)
    return partial(_direct, weight, bias)


def _direct(weight: Tensor, bias: Tensor | None, frames: Tensor, out: Tensor) -> None:
    clip = frames.unflatten(0, (1, -1)).transpose(1, 2)  # [None] would hide from torch that channels are last
    out.copy_(F.conv3d(clip, weight, bias, padding=(0, 1, 1))[0].transpose(0, 1))


def _side_by_side(taps: Tensor, bias: Tensor | None, frames: Tensor, out: Tensor) -> None:
    out.copy_(F.conv2d(torch.cat([frames[:-2], frames[1:-1], frames[2:]], dim=1), taps, bias, padding=1))


def _winograd(
    taps: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None, frames: Tensor, out: Tensor
) -> None:
    pairs = len(out) // 2 * 2
    if pairs:
        d0, d1, d2, d3 = (frames[place : place + pairs : 2] for place in range(4))
        both = F.conv2d(d1 + d2, taps[1], bias, padding=1)
        change = F.conv2d(d2 - d1, taps[2], padding=1)
        earlier = F.conv2d(d0 - d2, taps[0], padding=1)
        torch.add(earlier.add_(both), change, out=out[:pairs:2])
        del earlier
        torch.sub(both.sub_(change), F.conv2d(d1 - d3, taps[3], padding=1), out=out[1:pairs:2])
    if pairs < len(out):
        _direct(weight, bias, frames[pairs:], out[pairs:])
