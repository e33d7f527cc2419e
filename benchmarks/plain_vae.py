"""WF-VAE in the plain formulation, that of the original: what vae_speed.py compares with.

Haar transforms are one small convolution for each band of each colour, norms permute the channels to the end
and back, causal padding repeats and concatenates, all in the default layout. Weights are those of our model.
"""

import copy
from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensoraplan.models import wfvae
from opensoraplan.models.wfvae import COLOURS, HAAR_BANDS, WFVAE, CausalConv3d, ChannelNorm, Decoder, Encoder


def plain(model: WFVAE) -> WFVAE:
    """A copy that computes the same in the plain formulation, clip by clip, without streaming."""
    copied = copy.deepcopy(model)
    copied.disable_streaming()
    for module in copied.modules():
        if isinstance(module, CausalConv3d):
            module.forward = MethodType(_causal_conv, module)
        elif isinstance(module, ChannelNorm):
            module.forward = MethodType(_norm, module)
        elif isinstance(module, Encoder | Decoder):
            module.forward = _with_plain_haar(module.forward)
    return copied


def _causal_conv(self: CausalConv3d, x: Tensor, _stream: None = None) -> Tensor:
    if self.before:
        x = torch.cat([x[:, :, :1].repeat(1, 1, self.before, 1, 1), x], dim=2)
    return self.conv(x.contiguous())


def _norm(self: ChannelNorm, x: Tensor) -> Tensor:
    return self.norm(x.permute(0, 2, 3, 4, 1).contiguous()).permute(0, 4, 1, 2, 3).contiguous()


def _with_plain_haar(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, stream: None = None) -> Tensor:
        ours = wfvae.haar, wfvae.inverse_haar
        wfvae.haar, wfvae.inverse_haar = _haar, _inverse_haar  # type: ignore[assignment]
        try:
            return forward(x, stream)
        finally:
            wfvae.haar, wfvae.inverse_haar = ours

    return run


def _filters(like: Tensor) -> list[Tensor]:
    """[1, 1, 2, 2, 2] of each band."""
    whole = wfvae.haar_filter(like)
    return [whole[COLOURS * band, :1][None] for band in range(len(HAAR_BANDS))]


def _haar(x: Tensor, _stream: None) -> Tensor:
    x = torch.cat([x[:, :, :1], x], dim=2)
    bands = [
        torch.cat([F.conv3d(x[:, c : c + 1], taps, stride=2) for c in range(COLOURS)], dim=1)
        for taps in _filters(x)
    ]
    return torch.cat(bands, dim=1)


def _inverse_haar(coefficients: Tensor, _stream: None) -> Tensor:
    total: Tensor | None = None
    for band, taps in enumerate(_filters(coefficients)):
        part = coefficients[:, COLOURS * band : COLOURS * (band + 1)]
        grown = torch.cat(
            [F.conv_transpose3d(part[:, c : c + 1], taps, stride=2) for c in range(COLOURS)], dim=1
        )
        total = grown if total is None else total + grown
    assert total is not None
    return total[:, :, 1:]


def count_flops(model: nn.Module, run: Callable[[], object]) -> float:
    """FLOPs of all convolutions with learned weights that `run` calls."""
    total = 0.0

    def count(module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += 2.0 * weight[0].numel() * output.numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    run()
    for handle in handles:
        handle.remove()
    return total
