"""The patch discriminator, its losses, and the perceptual distance of clips."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from opensoraplan.train.methods.adversarial import (
    PatchDiscriminator3d,
    adaptive_weight,
    hinge_loss,
    load_lpips,
    perceptual_loss,
)


def discriminator(*, channels: int = 4, layers: int = 3) -> PatchDiscriminator3d:
    torch.manual_seed(0)
    return PatchDiscriminator3d(channels=channels, layers=layers)


@pytest.mark.parametrize(
    ("layers", "shape"), [(1, (13, 16, 16)), (2, (7, 8, 8)), (3, (7, 4, 4)), (5, (7, 1, 1))]
)
def test_one_logit_for_each_patch(layers: int, shape: tuple[int, int, int]) -> None:
    model = discriminator(layers=layers)
    assert model(torch.randn(2, 3, 25, 32, 32)).shape == (2, 1, *shape)


def test_the_default_size() -> None:
    widths = [part.weight.shape[:2] for part in PatchDiscriminator3d().net if isinstance(part, nn.Conv3d)]
    assert widths == [(64, 3), (128, 64), (256, 128), (512, 256), (1, 512)]


def test_how_weights_start() -> None:
    for part in discriminator(channels=32).net:
        if isinstance(part, nn.Conv3d):
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert abs(part.weight.mean().item()) < 0.003
        elif isinstance(part, nn.BatchNorm3d):
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.35)
            assert part.weight.mean().item() == pytest.approx(1.0, abs=0.01)
            assert not part.bias.any()


def test_no_layers() -> None:
    with pytest.raises(ValueError, match="at least 1, got channels 64, layers 0"):
        PatchDiscriminator3d(layers=0)


def test_it_learns_to_tell_sharp_from_blurred() -> None:
    model = discriminator(layers=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(15):
        real = torch.randn(2, 3, 5, 16, 16, generator=generator)
        fake = nn.functional.avg_pool3d(real, 3, 1, 1)
        loss = hinge_loss(model(real), model(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9
    assert losses[-1] < 0.3


def test_hinge_loss() -> None:
    assert hinge_loss(torch.tensor([1.0, 5.0]), torch.tensor([-1.0, -3.0])).item() == 0
    assert hinge_loss(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0])).item() == pytest.approx(1.0)


def losses_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of norm 6 and 3."""
    return 3 * (weight * torch.tensor([2.0, 0.0])).sum(), (weight * torch.tensor([0.0, 3.0])).sum()


def test_adaptive_weight_is_the_ratio_of_the_gradients() -> None:
    last_layer = nn.Parameter(torch.zeros(2))
    reconstruction, adversarial = losses_of(last_layer)
    weight = adaptive_weight(reconstruction, adversarial, last_layer)
    assert weight.item() == pytest.approx(0.5 * 6 / 3, rel=1e-4)
    assert not weight.requires_grad
    assert last_layer.grad is None
    (reconstruction + weight * adversarial).backward()  # both graphs are still there
    assert last_layer.grad is not None
    assert last_layer.grad.tolist() == pytest.approx([6.0, 3.0], rel=1e-4)
    assert adaptive_weight(*losses_of(last_layer), last_layer, factor=2.0).item() == pytest.approx(
        4.0, rel=1e-4
    )


def test_adaptive_weight_is_bounded() -> None:
    last_layer = nn.Parameter(torch.zeros(2))
    reconstruction, adversarial = losses_of(last_layer)
    assert adaptive_weight(1e6 * reconstruction, 0 * adversarial, last_layer).item() == 0.5 * 1e4


class FrameDistance(nn.Module):
    """Mean absolute difference of pictures, after a look at their shape."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 4, 6)
        return (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)


def test_perceptual_loss_is_the_mean_over_frames() -> None:
    x = torch.zeros(2, 3, 5, 4, 6)
    y = x.clone()
    y[0, :, 3] = 1.0  # one of ten frames
    assert perceptual_loss(FrameDistance(), x, y).item() == pytest.approx(0.1)
    y[1, 0] = 3.0  # a third of the values of half of the frames
    assert perceptual_loss(FrameDistance(), x, y).item() == pytest.approx(0.6)


def test_clips_of_two_shapes() -> None:
    with pytest.raises(ValueError, match=r"of one shape, got \[1, 3, 5, 4, 6\], \[1, 3, 1, 4, 6\]"):
        perceptual_loss(FrameDistance(), torch.zeros(1, 3, 5, 4, 6), torch.zeros(1, 3, 1, 4, 6))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"opensoraplan\[lpips\].*loss\.perceptual to 0"):
        load_lpips(torch.device("cpu"))


def test_without_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", nn)  # any module: it is not come to
    with pytest.raises(ValueError, match=r"vgg16-397923af\.pth.*loss\.perceptual to 0"):
        load_lpips(torch.device("cpu"))
