"""What is asked of a VAE, whichever it is, and the VAEs that there are: another one is a file with its class,
and a line here.

Shapes: B videos, C latent channels, T frames and t latent frames, H/W and h/w sides, by the VAE's strides.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from opensoraplan.models.wfvae import WFVAE
from opensoraplan.shapes import Strides


class VideoVAE(Protocol):
    """A frozen VAE of videos: a `StrictMixin, ModelMixin, ConfigMixin`, whose config, which tells all but the
    weights, is saved and read by `_class_name`. The first frame is a latent frame of its own.

    `strides`: how many pixels are one latent. `streaming_latent_frames`: how many latent frames are decoded
    at a time, None for all at once; a VAE without such a choice takes no note of it. `tiling`: size and
    overlap of tiles in pixels; None: frames are decoded whole.
    """

    strides: Strides
    streaming_latent_frames: int | None
    tiling: tuple[int, int] | None

    @property
    def config(self) -> Any: ...  # noqa: ANN401 (diffusers' dict)
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def latent_channels(self) -> int: ...

    def register_to_config(self, **values: Any) -> None: ...  # noqa: ANN401
    def enable_streaming(self, *, latent_frames: int = 4) -> None: ...
    def disable_streaming(self) -> None: ...
    def enable_tiling(self) -> None: ...

    def iter_encode(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Moments [B, 2 C, t, h, w] of the posterior, chunk by chunk, of a clip in pieces [B, 3, T, H, W]."""
        ...

    def iter_decode(self, z: Tensor) -> Iterator[Tensor]:
        """Pixels [B, 3, T, H, W], about [-1, 1], chunk by chunk, of latents [B, C, t, h, w]."""
        ...

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """What the denoiser works on, by the config alone: weights may be on the meta device."""
        ...

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize_latents`."""
        ...

    def decoding_bytes(self, grid: tuple[int, int, int], *, chunk: int) -> int:
        """Memory to decode latents [1, C, *grid], `chunk` latent frames at a time, besides weights."""
        ...

    def encoding_bytes(self, grid: tuple[int, int, int]) -> int:
        """Memory to encode a clip whose latents are [1, C, *grid], besides weights."""
        ...

    def save_config(self, save_directory: Path) -> None: ...
    def to(self, *args: Any) -> Any: ...  # noqa: ANN401 (of nn.Module, as the next)
    def eval(self) -> Self: ...
    def get_submodule(self, target: str) -> nn.Module: ...
    def children(self) -> Iterator[nn.Module]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def buffers(self) -> Iterator[Tensor]: ...
    def state_dict(self) -> Any: ...  # noqa: ANN401
    def requires_grad_(self, requires_grad: bool) -> Any: ...  # noqa: ANN401


# By the names of their classes, which their configs have.
VAES: Mapping[str, Any] = {"WFVAE": WFVAE}


def vae_class(name: str) -> Any:  # noqa: ANN401 (a class)
    """The VAE of that name. Raises ValueError, which names those that there are."""
    if name not in VAES:
        raise ValueError(f"there is no VAE {name!r}: it must be one of {', '.join(VAES)}")
    return VAES[name]


def vae_without_weights(name: str, config: Mapping[str, Any], *, where: str) -> VideoVAE:
    """A VAE of that class and config on the meta device: what its latents are. Raises ValueError, which
    begins with `where`, for a config that makes none.
    """
    kind = vae_class(name)
    kind.check_config(config, where=where)
    with torch.device("meta"):
        return kind(**config)
