"""The pixels of a pipeline: given frames are encoded here, latents decoded.

Shapes: B videos, C latent channels, T/H/W latent grid.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from torch import Tensor

from opensoraplan.data.video import to_uint8
from opensoraplan.given_frames import GivenFrames, fit_frames
from opensoraplan.models.vae import VideoVAE
from opensoraplan.shapes import pixel_frames


@dataclass(frozen=True, eq=False)
class GivenLatents:
    """Normalised latents in fp32 of frames that a video is given: `first` [1, C, t, H, W], which it begins
    with, and `last` [1, C, 1, H, W] of a picture that it ends with. None: it is free there.
    """

    first: Tensor | None = None
    last: Tensor | None = None

    def __bool__(self) -> bool:
        return self.first is not None or self.last is not None

    def over(self, frames: int, *, batch: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The `frames` and `given` of `Conditions` for videos of so many latent frames: a last frame is one
        more behind them.
        """
        parts = [part for part in (self.first, self.last) if part is not None]
        if not parts:
            return None, None
        start = 0 if self.first is None else self.first.shape[2]
        free = parts[0].new_zeros(*parts[0].shape[:2], frames - start, *parts[0].shape[3:])
        parts.insert(int(start > 0), free)
        clean = torch.cat(parts, dim=2)
        given = torch.ones(1, clean.shape[2], dtype=torch.bool, device=clean.device)
        given[:, start:frames] = False
        return clean.expand(batch, -1, -1, -1, -1), given.expand(batch, -1)


class VideoCoding:
    """What a pipeline does with its VAE. Made for `DiffusionPipeline`, whose parts and devices these use."""

    vae: VideoVAE
    is_decoding: bool
    _execution_device: torch.device

    def _fit_frames(self, grid: tuple[int, int, int], **given: Any) -> GivenFrames:  # noqa: ANN401
        """The arguments of `fit_frames` for videos of this latent grid, checked."""
        if all(one is None for one in given.values()):
            return GivenFrames()
        if self.vae is None:
            raise ValueError("this pipeline has no VAE, which pictures and clips are encoded with")
        strides = self.vae.strides
        frames = fit_frames(height=grid[1] * strides.spatial, width=grid[2] * strides.spatial, **given)
        frames.check(pixel_frames(grid[0], strides=strides), strides=strides)
        return frames

    def encode_frames(self, given: GivenFrames) -> GivenLatents:
        """The latents of given frames."""
        both = (None if one is None else self.encode_pixels(one[None]) for one in (given.first, given.last))
        return GivenLatents(*both)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised latents [B, C, t, h, w] of pixels [B, 3, T, H, W] in [-1, 1]: means of the posterior, in
        fp32 on the pipeline's device.
        """
        with self._vae_at_work():
            device = self._execution_device
            pieces = [pixels.to(device, self.vae.dtype)]
            means = [moments.float().chunk(2, dim=1)[0] for moments in self.vae.iter_encode(pieces)]
            return self.vae.normalize_latents(torch.cat(means, dim=2))

    @contextmanager
    def _vae_at_work(self) -> Iterator[None]:
        """The VAE is on the device meanwhile: offloading moves a model when its `forward` is called, which
        encoding and decoding do not do.
        """
        hook = getattr(self.vae, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self.vae)
        yield
        if isinstance(hook, CpuOffload):
            self.vae.to("cpu")  # type: ignore[arg-type]

    def iter_decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode normalised latents [B, C, T, H, W] chunk by chunk, so that a long video is never in memory
        as a whole. Yields frames [B, 3, t, height, width] in [0, 1], fp32 on the CPU. Raises
        FloatingPointError if they are not finite.
        """
        for pixels in self._decode_pixels(latents):
            yield (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()

    def iter_pictures(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode one video as `iter_decode`, but to uint8 [t, height, width, 3] for files. Rounded on the
        device, so that a quarter of the bytes is copied from it.
        """
        for pixels in self._decode_pixels(latents):
            yield to_uint8(pixels[0]).cpu()

    @torch.no_grad()
    def _decode_pixels(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield pixels [B, 3, t, height, width], about [-1, 1], chunk by chunk."""
        self.is_decoding = True
        with self._vae_at_work():
            latents = self.vae.denormalize_latents(latents.to(self._execution_device, torch.float32))
            for pixels in self.vae.iter_decode(latents.to(self.vae.dtype)):
                if not torch.isfinite(pixels).all():
                    raise FloatingPointError(
                        f"the decoded frames are not finite in {self.vae.dtype}: try dtype bf16 or fp32"
                    )
                yield pixels
        self.is_decoding = False
