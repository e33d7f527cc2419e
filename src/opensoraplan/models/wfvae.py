"""WF-VAE 8x8x8: the wavelet-flow causal video autoencoder of Open-Sora Plan v1.5.0 (arXiv 2411.17459),
top to bottom.

No training losses, no file formats. Shapes: B batch, C channels, T frames, H/W pixels, k + 1 latent frames
for T = 8k + 1. Every layer takes a `StreamState`, or None for a whole clip: what it has to remember from the
chunk before. Module names are the original's own, so that its files need no renaming.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from opensoraplan.models import convolution, original
from opensoraplan.models.chunks import (
    Tile,
    blend,
    frame_chunks,
    latent_chunks,
    latents_at_a_time,
    tile_starts,
)
from opensoraplan.models.sizes import PRECISIONS, BatchShape, decoding_memory, encoding_memory
from opensoraplan.models.strict import Depth, Numbers, PositiveNumbers, StrictMixin, Whole
from opensoraplan.shapes import (
    COLOURS,
    RELEASE,
    SPATIAL_STRIDE,
    TEMPORAL_STRIDE,
    TILE_SIZE,
    check_frames,
    check_sides,
)

logger = logging.getLogger(__name__)

HAAR_TAP = 0.3536  # the original's rounding of 1 / sqrt(8)
# Sign of the second tap along (t, h, w), in the original's band order and with its names.
HAAR_BANDS = {
    "h": (1, 1, 1),
    "g": (1, 1, -1),
    "hh": (1, -1, 1),
    "gh": (1, -1, -1),
    "h_v": (-1, 1, 1),
    "g_v": (-1, 1, -1),
    "hh_v": (-1, -1, 1),
    "gh_v": (-1, -1, -1),
}
COEFFICIENTS = COLOURS * len(HAAR_BANDS)

# Per channel, so that (latent - shift) * scale is what the denoiser works on. From the release's config.
RELEASE_SHIFT = (
    -0.2129, 0.1226, 1.6328, 0.6211, -0.8750, 0.6172, -0.5703, 0.1348,
    -0.2178, -0.9375, 0.3184, 0.3281, -0.0544, -0.1826, -0.2812, 0.4355,
    0.1621, -0.2578, 0.7148, -0.7422, -0.2295, -0.2324, -1.4922, 0.6328,
    1.1250, -0.2578, -2.1094, 1.0391, 1.1797, -1.2422, -0.2988, -0.9570,
)  # fmt: skip
RELEASE_SCALE = (
    0.7031, 0.7109, 1.5391, 1.2969, 0.7109, 1.4141, 1.3828, 2.1719,
    1.7266, 1.8281, 1.9141, 1.2031, 0.6875, 0.9609, 1.6484, 1.1875,
    1.5312, 1.1328, 0.8828, 0.6836, 0.8828, 0.9219, 1.6953, 1.4453,
    1.5312, 0.6836, 0.7656, 0.8242, 1.2344, 1.0312, 1.7266, 0.9492,
)  # fmt: skip


_FEW = 32  # channels that are interpolated at a time


@dataclass
class StreamState:
    """State that layers keep from one chunk of a clip to the next. `first`: the chunk starts with frame 0,
    which is special. `lookahead`: frames at the end of the current tensor that the next chunk has again,
    since time upsampling looks one frame ahead; they are not kept.
    """

    first: bool = True
    lookahead: int = 0
    kept: dict[nn.Module, Tensor] = field(default_factory=dict)

    def keep(self, layer: nn.Module, x: Tensor, frames: int) -> None:
        """Keep the last `frames` of x [B, C, T, H, W] that are not look-ahead."""
        end = x.shape[2] - self.lookahead
        self.kept[layer] = x[:, :, end - frames : end].clone()  # a slice would keep all of x alive


# --- Haar transform -----------------------------------------------------------------------------------------


def haar_filter(like: Tensor) -> Tensor:
    """[24, 3, 2, 2, 2]: output channel band * 3 + c is that band of colour c. For both directions."""
    taps = like.new_tensor([[_band_taps(signs)] for signs in HAAR_BANDS.values()])  # [8, 1, 2, 2, 2]
    colours = torch.eye(COLOURS, dtype=like.dtype, device=like.device)
    return (taps[:, None] * colours[None, :, :, None, None, None]).flatten(0, 1)


def _band_taps(signs: tuple[int, int, int]) -> list[list[list[float]]]:
    t, h, w = signs
    return [[[HAAR_TAP * t**i * h**j * w**k for k in (0, 1)] for j in (0, 1)] for i in (0, 1)]


def haar(x: Tensor, stream: StreamState | None) -> Tensor:
    """Colours [B, 3, T, H, W] -> coefficients [B, 24, (T + 1) / 2, H/2, W/2], the
    first frame counted twice.
    """
    if stream is None or stream.first:
        x = torch.cat([x[:, :, :1], x], dim=2)
    return convolution.channels_last(F.conv3d(x, haar_filter(x), stride=2))


def inverse_haar(coefficients: Tensor, stream: StreamState | None) -> Tensor:
    """Coefficients [B, 24, t, h, w] -> colours [B, 3, 2t - 1, 2h, 2w]: the doubled first frame
    is dropped again.
    """
    x = F.conv_transpose3d(coefficients, haar_filter(coefficients), stride=2)
    return x[:, :, 1:] if stream is None or stream.first else x


def add_to_low_band(coefficients: Tensor, low: Tensor) -> Tensor:
    """Add colours [B, 3, t, h, w] to the low-pass band of coefficients [B, 24, t, h, w]. There may be more
    frames of colours: those of look-ahead, which is not needed any more.
    """
    low = low[:, :, : coefficients.shape[2]]
    return torch.cat([coefficients[:, :COLOURS] + low, coefficients[:, COLOURS:]], dim=1)


def haar_levels(x: Tensor, stream: StreamState | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [B, 24, ...] of levels 0, 1 and 2 of colours [B, 3, T, H, W], each of the low band of
    the one before.
    """
    level0 = haar(x, stream)
    level1 = haar(level0[:, :COLOURS], stream)
    return level0, level1, haar(level1[:, :COLOURS], stream)


