"""The losses of WF-VAE training (arXiv 2411.17459 and its public code). Pure functions of model and pixels.

Sums over a sample are divided by its pixel values, so that every term is per pixel value and a weight means
what it means in the paper.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from opensoraplan.models.wfvae import WFVAE, haar_levels
from opensoraplan.train.inputs.encoders import sample_posterior


class Reconstruction(NamedTuple):
    """What came out, [B, 3, T, H, W], and three scalars: L1 of the pixels, L1 of the wavelet coefficients of
    levels 1 and 2, and the KL divergence of the posterior from a standard normal distribution.
    """

    pixels: Tensor
    l1: Tensor
    wavelet: Tensor
    kl: Tensor


def reconstruct(
    model: WFVAE,
    x: Tensor,
    noise: Tensor,
    *,
    freeze_encoder: bool = False,
    compute: torch.dtype = torch.float32,
) -> Reconstruction:
    """Encode x [B, 3, T, H, W] whole, sample with `noise` [B, C, t, h, w], decode, compare. Convolutions and
    attention are in `compute` (by autocast), sampling and losses in fp32.
    """
    autocast = partial(torch.autocast, x.device.type, dtype=compute, enabled=compute != torch.float32)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_encoder), autocast():
        moments = model.encoder(x)
    moments = moments.float()
    with autocast():
        made = model.decoder.with_coefficients(sample_posterior(moments, noise))
    pixels, *predicted = (tensor.float() for tensor in made)
    _, *wanted = haar_levels(x)
    wavelet = sum(((p - w).abs().sum() for p, w in zip(predicted, wanted, strict=True)), x.new_zeros(()))
    mean, logvar = moments.chunk(2, dim=1)
    logvar = logvar.clamp(-30, 20)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()
    return Reconstruction(pixels, (pixels - x).abs().mean(), wavelet / x.numel(), kl / x.numel())
