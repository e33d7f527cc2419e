"""Reconstruction: the metrics on known values, and runs of a tiny random WF-VAE on a clip written here."""

import copy
import logging
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import SHALLOW_VAE
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from opensoraplan.data.video import (
    VideoWriter,
    count_frames,
    fit,
    iter_timed_frames,
    probe,
    read_frames,
    to_uint8,
)
from opensoraplan.fidelity import Fidelity
from opensoraplan.generate.reconstruct import Excerpt, reconstruct
from opensoraplan.models.wfvae import WFVAE


@pytest.fixture(scope="module")
def vae() -> WFVAE:
    torch.manual_seed(0)
    return WFVAE(**SHALLOW_VAE, shift=None, scale=None).eval()


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """29 frames of 40 x 56 at 23.976 a second: a square that crosses a slope."""
    frames = torch.zeros(29, 40, 56, 3, dtype=torch.uint8)
    frames[..., 0] = torch.arange(56) * 4
    frames[..., 1] = torch.arange(40)[:, None] * 6
    for index, frame in enumerate(frames):
        frame[8:24, index : index + 16] = torch.tensor([250, 240, 30])
    with VideoWriter(tmp_path / "clip.mp4", fps=23.976) as writer:
        writer.write(frames)
    return writer.path


def noisy(frames: torch.Tensor) -> torch.Tensor:
    noise = torch.randint(-20, 21, frames.shape, generator=torch.Generator().manual_seed(1))
    return (frames.int() + noise).clamp(0, 255).byte()


def random_frames(count: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 24, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def luma(frames: torch.Tensor) -> torch.Tensor:
    return frames.float() @ torch.tensor([0.2126, 0.7152, 0.0722])


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_equal_videos_have_no_error() -> None:
    fidelity = Fidelity()
    fidelity.update(random_frames(3), random_frames(3))
    assert fidelity.psnr == math.inf
    assert fidelity.ssim == pytest.approx(1, abs=1e-6)


def test_psnr_of_a_known_error() -> None:
    # Each value off by 5 of 255: 20 log10(255 / 5).
    grey = torch.full((2, 16, 16, 3), 100, dtype=torch.uint8)
    fidelity = Fidelity()
    fidelity.update(grey, grey + 5)
    assert fidelity.psnr == pytest.approx(34.151404, abs=1e-5)
    # Flat pictures: only the luminance term is left, (2 a b + c) / (a^2 + b^2 + c), c = 0.01^2.
    a, b = 100 / 255, 105 / 255
    assert fidelity.ssim == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=5e-4)


def test_metrics_in_chunks_are_those_of_the_whole() -> None:
    before, after = random_frames(7), noisy(random_frames(7))
    fidelity = Fidelity()
    for part in (slice(0, 1), slice(1, 5), slice(5, 7)):
        fidelity.update(before[part], after[part])
    pixels = [frames.permute(0, 3, 1, 2) / 255 for frames in (after, before)]
    assert fidelity.psnr == pytest.approx(
        float(peak_signal_noise_ratio(pixels[0], pixels[1], data_range=1.0)), abs=1e-4
    )
    whole = structural_similarity_index_measure(pixels[0], pixels[1], data_range=1.0)
    assert isinstance(whole, torch.Tensor)
    assert fidelity.ssim == pytest.approx(float(whole), abs=1e-5)


