"""The branches of classifier-free guidance: which conditions the denoiser gets in each step. The formula
is in flow.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from opensoraplan.models.conditions import Conditions
from opensoraplan.models.text import PromptEmbeds


class Branches:
    """The branches of guidance: each is one call of the denoiser, under the name of its cache.

    `positive`: conditions of all B videos. `encode_negative` makes those of their negative prompts when they
    are first needed. `guided`: the steps that use guidance if the scale is above 1. `batched`: both branches
    are one call with 2 B samples, the negative prompts first.
    """

    def __init__(
        self,
        positive: Conditions,
        encode_negative: Callable[[], Conditions],
        *,
        guided: range,
        batched: bool,
    ) -> None:
        self.positive = positive
        self.guided = guided
        self.batched = batched
        self._encode_negative = encode_negative

    def of(self, step: int, *, scale: float) -> dict[str, Conditions]:
        """The branches of a step, counted from 0, at this guidance scale."""
        if not self.is_guided(step, scale=scale):
            return {"cond": self.positive}
        if self.batched:
            return {"both": self._both}
        return {"uncond": self._negative, "cond": self.positive}

    def is_guided(self, step: int, *, scale: float) -> bool:
        """Whether a step has an unconditional branch."""
        return scale > 1 and step in self.guided

    def replace(self, *, sequence: Tensor | None = None, pooled: Tensor | None = None) -> None:
        """Replace the token states [B, L, D] or pooled vectors [B, P] of the prompts in later steps."""
        text = self.positive.text
        changed = PromptEmbeds(
            text.sequence if sequence is None else sequence.to(text.sequence),
            text.mask,
            text.pooled if pooled is None else pooled.to(text.pooled),
        )
        self.positive = replace(self.positive, text=changed)
        self.__dict__.pop("_both", None)

    @cached_property
    def _negative(self) -> Conditions:
        return self._encode_negative()

    @cached_property
    def _both(self) -> Conditions:
        return Conditions.cat([self._negative, self.positive])