def fixed_tensors() -> dict[str, Tensor]:
    """The Haar filters that the original's files carry, by their original names: 2 x 3 levels x 8 bands."""
    taps = {band: torch.tensor([[_band_taps(signs)]]) for band, signs in HAAR_BANDS.items()}
    forward = {
        f"encoder.wavelet_transform_{level}.{band}_conv.conv.weight": value
        for level in ("in", "l1", "l2")
        for band, value in taps.items()
    }
    inverse = {
        f"decoder.inverse_wavelet_transform_{level}.{band}": value
        for level in ("out", "l1", "l2")
        for band, value in taps.items()
    }
    return forward | inverse


# --- Layers -------------------------------------------------------------------------------------------------


class CausalConv3d(nn.Module):
    """3-D convolution that sees no later frame: time is padded in front, with the first frame or what
    a stream kept.

    `padding` is spatial. In a stream it keeps the last kernel - stride frames of its input.
    """

    def __init__(
        self, channels: int, *, out_channels: int, kernel: int = 3, stride: int = 1, padding: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, kernel, stride=stride, padding=(0, padding, padding))
        self.before = kernel - 1
        self.overlap = kernel - stride

    def forward(self, x: Tensor, stream: StreamState | None = None) -> Tensor:
        x = convolution.channels_last(x)
        if not self.before:
            return self.conv(x)
        kept = None if stream is None else stream.kept.get(self)
        # `cat` keeps the layout only if all that it joins has it, which no expanded frame would.
        front = [x[:, :, :1]] * self.before if kept is None else [kept]
        if stream is not None:
            last = self.overlap + stream.lookahead
            stream.keep(self, torch.cat([*front, x[:, :, -last:]], dim=2), self.overlap)
        if convolution.applies(self.conv, x):
            return convolution.causal_conv3d(kept, x, self.conv.weight, self.conv.bias)
        x = torch.cat([*front, x], dim=2)
        del front  # it would keep alive what the copy replaces
        return self.conv(x)


class FrameConv2d(nn.Conv2d):
    """The same 3x3 convolution on each frame of [B, C, T, H, W]."""

    def __init__(self, channels: int, *, out_channels: int) -> None:
        super().__init__(channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, stream: StreamState | None = None) -> Tensor:  # noqa: ARG002 (one signature for all)
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of [B, C, T, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def silu(x: Tensor) -> Tensor:
    """SiLU, in place of what no gradient needs."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), of causal 3-D convolutions or, with `conv=FrameConv2d`,
    of 2-D ones.
    """

    def __init__(
        self, channels: int, *, out_channels: int | None = None, conv: Callable[..., nn.Module] = CausalConv3d
    ) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.norm1 = ChannelNorm(channels)
        self.conv1 = conv(channels, out_channels=out_channels)
        self.norm2 = ChannelNorm(out_channels)
        self.conv2 = conv(out_channels, out_channels=out_channels)
        self.nin_shortcut = (
            CausalConv3d(channels, out_channels=out_channels, kernel=1, padding=0)
            if out_channels != channels
            else None
        )

    def forward(self, x: Tensor, stream: StreamState | None = None) -> Tensor:
        # By `forward` and without a name, either of which would keep the input of a convolution alive while
        # it computes on the padded copy.
        h = self.conv2.forward(silu(self.norm2(self.conv1.forward(silu(self.norm1(x)), stream))), stream)
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x)
        return h + x if torch.is_grad_enabled() else h.add_(x)


def with_channels_last(x: Tensor) -> Tensor:
    """x [..., C] with the channels of a position side by side in memory, without which no card's attention
    is computed in pieces. CPUs take any layout, and each has roundings of its own.
    """
    return x if x.is_cpu or x.stride(-1) == 1 else x.contiguous()


class FrameAttention(nn.Module):
    """Full attention within each frame, one head, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.q, self.k, self.v, self.proj_out = (
            CausalConv3d(channels, out_channels=channels, kernel=1, padding=0) for _ in range(4)
        )

    def forward(self, x: Tensor, stream: StreamState | None = None) -> Tensor:  # noqa: ARG002 (one signature for all)
        h = self.norm(x)
        q, k, v = (
            with_channels_last(proj(h).permute(0, 2, 3, 4, 1).flatten(2, 3))
            for proj in (self.q, self.k, self.v)
        )  # [B, T, HW, C]
        out = F.scaled_dot_product_attention(q, k, v).unflatten(2, x.shape[3:])
        return x + self.proj_out(out.movedim(-1, 1))


class Downsample(nn.Module):
    """Half the frames (T -> (T + 1) / 2), half the sides: one zero behind H and W, then a
    strided causal convolution.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, out_channels=channels, stride=2, padding=0)

    def forward(self, x: Tensor, stream: StreamState | None = None) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)), stream)


class Upsample(nn.Module):
    """Twice the frames (T -> 2T - 1), twice the sides: trilinear in fp32, then a causal convolution.

    Frame 0 grows only in space; the rest is interpolated in time as a clip of its own. In a stream the frame
    before the chunk, if it is not frame 0, is kept and put in front of it, and the two frames that it becomes
    are dropped again. Of the frames of look-ahead, the first `lookahead` are computed on, as the layers that
    follow need them.
    """

    def __init__(self, channels: int, *, lookahead: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, out_channels=channels)
        self.lookahead = lookahead

    def forward(self, x: Tensor, stream: StreamState | None = None) -> Tensor:
        return self.conv.forward(self._grown(x, stream), stream)  # as in ResnetBlock

    def _grown(self, x: Tensor, stream: StreamState | None) -> Tensor:
        if stream is None:
            return self._from_frame_0(x)
        before = stream.kept.get(self)
        if x.shape[2] > 1 or not stream.first:
            stream.keep(self, x, 1)
        if stream.first:
            grown = self._from_frame_0(x)
        elif before is None:
            grown = self._grow(x, time=2)
        else:
            grown = self._grow(torch.cat([before, x], dim=2), time=2)[:, :, 2:]
        ahead = min(stream.lookahead, self.lookahead)
        grown = grown[:, :, : grown.shape[2] + ahead - 2 * stream.lookahead]
        stream.lookahead = ahead
        return grown

    def _from_frame_0(self, x: Tensor) -> Tensor:
        parts = [self._grow(x[:, :, :1], time=1)]
        if x.shape[2] > 1:
            parts.append(self._grow(x[:, :, 1:], time=2))
        return torch.cat(parts, dim=2)

    @staticmethod
    def _grow(x: Tensor, *, time: int) -> Tensor:
        # Without gradients some devices compute in fp32 and round once by themselves, which saves the copies.
        # For the others few channels are in fp32 at a time.
        interpolate = partial(F.interpolate, scale_factor=(time, 2, 2), mode="trilinear")
        if torch.is_grad_enabled() or x.dtype == torch.float32:
            return interpolate(x.float()).to(x.dtype)
        if x.device.type in ("cpu", "cuda", "meta"):
            return interpolate(x)
        batch, channels, *sides = x.shape
        grown = x.new_empty(
            batch, channels, *(side * by for side, by in zip(sides, (time, 2, 2), strict=True))
        )
        for part, into in zip(x.split(_FEW, dim=1), grown.split(_FEW, dim=1), strict=True):
            into.copy_(interpolate(part.float()))
        return grown


def run(layers: Iterable[nn.Module], x: Tensor, stream: StreamState | None) -> Tensor:
    """x through layers that each take (x, stream)."""
    for layer in layers:
        x = layer(x, stream)
    return x


