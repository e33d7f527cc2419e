"""A VAE that the package does not know: linear in patches of 4 x 4 x 4 pixels, the first frame repeated."""

from collections.abc import Iterable, Iterator

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from opensoraplan.models.strict import StrictMixin, Whole
from opensoraplan.shapes import Strides

SIDE = 4


class PatchVAE(StrictMixin, ModelMixin, ConfigMixin):
    """A `VideoVAE`. Its latents are divided by `spread` for the denoiser."""

    strides = Strides(SIDE, SIDE)
    tiling = None

    @register_to_config
    def __init__(self, *, channels: Whole = 3, spread: float = 0.5) -> None:  # noqa: ARG002 (it is in the config)
        super().__init__()
        self.encoder = nn.Conv3d(3, 2 * channels, SIDE, SIDE)
        self.decoder = nn.ConvTranspose3d(channels, 3, SIDE, SIDE)
        self.enable_streaming()

    @property
    def latent_channels(self) -> int:
        return self.config["channels"]

    def enable_streaming(self, *, latent_frames: int = 4) -> None:
        self.streaming_latent_frames: int | None = latent_frames

    def disable_streaming(self) -> None:
        self.streaming_latent_frames = None

    def enable_tiling(self) -> None:
        raise ValueError("this VAE has no tiles")

    def iter_encode(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        clip = torch.cat(list(pieces), dim=2)
        yield self.encoder(torch.cat([clip[:, :, :1].expand(-1, -1, SIDE - 1, -1, -1), clip], dim=2))

    def iter_decode(self, z: Tensor) -> Iterator[Tensor]:
        step = self.streaming_latent_frames or z.shape[2]
        for place, chunk in enumerate(z.split(step, dim=2)):
            yield self.decoder(chunk)[:, :, 0 if place else SIDE - 1 :]

    def normalize_latents(self, latents: Tensor) -> Tensor:
        return latents / self.config["spread"]

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        return latents * self.config["spread"]

    def encoding_bytes(self, grid: tuple[int, int, int]) -> int:
        return 2 * 3 * SIDE**3 * grid[0] * grid[1] * grid[2] * self.dtype.itemsize

    def decoding_bytes(self, grid: tuple[int, int, int], *, chunk: int) -> int:
        frames, rows, columns = grid
        return 3 * SIDE**3 * min(frames, chunk) * rows * columns * self.dtype.itemsize
