"""What the timestep and the pooled prompt do to the streams of the denoiser: the condition vector, the norms
that it modulates (AdaLN), and the gates of what follows them.

Shapes: B batch, n the Skiparse rate of a stage, s tokens of a subsequence, L text tokens, D width, E width of
the condition, P of the pooled prompt. All but `add_gated` and the modulated streams compute and return fp32.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm(nn.LayerNorm):
    """LayerNorm that returns fp32 whatever its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class RMSNorm(nn.RMSNorm):
    """RMSNorm that returns fp32 whatever its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


NORMS = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}


class ConditionMLP(nn.Module):
    """Linear -> SiLU -> Linear in the input's dtype; returns fp32."""

    def __init__(self, in_features: int, *, out_features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x))).float()


class ConditionEmbedding(nn.Module):
    """The condition vector [B, E] in fp32, from timestep [B] (1000 * sigma) and the pooled CLIP
    vector [B, P].
    """

    def __init__(self, embed_dim: int, *, pooled_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = ConditionMLP(embed_dim, out_features=embed_dim)
        self.text_embedder = ConditionMLP(pooled_dim, out_features=embed_dim)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        width = self.timestep_embedder.linear_1.in_features
        channel = torch.arange(width // 2, dtype=torch.float32, device=timestep.device)
        angle = torch.outer(timestep.float(), 10000.0 ** (-channel / (width // 2)))
        sinusoid = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.timestep_embedder(sinusoid.to(pooled.dtype)) + self.text_embedder(pooled)


class AdaNormZero(nn.Module):
    """Norms of both streams, modulated by the condition, and the gates of what follows (AdaLN-zero).

    With `text_norm=False` there is no text norm and the text stream passes as it is; its gate still applies.
    """

    def __init__(
        self, dim: int, *, embed_dim: int, norm_cls: str, eps: float, text_norm: bool = True
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(embed_dim, 6 * dim)
        self.norm = NORMS[norm_cls](dim, eps=eps)
        self.norm_enc = NORMS[norm_cls](dim, eps=eps) if text_norm else None

    def forward(
        self, video: Tensor, text: Tensor, cond: Tensor, vectors: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Video [n, B, s, D] and text [B, L, D] in their dtype, and their gates [B, 1, D] in fp32. `vectors`
        [B, 6 D]: what the linear layer has made of the condition, if it was computed before.
        """
        if vectors is None:
            vectors = cast(Tensor, self.linear(F.silu(cond).to(video.dtype)))
        vectors = vectors.float().unsqueeze(1)
        shift, scale, gate, text_shift, text_scale, text_gate = vectors.chunk(6, dim=-1)
        video = (self.norm(video) * (1 + scale) + shift).to(video.dtype)
        if self.norm_enc is not None:
            text = (self.norm_enc(text) * (1 + text_scale) + text_shift).to(text.dtype)
        return video, text, gate, text_gate


class Modulation(NamedTuple):
    """The outputs of all AdaLN linear layers for one condition: [B, 6 D] twice for each block, and [B, 2 D]
    at the end. Made by models/modulation.py.
    """

    blocks: Sequence[tuple[Tensor, Tensor]]
    out: Tensor


def add_gated(stream: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """stream + gate * update, computed in fp32, in the stream's dtype."""
    return (stream.float() + gate * update.float()).to(stream.dtype)


class AdaNormOut(nn.Module):
    """The last norm, shifted and scaled by the condition. Returns fp32."""

    def __init__(self, dim: int, *, embed_dim: int, norm_cls: str, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(embed_dim, 2 * dim)
        self.norm = NORMS[norm_cls](dim, eps=eps)

    def forward(self, x: Tensor, cond: Tensor, vectors: Tensor | None = None) -> Tensor:
        if vectors is None:
            vectors = cast(Tensor, self.linear(F.silu(cond).to(x.dtype)))
        shift, scale = vectors.float().unsqueeze(1).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift
