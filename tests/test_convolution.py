"""The VAE's convolution on CPUs against torch's in fp64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensoraplan.models import convolution
from opensoraplan.models.wfvae import CausalConv3d, StreamState

# Largest error over the standard deviation, which is 1. Measured: 2e-6; 0.02 (torch's own: 0.02).
ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.04}


def problem(dtype: torch.dtype, *, channels: int, frames: int, clips: int = 1) -> tuple[CausalConv3d, Tensor]:
    torch.manual_seed(frames)
    layer = CausalConv3d(channels, out_channels=16).to(dtype).requires_grad_(False)
    nn.init.normal_(layer.conv.weight, std=(27 * channels) ** -0.5)
    return layer, torch.randn(clips, channels, frames, 6, 5).to(dtype)


def exact(layer: CausalConv3d, x: Tensor) -> Tensor:
    padded = torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2).double()
    assert layer.conv.bias is not None
    return F.conv3d(padded, layer.conv.weight.double(), layer.conv.bias.double(), padding=(0, 1, 1))


@pytest.mark.parametrize("group", [1, 2**14])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 9, 10])
@pytest.mark.parametrize(
    ("dtype", "channels"), [(torch.float32, 24), (torch.bfloat16, 24), (torch.bfloat16, 512)]
)
def test_it_is_the_convolution(dtype: torch.dtype, channels: int, frames: int, group: int) -> None:
    layer, x = problem(dtype, channels=channels, frames=frames, clips=2)
    with torch.no_grad():
        assert convolution.applies(layer.conv, x)
        made = layer(x)
        grouped = convolution.causal_conv3d(None, x, layer.conv.weight, layer.conv.bias, group=group)
    assert made.dtype == dtype
    assert made.is_contiguous(memory_format=torch.channels_last_3d)
    for result in (made, grouped):
        assert (result - exact(layer, x)).abs().max() < ERROR[dtype]


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 3, 2, 3], [5, 4], [2, 1, 6]])
def test_a_clip_may_come_in_chunks(sizes: list[int]) -> None:
    layer, x = problem(torch.float32, channels=24, frames=9)
    stream = StreamState()
    with torch.no_grad():
        made = torch.cat([layer(chunk, stream) for chunk in x.split(sizes, dim=2)], dim=2)
    assert (made - exact(layer, x)).abs().max() < ERROR[torch.float32]


def test_winograd_is_no_less_exact_than_torch() -> None:
    layer, x = problem(torch.float32, channels=512, frames=9)
    with torch.no_grad():
        ours = (layer(x) - exact(layer, x)).square().mean()
    theirs = (layer(x.requires_grad_()) - exact(layer, x)).square().mean()
    assert ours < 1.5 * theirs


def test_gradients_and_other_convolutions_are_left_to_torch() -> None:
    layer, x = problem(torch.float32, channels=24, frames=3)
    assert not convolution.applies(layer.conv, x)
    with torch.no_grad():
        assert not convolution.applies(layer.conv, x.half())
        for other in (
            CausalConv3d(24, out_channels=8, stride=2, padding=0),
            CausalConv3d(24, out_channels=8, kernel=1, padding=0),
        ):
            assert not convolution.applies(other.conv, x)
