"""What the timestep and the pooled prompt do to the streams of the denoiser: the condition vector, the norms
that it modulates (AdaLN), and the gates of what follows them.

Shapes: B batch, T latent frames, n the Skiparse rate of a stage, s tokens of a subsequence, L text tokens, D
width, E width of the condition, P of the pooled prompt. All but `add_gated` and the modulated streams compute
and return fp32.

Frames may have timesteps of their own. Then there is a row of the condition for each different (sample,
timestep), R in all: first one for each sample, which its text has, then those of other frames. `rows` says
which of them each run of video tokens has: [1, B, U] or [n, B, U] for U equal runs of tokens; None: every
token has that of its sample, and R is B.
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


class TimestepRows(NamedTuple):
    """The different timesteps [R] of a batch, the sample [R] of each, and the row [B, T] of each frame; None
    where every row is a sample's own.
    """

    timestep: Tensor
    sample: Tensor | None = None
    of_frame: Tensor | None = None


def timestep_rows(timestep: Tensor) -> TimestepRows:
    """The rows of timesteps [B], or [B, T], one for each latent frame. The text of a sample has the highest
    timestep of its frames. Looks at the values of [B, T], for which a card has to be waited for.
    """
    if timestep.ndim == 1:
        return TimestepRows(timestep)
    frames = timestep.tolist()
    numbers = {(sample, max(values)): sample for sample, values in enumerate(frames)}
    of_frame = [
        [numbers.setdefault((sample, value), len(numbers)) for value in values]
        for sample, values in enumerate(frames)
    ]
    rows = timestep.new_tensor([value for _, value in numbers])
    if len(numbers) == len(frames):
        return TimestepRows(rows)
    samples = torch.tensor([sample for sample, _ in numbers], device=timestep.device)
    return TimestepRows(rows, samples, torch.tensor(of_frame, device=timestep.device))


class ConditionEmbedding(nn.Module):
    """The condition [R, E] in fp32, from timesteps [R] (1000 * sigma) and the pooled CLIP vectors [R, P]."""

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
        self,
        video: Tensor,
        text: Tensor,
        cond: Tensor,
        vectors: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Video [n, B, s, D] and text [B, L, D] in their dtype, and their gates [R, D] and [B, D] in fp32.
        `vectors` [R, 6 D]: what the linear layer has made of the condition, if it was computed before.
        """
        if vectors is None:
            vectors = cast(Tensor, self.linear(F.silu(cond).to(video.dtype)))
        of_video, of_text = vectors.float().chunk(2, dim=-1)
        if rows is not None:
            of_text = of_text[: len(text)]
        shift, scale, gate = of_video.chunk(3, dim=-1)
        text_shift, text_scale, text_gate = of_text.chunk(3, dim=-1)
        video = modulate(self.norm(video), shift, scale, rows).to(video.dtype)
        if self.norm_enc is not None:
            text = modulate(self.norm_enc(text), text_shift, text_scale).to(text.dtype)
        return video, text, gate, text_gate


class Modulation(NamedTuple):
    """The outputs of all AdaLN linear layers for one condition: [R, 6 D] twice for each block, and [R, 2 D]
    at the end. Made by models/modulation.py.
    """

    blocks: Sequence[tuple[Tensor, Tensor]]
    out: Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None) -> Tensor:
    """x * (1 + scale) + shift for x [.., B, s, D] in fp32, shift and scale [R, D]."""
    if rows is None:
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    runs = x.unflatten(-2, (rows.shape[-1], -1))
    return (runs * of_runs(1 + scale, rows) + of_runs(shift, rows)).flatten(-3, -2)


def add_gated(stream: Tensor, gate: Tensor, update: Tensor, rows: Tensor | None = None) -> Tensor:
    """stream + gate * update, in fp32 and then the stream's dtype: both [.., B, s, D], gate [R, D]."""
    if rows is None:
        return (stream.float() + gate.unsqueeze(1) * update.float()).to(stream.dtype)
    gated = of_runs(gate, rows) * update.float().unflatten(-2, (rows.shape[-1], -1))
    return (stream.float() + gated.flatten(-3, -2)).to(stream.dtype)


def of_runs(vectors: Tensor, rows: Tensor) -> Tensor:
    """Vectors [R, D] for each run of tokens: [.., B, U, 1, D]."""
    return vectors[rows].unsqueeze(-2)


class AdaNormOut(nn.Module):
    """The last norm, shifted and scaled by the condition. Returns fp32."""

    def __init__(self, dim: int, *, embed_dim: int, norm_cls: str, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(embed_dim, 2 * dim)
        self.norm = NORMS[norm_cls](dim, eps=eps)

    def forward(
        self, x: Tensor, cond: Tensor, vectors: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """x [B, s, D] in its dtype; `rows` [B, U]."""
        if vectors is None:
            vectors = cast(Tensor, self.linear(F.silu(cond).to(x.dtype)))
        shift, scale = vectors.float().chunk(2, dim=-1)
        return modulate(self.norm(x), shift, scale, rows)
