"""What WF-VAE training compares clips with besides pixels: a patch discriminator, and LPIPS if it is there.

Not here: the other losses and the weights of all of them (vae_losses.py). Clips are [B, 3, T, H, W] in
[-1, 1]. Source: docs/model.md section 5, arXiv 2411.17459.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST_WEIGHT = 1e4
_WIDEST = 8  # times the first width
# The file that torchvision keeps VGG-16 in, which lpips computes with.
_BACKBONE = "vgg16-397923af.pth"


class PatchDiscriminator3d(nn.Module):
    """3-D PatchGAN: 3x3x3 convolutions say of each patch of a clip how real it looks.

    `layers` convolutions halve height and width, the first two also time; a further one does not; each but
    the first is followed by a batch norm, all by LeakyReLU 0.2; the last makes logits. Widths double from
    `channels`, up to eight times as many. Weights start from N(0, 0.02), those of norms from N(1, 0.02).
    """

    def __init__(self, *, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        if channels < 1 or layers < 1:
            raise ValueError(
                f"channels and layers must be at least 1, got channels {channels}, layers {layers}"
            )
        widths = [channels * min(2**layer, _WIDEST) for layer in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv3d(3, widths[0], 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            stride = (1, 1, 1) if layer == layers else (2 if layer == 1 else 1, 2, 2)
            parts += [
                # The batch norm has the bias.
                nn.Conv3d(widths[layer - 1], widths[layer], 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm3d(widths[layer]),
                nn.LeakyReLU(0.2),
            ]
        parts.append(nn.Conv3d(widths[-1], 1, 3, padding=1))
        self.net = nn.Sequential(*parts)
        for part in parts:
            if isinstance(part, nn.Conv3d):
                nn.init.normal_(part.weight, 0.0, 0.02)
            elif isinstance(part, nn.BatchNorm3d):
                nn.init.normal_(part.weight, 1.0, 0.02)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits [B, 1, t, h, w] of clips [B, 3, T, H, W]: high where they look real."""
        return self.net(clips)


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss: 0 once logits are above 1 on real and below -1 on fake clips. Scalar."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, *, factor: float = 0.5
) -> Tensor:
    """Weight for the adversarial loss: `factor` * |gradient of the reconstruction loss| / |gradient of the
    adversarial one|, both of the decoder's `last_layer` weight; the ratio at most 1e4. Detached scalar.

    Both graphs stay for the backward pass.
    """
    (reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    ratio = reconstruction.norm() / (adversarial.norm() + 1e-4)
    return factor * ratio.clamp(0.0, LARGEST_WEIGHT).detach()


def load_lpips(device: torch.device) -> nn.Module:
    """The perceptual distance LPIPS (VGG), frozen. Nothing is downloaded: raises ValueError, with what to
    do, if the package or the VGG weights are not there.
    """
    try:
        import lpips  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(
            f"the perceptual loss needs the package lpips ({error}): "
            'pip install "opensoraplan[lpips]", or set loss.perceptual to 0'
        ) from None
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONE
    if not weights.is_file():
        raise ValueError(
            f"the perceptual loss needs the weights {weights}, which are not there: put in place "
            f"https://download.pytorch.org/models/{_BACKBONE}, or set loss.perceptual to 0"
        )
    return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False).to(device)


def perceptual_loss(lpips: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean distance of the frames of clips `x` and `y` [B, 3, T, H, W]. `lpips` takes two batches of pictures
    [N, 3, H, W] in [-1, 1]. Scalar.
    """
    if x.shape != y.shape or x.ndim != 5:
        raise ValueError(f"clips must be [B, 3, T, H, W] of one shape, got {list(x.shape)}, {list(y.shape)}")
    return lpips(*(clips.transpose(1, 2).flatten(0, 1) for clips in (x, y))).mean()
