"""What a denoiser is told beside the noisy latents, and the one call of it that training and sampling share.

B samples, C channels of the VAE's latents, T/H/W latent grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opensoraplan.models.adaln import Modulation
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.shapes import FeatureShape

# The keys of a denoiser's config that say how wide the features of its texts are.
_WIDTHS = {"sequence": "caption_channels", "pooled": "pooled_projection_dim"}


@dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of B samples. Every method returns new ones.

    `text`: the encoded prompts. `frames` [B, C, T, H, W] are clean latents, given where `frames_mask`
    [B, 1, T, H, W] is 1; None for text to video, the only task that there are denoisers for yet.
    """

    text: PromptEmbeds
    frames: Tensor | None = None
    frames_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.frames is None) != (self.frames_mask is None):
            raise ValueError("clean frames and their mask belong together: give both, or neither")
        if self.frames is not None and len(self.frames) != self.batch_size:
            raise ValueError(f"clean frames are of {len(self.frames)} samples, the text of {self.batch_size}")

    @property
    def batch_size(self) -> int:
        return self.text.batch_size

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditions:
        """On `device`, all but the text's mask in `dtype`; None leaves either as it is."""
        frames, mask = (
            tensor if tensor is None else tensor.to(device=device, dtype=dtype)
            for tensor in (self.frames, self.frames_mask)
        )
        return Conditions(self.text.to(device, dtype), frames, mask)

    def repeat(self, n: int) -> Conditions:
        """Each sample `n` times in a row: a, b becomes a, a, b, b for n = 2."""
        frames, mask = (
            tensor if tensor is None else tensor.repeat_interleave(n, dim=0)
            for tensor in (self.frames, self.frames_mask)
        )
        return Conditions(self.text.repeat(n), frames, mask)

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """The samples of all `parts` in one batch. Shorter texts are padded; all or none have frames."""
        text = PromptEmbeds.cat([part.text for part in parts])
        frames = [part.frames for part in parts if part.frames is not None]
        masks = [part.frames_mask for part in parts if part.frames_mask is not None]
        if not frames:
            return Conditions(text)
        if len(frames) < len(parts):
            raise ValueError(
                f"{len(frames)} of {len(parts)} parts have clean frames: give them to all or none"
            )
        return Conditions(text, torch.cat(frames), torch.cat(masks))


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
    """Velocity [B, C, T, H, W] in fp32 of noisy latents [B, C, T, H, W] at `timestep` [B] (1000 * sigma).

    The model, a `SparseUMMDiT`, computes in the dtype of the text states. `modulation`: see its `forward`.
    Raises ValueError for clean frames, which it does not take.
    """
    text = conditions.text
    if conditions.frames is not None:
        raise ValueError("this denoiser makes videos of text alone: it takes no clean frames")
    (velocity,) = model(
        hidden_states=latents.to(text.sequence.dtype),
        timestep=timestep,
        encoder_hidden_states=text.sequence,
        pooled_projections=text.pooled,
        encoder_attention_mask=text.key_mask,
        modulation=modulation,
        return_dict=False,
    )
    return velocity.float()
