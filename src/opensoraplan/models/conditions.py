"""What a denoiser is told beside the noisy latents, and the one call of it that training and sampling share.

B samples, C channels of the VAE's latents, T/H/W latent grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensoraplan.models.adaln import Modulation
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.shapes import FeatureShape

# The keys of a denoiser's config that say how wide the features of its texts are.
_WIDTHS = {"sequence": "caption_channels", "pooled": "pooled_projection_dim"}


@dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of B samples. Every method returns new ones.

    `text`: the encoded prompts. `frames` [B, C, T, H, W] are clean latents in fp32, of those latent frames
    that are `given` [B, T]; None for text to video. `padding` [B, T]: frames that are given and that nothing
    looks at, which make samples of one batch equally long.
    """

    text: PromptEmbeds
    frames: Tensor | None = None
    given: Tensor | None = None
    padding: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.frames is None) != (self.given is None):
            raise ValueError("clean frames and `given` belong together: give both, or neither")
        if self.frames is None or self.given is None:
            return
        wanted = (self.batch_size, self.frames.shape[2])
        if self.given.shape != wanted:
            raise ValueError(
                f"given must be [samples, latent frames], {list(wanted)}, got {list(self.given.shape)}"
            )

    @property
    def batch_size(self) -> int:
        return self.text.batch_size

    @property
    def generated(self) -> Tensor | None:
        """Where there is something to generate: True in [B, 1, T, 1, 1]; None for all frames."""
        return None if self.given is None else ~self.given[:, None, :, None, None]

    def restore(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T, H, W] with the given frames in their places."""
        if self.frames is None or (generated := self.generated) is None:
            return latents
        return torch.where(generated, latents, self.frames)

    def extend(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T, H, W] with as many frames as those that are given, zeros behind."""
        more = 0 if self.frames is None else self.frames.shape[2] - latents.shape[2]
        return F.pad(latents, (0, 0, 0, 0, 0, more)) if more else latents

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditions:
        """On `device`, the text in `dtype`; None leaves either as it is."""
        moved = (None if tensor is None else tensor.to(device=device) for tensor in self._of_frames)
        return Conditions(self.text.to(device, dtype), *moved)

    def repeat(self, n: int) -> Conditions:
        """Each sample `n` times in a row: a, b becomes a, a, b, b for n = 2."""
        repeated = (None if one is None else one.repeat_interleave(n, dim=0) for one in self._of_frames)
        return Conditions(self.text.repeat(n), *repeated)

    @property
    def _of_frames(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.frames, self.given, self.padding

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """The samples of all `parts` in one batch. Shorter texts are padded; all or none have frames."""
        text = PromptEmbeds.cat([part.text for part in parts])
        joined = []
        for tensors in zip(*(part._of_frames for part in parts), strict=True):
            there = [tensor for tensor in tensors if tensor is not None]
            if there and len(there) < len(parts):
                raise ValueError(
                    f"{len(there)} of {len(parts)} parts have clean frames: give them to all or none"
                )
            joined.append(torch.cat(there) if there else None)
        return Conditions(text, *joined)


def text_features(config: Mapping[str, Any]) -> dict[str, FeatureShape]:
    """The features of a text that the denoiser of this config is told, with their shapes."""
    return {"sequence": (None, config[_WIDTHS["sequence"]]), "pooled": (config[_WIDTHS["pooled"]],)}


def wrong_features(
    config: Mapping[str, Any], given: Mapping[str, FeatureShape], *, have: str = "the text encoders give"
) -> list[str]:
    """A sentence, which begins with `have`, about each feature that is `given` in another shape than the
    denoiser of this config needs, or not at all.
    """
    return [
        f"{have} {f'{name} {_shown(given[name])}' if name in given else f'no {name}'}, "
        f"the denoiser needs {_shown(shape)} ({_WIDTHS[name]})"
        for name, shape in text_features(config).items()
        if given.get(name) != shape
    ]


def _shown(shape: FeatureShape) -> str:
    return f"[{', '.join('tokens' if side is None else str(side) for side in shape)}]"


def denoise(
    model: nn.Module,
    latents: Tensor,
    timestep: Tensor,
    conditions: Conditions,
    *,
    modulation: Modulation | None = None,
) -> Tensor:
    """Velocity [B, C, T, H, W] in fp32 of noisy latents [B, C, T, H, W] at `timestep` (1000 * sigma) [B], or
    [B, T] where frames have sigmas of their own. The frames that the conditions give are looked at as they
    are, at timestep 0; what is predicted for them means nothing.

    The model, a `SparseUMMDiT`, computes in the dtype of the text states. `modulation`: see its `forward`.
    """
    text, mask = conditions.text, None
    if conditions.padding is not None:
        mask = ~conditions.padding[:, :, None, None].expand(-1, -1, *latents.shape[3:])
    (velocity,) = model(
        hidden_states=conditions.restore(latents).to(text.sequence.dtype),
        timestep=frame_timesteps(timestep, conditions.given),
        encoder_hidden_states=text.sequence,
        pooled_projections=text.pooled,
        encoder_attention_mask=text.key_mask,
        attention_mask=mask,
        modulation=modulation,
        return_dict=False,
    )
    return velocity.float()


def frame_timesteps(timestep: Tensor, given: Tensor | None) -> Tensor:
    """Timesteps [B] or [B, T] with 0 for the frames that are `given` [B, T]."""
    if given is None:
        return timestep
    of_frames = timestep if timestep.ndim == 2 else timestep[:, None]
    return of_frames.masked_fill(given.to(timestep.device), 0)
