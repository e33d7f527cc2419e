"""Streaming against the whole, generators, tiling, the Haar transform and errors of the VAE."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from tiny_models import VAE
from torch import Tensor

from opensoraplan.models.chunks import blend, frame_chunks, latent_chunks, tile_starts
from opensoraplan.models.wfvae import (
    WFVAE,
    StreamState,
    Tile,
    Upsample,
    fixed_tensors,
    haar,
    inverse_haar,
)

SMALL = {**VAE, "shift": [0.1, -0.2, 0.3, 0.0], "scale": [2.0, 1.0, 0.5, 1.5]}
STREAMED = 1e-5  # relative; measured: 1e-6


@pytest.fixture(scope="module")
def vae() -> WFVAE:
    torch.manual_seed(0)
    return WFVAE(**SMALL).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def defaults(vae: WFVAE) -> Iterator[None]:
    yield
    vae.enable_streaming()
    vae.disable_tiling()


def clip(frames: int, height: int = 32, width: int = 24) -> Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("frames", [1, 9, 17, 25, 33, 57])
@pytest.mark.parametrize("latent_frames", [1, 2, 3, 5, 8])
def test_streamed_is_whole(vae: WFVAE, frames: int, latent_frames: int) -> None:
    vae.disable_streaming()
    moments = vae.encode(clip(frames)).latent_dist.parameters
    pixels = vae.decode(moments[:, :4]).sample
    assert pixels.shape == (1, 3, frames, 32, 24)
    vae.enable_streaming(latent_frames=latent_frames)
    assert relative(vae.encode(clip(frames)).latent_dist.parameters, moments) < STREAMED
    assert relative(vae.decode(moments[:, :4]).sample, pixels) < STREAMED


def test_streaming_really_runs_in_chunks(vae: WFVAE) -> None:
    vae.enable_streaming(latent_frames=2)
    latents = torch.randn(1, 4, 6, 4, 3)
    assert [chunk.shape[2] for chunk in vae.iter_decode(latents)] == [17, 16, 8]
    assert [chunk.shape[2] for chunk in vae.iter_encode([clip(41)])] == [3, 2, 1]
    vae.disable_streaming()
    assert [chunk.shape[2] for chunk in vae.iter_decode(latents)] == [41]


@pytest.mark.parametrize("pieces", [[25], [1, 24], [3, 3, 3, 16], [8, 8, 8, 1], [1] * 25])
def test_a_clip_may_come_in_any_pieces(vae: WFVAE, pieces: list[int]) -> None:
    whole = vae.encode(clip(25)).latent_dist.parameters
    moments = torch.cat(list(vae.iter_encode(clip(25).split(pieces, dim=2))), dim=2)
    assert relative(moments, whole) < STREAMED


def test_two_clips_at_once_do_not_mix(vae: WFVAE) -> None:
    one, two = torch.randn(2, 1, 4, 5, 4, 4)
    alone = [vae.decode(z).sample for z in (one, two)]
    mixed: list[list[Tensor]] = [[], []]
    for chunks in zip(vae.iter_decode(one), vae.iter_decode(two), strict=True):
        for kept, chunk in zip(mixed, chunks, strict=True):
            kept.append(chunk)
    for kept, expected in zip(mixed, alone, strict=True):
        assert torch.equal(torch.cat(kept, dim=2), expected)


def test_chunks_cover_every_latent_once() -> None:
    for frames in range(1, 20):
        for step in range(1, 7):
            covered = [
                i for start, stop, ahead in latent_chunks(frames, step) for i in range(start, stop - ahead)
            ]
            assert covered == list(range(frames))
    assert list(latent_chunks(7, None)) == [(0, 7, 0)]
    clip = torch.zeros(1, 3, 25, 8, 8)
    chunks = list(frame_chunks([clip], 16))
    assert [chunk.shape[2] for chunk in chunks] == [17, 8]
    storages = {chunk.untyped_storage().data_ptr() for chunk in chunks}
    assert storages == {clip.untyped_storage().data_ptr()}, "a clip in one piece is not copied"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upsampling_rounds_once(dtype: torch.dtype) -> None:
    x = torch.randn(1, 6, 5, 7, 4).to(dtype)
    layer = Upsample(6, lookahead=0)
    expected = layer._from_frame_0(x.float()).to(dtype)
    with torch.no_grad():
        assert torch.equal(layer._from_frame_0(x), expected)
    assert torch.equal(layer._from_frame_0(x), expected)


def test_haar_is_undone_by_its_inverse() -> None:
    x = clip(9, 8, 8)
    coefficients = haar(x, None)
    assert coefficients.shape == (1, 24, 5, 4, 4)
    torch.testing.assert_close(
        inverse_haar(coefficients, None), x, atol=2e-3, rtol=0
    )  # 8 * 0.3536^2 is not 1
    stream = StreamState()
    first = haar(x[:, :, :1], stream)
    stream.first = False
    torch.testing.assert_close(torch.cat([first, haar(x[:, :, 1:], stream)], dim=2), coefficients)
    assert len(fixed_tensors()) == 48
    assert sum(value.numel() for value in fixed_tensors().values()) == 2 * 192


def test_normalisation_is_per_channel_and_undone(vae: WFVAE) -> None:
    latents = torch.randn(2, 4, 3, 4, 4)
    normalised = vae.normalize_latents(latents)
    torch.testing.assert_close(normalised[:, 1], latents[:, 1] + 0.2)
    torch.testing.assert_close(normalised[:, 2], (latents[:, 2] - 0.3) * 0.5)
    torch.testing.assert_close(vae.denormalize_latents(normalised), latents)


def test_log_variance_is_clamped_where_it_is_used(vae: WFVAE) -> None:
    posterior = vae.encode(clip(9)).latent_dist
    assert posterior.parameters.shape == (1, 8, 2, 4, 3)
    assert posterior.logvar.min() >= -30
    assert posterior.logvar.max() <= 20
    assert torch.equal(posterior.mode(), posterior.mean)


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [(8, 8, 2), (9, 8, 2), (40, 16, 4), (41, 16, 8), (100, 32, 8)]
)
def test_tiles_cover_everything(size: int, tile: int, overlap: int) -> None:
    starts = tile_starts(size, tile, overlap)
    covered = {i for start in starts for i in range(start, min(start + tile, size))}
    assert covered == set(range(size))
    assert all(b - a <= tile - overlap for a, b in pairwise(starts))


@pytest.mark.parametrize("zoom", [1, 2])
def test_blended_cuttings_are_the_picture(zoom: int) -> None:
    picture = torch.randn(1, 3, 2, 20 * zoom, 28 * zoom)
    tiles = [
        Tile(slice(top, top + 8), slice(left, left + 8), None)
        for top in tile_starts(20, 8, 3)
        for left in tile_starts(28, 8, 3)
    ]
    cuttings = [
        picture[..., t.rows.start * zoom : t.rows.stop * zoom, t.columns.start * zoom : t.columns.stop * zoom]
        for t in tiles
    ]
    torch.testing.assert_close(blend(cuttings, tiles, (20, 28), 3, zoom), picture)


@pytest.mark.parametrize("streaming", [True, False])
def test_tiled_is_not_far_from_the_whole(vae: WFVAE, streaming: bool) -> None:
    """With random weights the attention of each tile differs much; a wrong place or stream would differ by
    1 and more.
    """
    y, x = torch.meshgrid(torch.linspace(-1, 1, 160), torch.linspace(-1, 1, 192), indexing="ij")
    video = torch.stack([x, y, x * y])[None, :, None] * torch.linspace(0.5, 1, 17)[:, None, None]
    if not streaming:
        vae.disable_streaming()
    moments = vae.encode(video).latent_dist.parameters
    pixels = vae.decode(moments[:, :4]).sample
    vae.enable_tiling(tile_size=96, tile_overlap=32)
    tiled = vae.encode(video).latent_dist.parameters
    assert 0 < relative(tiled, moments) < 0.4
    assert 0 < relative(vae.decode(moments[:, :4]).sample, pixels) < 0.4


def test_small_frames_are_not_tiled(vae: WFVAE) -> None:
    whole = vae.encode(clip(9)).latent_dist.parameters
    vae.enable_tiling(tile_size=64, tile_overlap=16)
    assert torch.equal(vae.encode(clip(9)).latent_dist.parameters, whole)


def test_no_tensor_has_more_numbers_than_32_bits_count() -> None:
    with torch.device("meta"):
        vae, latents = WFVAE().requires_grad_(False), torch.randn(1, 32, 16, 72, 128)
        video = torch.randn(1, 3, 121, 576, 1024)
    vae.enable_streaming(latent_frames=16)
    # 320 channels of 288 x 512: 45 frames, of which two are in front. Half of that to encode.
    assert [pixels.shape[2] for pixels in vae.iter_decode(latents)] == [81, 40]
    assert [moments.shape[2] for moments in vae.iter_encode([video])] == [16]
    assert [moments.shape[2] for moments in vae.iter_encode([video.repeat(2, 1, 1, 1, 1)])] == [11, 5]
    vae.enable_tiling()
    assert len(list(vae.iter_decode(latents))) == 1


@pytest.mark.parametrize(("frames", "named"), [(29, "use 25 or 33"), (10, "use 9 or 17"), (8, "use 1 or 9")])
def test_other_frame_counts_are_refused(vae: WFVAE, frames: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        vae.encode(clip(frames))
    with pytest.raises(ValueError, match=named):
        list(vae.iter_encode(clip(frames).split(4, dim=2)))


def test_errors_name_what_is_valid(vae: WFVAE) -> None:
    with pytest.raises(ValueError, match="multiples of 8, got width 20: the nearest valid size is 32 x"):
        vae.encode(clip(9, 32, 20))
    with pytest.raises(ValueError, match=r"decodes latents \[B, 4, T, H, W\], got \[1, 3, 2, 4, 4\]"):
        vae.decode(torch.zeros(1, 3, 2, 4, 4))
    with pytest.raises(ValueError, match="tile_size must be a multiple of 8, got 100: use 96"):
        vae.enable_tiling(tile_size=100)
    with pytest.raises(ValueError, match="at most half of tile_size 64, got 40"):
        vae.enable_tiling(tile_size=64, tile_overlap=40)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        vae.enable_streaming(latent_frames=0)
    with pytest.raises(ValueError, match="shift has 32 values for 4 latent channels"):
        WFVAE(base_channels=8, latent_channels=4)


def test_gradients_flow_through_streams(vae: WFVAE) -> None:
    video = clip(17).requires_grad_()
    gradients = []
    for toggle in (vae.disable_streaming, vae.enable_streaming):
        toggle()
        vae.encode(video).latent_dist.parameters.square().sum().backward()
        assert video.grad is not None
        gradients.append(video.grad.clone())
        video.grad = None
    assert relative(gradients[1], gradients[0]) < STREAMED
