"""Sequence parallelism of the denoiser: each rank has a part of a sample's tokens between attentions, and a
part of the heads inside them (Ulysses, arXiv 2309.14509).

A part is a run of whole n^2 groups for every rate n, so that Skiparse regroups it locally: the subsequences
of all ranks' parts, joined in the order of ranks, are those of all tokens. Tokens are padded once where they
cannot be divided so. The text is on every rank. Applied from outside, by hooks; it composes with tensor
parallelism, whose ranks share the tokens of their sp rank in turn.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opensoraplan.models.attention import additive_mask
from opensoraplan.models.sparse_ummdit import JointAttention, JointAttnProcessor, SparseUMMDiT, VideoTokens
from opensoraplan.parallel.collectives import (
    Group,
    all_gather,
    all_gather_copies,
    all_to_all,
    part_of,
    split_copies,
)

TOKENS, HEADS = 2, 3  # of [n, B, s, H, d]


def padded_tokens(tokens: int, *, ranks: int, rates: Sequence[int]) -> int:
    """How many tokens are shared out: the least multiple of ranks * n^2 for all rates n."""
    unit = ranks * math.lcm(*(n**2 for n in rates))
    return math.ceil(tokens / unit) * unit


def share_tokens(model: SparseUMMDiT, *, sp: Group | None, tp: Group | None) -> None:
    """Let each rank run its part of the tokens through stages, last norms and projection; the model still
    takes and gives whole samples.
    """
    _TokenSharing(sp=sp, tp=tp).hook(model)
    if sp is not None:
        for module in model.modules():
            if isinstance(module, JointAttention):
                module.set_processor(UlyssesProcessor(sp))  # type: ignore[arg-type]


class _TokenSharing:
    """Hooks: parts go into the stages, the whole comes out of the last projection."""

    def __init__(self, *, sp: Group | None, tp: Group | None) -> None:
        self.sp = sp
        self.tp = tp
        self.ranks = (sp.size() if sp else 1) * (tp.size() if tp else 1)
        self._tokens: list[int] = []  # of the samples whose forward pass has begun

    def hook(self, model: SparseUMMDiT) -> None:
        model.stages.register_forward_pre_hook(self.divide, with_kwargs=True)
        model.proj_out.register_forward_hook(self.join)

    def divide(
        self, _stages: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens: VideoTokens = args[0]
        video, (cos, sin), mask, rows, run = tokens
        count = video.shape[1]
        self._tokens.append(count)
        padding = padded_tokens(count, ranks=self.ranks, rates=kwargs["rates"]) - count
        if padding:
            if mask is None:
                mask = torch.ones(video.shape[:2], dtype=torch.bool, device=video.device)
            mask = F.pad(mask, (0, padding))
            video = F.pad(video, (0, 0, 0, padding))
            cos, sin = (F.pad(table, (0, 0, 0, 0, 0, padding)) for table in (cos, sin))
            rows = None if rows is None else F.pad(rows, (0, padding))
        if rows is not None:
            for group in filter(None, (self.sp, self.tp)):
                rows = part_of(rows, dim=1, group=group)
            run = math.gcd(run, rows.shape[1])
        if self.sp is not None:
            video = part_of(video, dim=1, group=self.sp)
            cos, sin = (part_of(table, dim=1, group=self.sp) for table in (cos, sin))
            if mask is not None:
                mask = part_of(mask, dim=1, group=self.sp)
        # Tables and mask stay whole for tp, which joins the tokens for attention.
        if self.tp is not None:
            video = split_copies(video, dim=1, group=self.tp)
        return (VideoTokens(video, (cos, sin), mask, rows, run), *args[1:]), kwargs

    def join(self, _last: nn.Module, _args: tuple[Any, ...], video: Tensor) -> Tensor:
        if self.tp is not None:
            video = all_gather_copies(video, dim=1, group=self.tp)
        if self.sp is not None:
            video = all_gather(video, dim=1, group=self.sp)
        return video[:, : self._tokens.pop()]


class UlyssesProcessor(JointAttnProcessor):
    """Attention of which each rank of a group computes a part of the heads, for the tokens of all ranks."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def attend(
        self,
        video: tuple[Tensor, Tensor, Tensor],
        text: tuple[Tensor, Tensor, Tensor],
        key_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        group, own_tokens = self.group, video[0].shape[TOKENS]
        q, k, v = (all_to_all(x, split=HEADS, join=TOKENS, group=group) for x in video)
        text_q, text_k, text_v = (part_of(x, dim=2, group=group) for x in text)
        if key_mask is not None:  # [n * B, 1, 1, s + L]
            of_tokens, of_text = key_mask[..., :own_tokens], key_mask[..., own_tokens:]
            key_mask = torch.cat([_gathered_mask(of_tokens, group), of_text], dim=-1)
        out, text_out = super().attend((q, k, v), (text_q, text_k, text_v), key_mask)
        return (
            all_to_all(out, split=TOKENS, join=HEADS, group=group),
            all_gather(text_out, dim=2, group=group),
        )


def _gathered_mask(mask: Tensor, group: Group) -> Tensor:
    """A byte a key is sent, whether the mask is of booleans or additive."""
    attended = mask if mask.dtype == torch.bool else mask == 0
    attended = all_gather(attended.to(torch.uint8), dim=-1, group=group).bool()
    return attended if mask.dtype == torch.bool else additive_mask(attended, mask.dtype)