# --- Encoder and decoder ------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Pixels [B, 3, T, H, W] -> moments [B, 2 * latent channels, (T - 1) / 8 + 1, H/8, W/8].

    The coefficients of three Haar levels flow in beside the main path.
    """

    def __init__(self, base: int, *, latent_channels: int, num_resblocks: int, flow_channels: int) -> None:
        super().__init__()
        two, four = 2 * base, 4 * base
        self.down1 = nn.Sequential(
            FrameConv2d(COEFFICIENTS, out_channels=base),
            *(ResnetBlock(base, conv=FrameConv2d) for _ in range(num_resblocks)),
            Downsample(base),
        )
        self.down2 = nn.Sequential(
            FrameConv2d(base + flow_channels, out_channels=two),
            *(ResnetBlock(two) for _ in range(num_resblocks)),
            Downsample(two),
        )
        self.connect_l1 = FrameConv2d(COEFFICIENTS, out_channels=flow_channels)
        self.connect_l2 = FrameConv2d(COEFFICIENTS, out_channels=flow_channels)
        self.mid = nn.Sequential(
            ResnetBlock(two + flow_channels, out_channels=four), FrameAttention(four), ResnetBlock(four)
        )
        self.norm_out = ChannelNorm(four)
        self.conv_out = CausalConv3d(four, out_channels=2 * latent_channels)

    def forward(self, x: Tensor, stream: StreamState | None = None) -> Tensor:
        level0, level1, level2 = haar_levels(x, stream)
        h = run(self.down1, level0, stream)
        h = run(self.down2, torch.cat([h, self.connect_l1(level1)], dim=1), stream)
        h = run(self.mid, torch.cat([h, self.connect_l2(level2)], dim=1), stream)
        return self.conv_out(silu(self.norm_out(h)), stream)


class Decoder(nn.Module):
    """Latents [B, latent channels, t, h, w] -> pixels [B, 3, 8 (t - 1) + 1, 8h, 8w].

    The last `flow_channels` of two of its stages leave the main path and become the coefficients of Haar
    levels 2 and 1; each level's inverse is added to the low band of the one above.
    """

    def __init__(
        self,
        base: int,
        *,
        latent_channels: int,
        num_resblocks: int,
        flow_channels: int,
        connect_resblocks: int,
    ) -> None:
        super().__init__()
        two, four = 2 * base, 4 * base
        self.flow_channels = flow_channels
        self.conv_in = CausalConv3d(latent_channels, out_channels=four)
        self.mid = nn.Sequential(
            ResnetBlock(four), FrameAttention(four), ResnetBlock(four, out_channels=four + flow_channels)
        )
        self.up2 = nn.Sequential(
            *(ResnetBlock(four) for _ in range(num_resblocks)),
            Upsample(four, lookahead=1),
            ResnetBlock(four, out_channels=four + flow_channels),
        )
        self.up1 = nn.Sequential(
            ResnetBlock(four, out_channels=two),
            *(ResnetBlock(two) for _ in range(num_resblocks - 1)),
            Upsample(two, lookahead=0),
            ResnetBlock(two),
        )
        self.layer = nn.Sequential(ResnetBlock(two, out_channels=base), ResnetBlock(base))
        self.connect_l1, self.connect_l2 = (
            nn.Sequential(
                *(ResnetBlock(flow_channels) for _ in range(connect_resblocks)),
                FrameConv2d(flow_channels, out_channels=COEFFICIENTS),
            )
            for _ in range(2)
        )
        self.norm_out = ChannelNorm(base)
        self.conv_out = FrameConv2d(base, out_channels=COEFFICIENTS)

    def forward(self, z: Tensor, stream: StreamState | None = None) -> Tensor:
        return self.with_coefficients(z, stream)[0]

    def with_coefficients(
        self, z: Tensor, stream: StreamState | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels and the coefficients of levels 1 and 2 that they are made of; for the wavelet loss."""
        h, flow = self._part(run(self.mid, self.conv_in(z, stream), stream))
        level2 = run(self.connect_l2, flow, stream)
        h, flow = self._part(run(self.up2, h, stream))
        level1 = add_to_low_band(run(self.connect_l1, flow, stream), inverse_haar(level2, stream))
        h = run(self.layer, run(self.up1, h, stream), stream)
        level0 = add_to_low_band(self.conv_out(silu(self.norm_out(h))), inverse_haar(level1, stream))
        return inverse_haar(level0, stream), level1, level2

    def _part(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h[:, : -self.flow_channels], h[:, -self.flow_channels :]


# --- Model --------------------------------------------------------------------------------------------------


def shift_and_scale(config: Mapping[str, Any], like: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale, each [C, 1, 1, 1], of a VAE's `config`, with the dtype and device of `like`; where the
    config has None, they are 0 and 1.
    """
    channels = config["latent_channels"]
    shift = like.new_tensor(config["shift"] or [0.0] * channels)
    scale = like.new_tensor(config["scale"] or [1.0] * channels)
    return shift.view(-1, 1, 1, 1), scale.view(-1, 1, 1, 1)


class WFVAE(StrictMixin, original.OriginalModel, ModelMixin, ConfigMixin):
    """The video autoencoder of Open-Sora Plan v1.5.0. The defaults are the release:
    227,035,624 learned values.

    Args:
        base_channels: width of the first stage; the others have 2 and 4 times that. latent_channels: channels
        of the latents. encoder_num_resblocks, decoder_num_resblocks: resnets of each stage.
        encoder_energy_flow_hidden_size, decoder_energy_flow_hidden_size: channels of the wavelet flow beside
        the main path.
        connect_res_layer_num: resnets of the decoder's flow.
        shift, scale: per latent channel; the denoiser works on (latents - shift) * scale. None: 0 and 1.

    Streaming (exact, in time) is on after construction; tiling (inexact, in space) is off. Source:
    docs/model.md section 2, arXiv 2411.17459.
    """

    original_config = staticmethod(original.vae_config)
    _supports_gradient_checkpointing = False
    _no_split_modules = ["ResnetBlock"]  # noqa: RUF012
    strides = RELEASE

    @register_to_config
    def __init__(
        self,
        *,
        base_channels: Whole = 160,
        latent_channels: Whole = 32,
        encoder_num_resblocks: Depth = 2,
        decoder_num_resblocks: Depth = 2,
        encoder_energy_flow_hidden_size: Whole = 128,
        decoder_energy_flow_hidden_size: Whole = 128,
        connect_res_layer_num: Depth = 1,
        shift: Numbers | None = RELEASE_SHIFT,
        scale: PositiveNumbers | None = RELEASE_SCALE,
    ) -> None:
        super().__init__()
        for name, values in (("shift", shift), ("scale", scale)):
            if values is not None and len(values) != latent_channels:
                raise ValueError(f"{name} has {len(values)} values for {latent_channels} latent channels")
        self.encoder = Encoder(
            base_channels,
            latent_channels=latent_channels,
            num_resblocks=encoder_num_resblocks,
            flow_channels=encoder_energy_flow_hidden_size,
        )
        self.decoder = Decoder(
            base_channels,
            latent_channels=latent_channels,
            num_resblocks=decoder_num_resblocks,
            flow_channels=decoder_energy_flow_hidden_size,
            connect_resblocks=connect_res_layer_num,
        )
        self.enable_streaming()
        self.disable_tiling()

    def original_format(self) -> original.Format:
        """How the original names these tensors: as we do, and its files carry the Haar filters besides."""
        return original.Format(fixed=fixed_tensors())

    @property
    def latent_channels(self) -> int:
        return self.config["latent_channels"]

    def decoding_bytes(self, grid: tuple[int, int, int], *, chunk: int) -> int:
        """Memory to decode latents [1, C, *grid], `chunk` latent frames at a time, besides weights."""
        shape, base = BatchShape(grid, 0), self.config["base_channels"]
        return decoding_memory(shape, PRECISIONS[self.dtype], base=base, chunk=chunk, tiling=self.tiling)

    def encoding_bytes(self, grid: tuple[int, int, int]) -> int:
        """Memory to encode a clip whose latents are [1, C, *grid], besides weights."""
        chunk, base = self.streaming_latent_frames or grid[0], self.config["base_channels"]
        return encoding_memory(BatchShape(grid, 0), PRECISIONS[self.dtype], base=base, chunk=chunk)

    def enable_streaming(self, *, latent_frames: int = 4) -> None:
        """Encode and decode in chunks of `latent_frames` latent frames (8 times as many frames): the same
        result up to rounding, in memory that does not grow with the clip.
        """
        if latent_frames < 1:
            raise ValueError(f"latent_frames must be at least 1, got {latent_frames}")
        self.streaming_latent_frames: int | None = latent_frames

    def disable_streaming(self) -> None:
        """Encode and decode each clip whole."""
        self.streaming_latent_frames = None

    def enable_tiling(self, *, tile_size: int = TILE_SIZE, tile_overlap: int = 64) -> None:
        """Encode and decode in overlapping square tiles, in pixels, blended linearly. Saves memory on large
        frames and is NOT exact: attention and convolutions see no further than their tile.
        """
        for name, value in (("tile_size", tile_size), ("tile_overlap", tile_overlap)):
            if value % SPATIAL_STRIDE or value < SPATIAL_STRIDE:
                nearest = max(SPATIAL_STRIDE, round(value / SPATIAL_STRIDE) * SPATIAL_STRIDE)
                raise ValueError(f"{name} must be a multiple of {SPATIAL_STRIDE}, got {value}: use {nearest}")
        if tile_overlap > tile_size // 2:
            raise ValueError(
                f"tile_overlap must be at most half of tile_size {tile_size}, got {tile_overlap}"
            )
        self.tiling: tuple[int, int] | None = tile_size, tile_overlap

    def disable_tiling(self) -> None:
        """Encode and decode whole frames."""
        self.tiling = None

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """(latents - shift) * scale per channel of [B, C, T, H, W]: what the denoiser works on."""
        shift, scale = shift_and_scale(self.config, latents)
        return (latents - shift) * scale

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize_latents`: what `decode` takes."""
        shift, scale = shift_and_scale(self.config, latents)
        return latents / scale + shift

    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Posterior of pixels [B, 3, T, H, W] in [-1, 1]: `.latent_dist` with moments
        [B, 2 C, (T - 1) / 8 + 1, H/8, W/8]. ValueError unless T = 8k + 1 and sides are multiples of 8."""
        check_frames(x.shape[2])
        posterior = DiagonalGaussianDistribution(torch.cat(list(self.iter_encode([x])), dim=2))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pixels [B, 3, 8 (t - 1) + 1, 8h, 8w], about [-1, 1], of latents [B, C,
        t, h, w] (not normalised).
        """
        sample = torch.cat(list(self.iter_decode(z)), dim=2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def iter_encode(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Moments [B, 2 C, t, H/8, W/8] chunk by chunk, of a clip that comes in pieces [B, 3, t, H, W]
        of any length.

        Raises ValueError for sides that are not multiples of 8 and, at the end, for a clip that is not 8k
        + 1 long.
        """
        first = next(pieces := iter(pieces), None)
        if first is None:
            check_frames(0)
            return
        check_sides(*first.shape[3:], multiple=SPATIAL_STRIDE)
        tiles = self._tiles(*first.shape[3:], unit=1)
        base = self.config["base_channels"]
        step = self._latents_at_a_time(first, tiles, unit=1, width=base)
        for chunk in frame_chunks(chain([first], pieces), step and TEMPORAL_STRIDE * step):
            yield self._run_tiles(self.encoder, chunk, tiles, zoom=1 / SPATIAL_STRIDE)

    def iter_decode(self, z: Tensor) -> Iterator[Tensor]:
        """Pixels [B, 3, t, 8h, 8w] chunk by chunk, so that a long clip never is in memory whole. Joined in
        time they are what `decode` gives; without streaming there is one chunk.
        """
        channels = self.config["latent_channels"]
        if z.ndim != 5 or z.shape[1] != channels:
            raise ValueError(f"this VAE decodes latents [B, {channels}, T, H, W], got {list(z.shape)}")
        tiles = self._tiles(*z.shape[3:], unit=SPATIAL_STRIDE)
        base = self.config["base_channels"]
        step = self._latents_at_a_time(z, tiles, unit=SPATIAL_STRIDE, width=2 * base)
        for start, stop, ahead in latent_chunks(z.shape[2], step):
            chunk = z[:, :, start:stop]
            yield self._run_tiles(self.decoder, chunk, tiles, zoom=SPATIAL_STRIDE, lookahead=ahead)

    def _tiles(self, height: int, width: int, *, unit: int) -> list[Tile]:
        """The tiles of a frame whose sides are given in `unit` pixels: one if tiling is off or
        the frame small.
        """
        tile, overlap = (
            (max(height, width), 0) if self.tiling is None else (side // unit for side in self.tiling)
        )
        streaming = self.streaming_latent_frames is not None
        return [
            Tile(slice(top, top + tile), slice(left, left + tile), StreamState() if streaming else None)
            for top in tile_starts(height, tile, overlap)
            for left in tile_starts(width, tile, overlap)
        ]

    def _latents_at_a_time(self, x: Tensor, tiles: list[Tile], *, unit: int, width: int) -> int | None:
        """Of clips x, or their latents, whose sides are in `unit` pixels, by layers that have `width`
        channels at half of them; None: all.
        """
        if self.streaming_latent_frames is None:
            return None
        tile = x[0, 0, 0, tiles[0].rows, tiles[0].columns]
        frame = x.shape[0] * width * tile.numel() * unit**2 // 4
        return latents_at_a_time(self.streaming_latent_frames, frame=frame)

    def _run_tiles(
        self, coder: nn.Module, x: Tensor, tiles: list[Tile], *, zoom: float, lookahead: int = 0
    ) -> Tensor:
        outputs = []
        for tile in tiles:
            if tile.stream is not None:
                tile.stream.lookahead = lookahead
            outputs.append(coder(x[..., tile.rows, tile.columns], tile.stream))
            if tile.stream is not None:
                tile.stream.first = False
        if len(outputs) == 1:
            return outputs[0]
        assert self.tiling is not None
        overlap = self.tiling[1] if zoom < 1 else self.tiling[1] // SPATIAL_STRIDE
        return blend(outputs, tiles, (x.shape[3], x.shape[4]), overlap, zoom)