def test_a_clip_through_the_vae(
    tmp_path: Path, vae: WFVAE, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "new" / "side.mp4"
    with caplog.at_level(logging.INFO, logger="opensoraplan.generate.reconstruct"):
        result = reconstruct(clip, vae=vae, out=out)
    assert (result.frames, result.height, result.width, result.path) == (25, 40, 56, out)
    info = probe(out)
    assert (info.height, info.width, info.fps, count_frames(out)) == (40, 112, Fraction(24000, 1001), 25)

    source = fit(read_frames(clip, count=25), height=40, width=56)
    with torch.no_grad():
        (posterior,) = vae.encode(source[None], return_dict=False)
        decoded = vae.decode(posterior.mode(), return_dict=False)[0][0]
    expected = Fidelity()
    expected.update(to_uint8(source), to_uint8(decoded))
    assert result.psnr == pytest.approx(expected.psnr, abs=0.01)
    assert result.ssim == pytest.approx(expected.ssim, abs=1e-3)
    # 4:2:0 video keeps the luma of such noise, but not its colours.
    left, right = (luma(frames) for frames in read_frames(out).split(56, dim=2))
    assert correlation(left, luma(to_uint8(source))) > 0.99
    assert correlation(right, luma(to_uint8(decoded))) > 0.95
    assert correlation(left, right) < 0.5

    assert "the last 4 of 29 frames are left out" in caplog.text
    assert f"25 frames of 40 x 56, PSNR {result.psnr:.2f} dB, SSIM {result.ssim:.4f} -> {out}" in caplog.text


def test_size_length_and_rate_that_are_asked_for(tmp_path: Path, vae: WFVAE, clip: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    out = tmp_path / "side.mp4"
    result = reconstruct(
        clip,
        vae=vae,
        out=out,
        excerpt=Excerpt(frames=9, height=24, width=16, fps=8),
        progress=lambda *step: steps.append(step),
    )
    assert (result.frames, result.height, result.width) == (9, 24, 16)
    info = probe(result.path)
    assert (info.frames, info.fps, info.height, info.width) == (9, 8, 24, 32)
    assert [step for step in steps if step[0] == "encode"] == [("encode", 8, 9), ("encode", 9, 9)]
    assert [step for step in steps if step[0] == "decode"] == [("decode", 9, 9)]


def test_one_side_follows_the_other(tmp_path: Path, vae: WFVAE, clip: Path) -> None:
    by_height = reconstruct(clip, vae=vae, out=tmp_path / "side.mp4", excerpt=Excerpt(height=24, frames=1))
    by_width = reconstruct(clip, vae=vae, out=tmp_path / "side.mp4", excerpt=Excerpt(width=112, frames=1))
    assert (by_height.height, by_height.width) == (24, 32)  # 33.6
    assert (by_width.height, by_width.width) == (80, 112)
    assert [by_height.path.name, by_width.path.name] == ["side.mp4", "side_1.mp4"]


def test_frames_of_a_varying_rate_keep_their_times(tmp_path: Path, vae: WFVAE) -> None:
    """Stills of a second, in the middle and at the end."""
    starts = [Fraction(i, 24) + (i > 7) for i in range(17)]
    times = list(zip(starts, [*starts[1:], starts[-1] + 1], strict=True))
    with VideoWriter(tmp_path / "clip.mp4", fps=24, timed=True) as writer:
        writer.write(random_frames(17), times=times)
    assert [time for _, time in iter_timed_frames(writer.path, count=17)] == times
    result = reconstruct(writer.path, vae=vae, out=tmp_path / "side.mp4")
    assert [time for _, time in iter_timed_frames(result.path, count=17)] == times
    assert (probe(result.path).variable, probe(result.path).fps) == (True, 24)
    even = reconstruct(writer.path, vae=vae, out=tmp_path / "side.mp4", excerpt=Excerpt(fps=12))
    assert probe(even.path).frames == even.frames == 25  # of 32: 2.67 s
    assert not probe(even.path).variable


def test_a_photo_that_is_stored_lying_is_reconstructed_upright(tmp_path: Path, vae: WFVAE) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    slope = np.linspace(0, 255, 40 * 56 * 3, dtype=np.uint8).reshape(40, 56, 3)
    Image.fromarray(slope).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    result = reconstruct(tmp_path / "photo.jpg", vae=vae, out=tmp_path / "side.mp4")
    assert (result.frames, result.height, result.width) == (1, 56, 40)


def test_half_precision(tmp_path: Path, vae: WFVAE, clip: Path) -> None:
    whole = reconstruct(clip, vae=vae, out=tmp_path / "side.mp4", excerpt=Excerpt(frames=9))
    half = copy.deepcopy(vae).bfloat16()
    result = reconstruct(clip, vae=half, out=tmp_path / "side.mp4", excerpt=Excerpt(frames=9))
    assert result.psnr == pytest.approx(whole.psnr, abs=0.5)


def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path: Path, vae: WFVAE, clip: Path) -> None:
    out = tmp_path / "side.mp4"
    with pytest.raises(ValueError, match=r"got 10: use 9 or 17"):
        reconstruct(clip, vae=vae, out=out, excerpt=Excerpt(frames=10))
    with pytest.raises(ValueError, match=r"clip\.mp4 has 29 frames, asked for 33: use 25 or fewer"):
        reconstruct(clip, vae=vae, out=out, excerpt=Excerpt(frames=33))
    with pytest.raises(ValueError, match=r"has 10 frames, asked for 17: use 9 or fewer"):
        reconstruct(clip, vae=vae, out=out, excerpt=Excerpt(frames=17, fps=8))
    with pytest.raises(ValueError, match=r"height 30.*nearest valid size is 32 x 56"):
        reconstruct(clip, vae=vae, out=out, excerpt=Excerpt(height=30, width=56))
    with pytest.raises(ValueError, match="sides of at least 16, got 8 x 16"):
        reconstruct(clip, vae=vae, out=out, excerpt=Excerpt(height=8, width=16))
    with pytest.raises(FileNotFoundError, match="missing"):
        reconstruct(tmp_path / "missing.mp4", vae=vae, out=out)
    assert os.listdir(tmp_path) == ["clip.mp4"]


def test_a_result_that_is_not_finite_stops(tmp_path: Path, vae: WFVAE, clip: Path) -> None:
    broken = copy.deepcopy(vae)
    torch.nn.init.constant_(next(broken.decoder.parameters()), math.nan)
    with pytest.raises(ValueError, match=r"not finite in torch\.float32"):
        reconstruct(clip, vae=broken, out=tmp_path / "side.mp4", excerpt=Excerpt(frames=9))
    assert os.listdir(tmp_path) == ["clip.mp4"]
