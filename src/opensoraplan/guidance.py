"""What the denoiser is told in each step: the prompts alone, or for classifier-free guidance the negative
prompts as well. The formula is in flow.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from opensoraplan.models.conditions import Conditions
from opensoraplan.models.text import PromptEmbeds


class Branches:
    """The branches of guidance, each a call of the denoiser, by the names of their caches.

    `positive`: of all B videos, and `encode_negative` gives the same of their negative prompts, once it is
    needed. `guided`: the steps that are guided if the scale is greater than 1. `batched`: both branches are
    one call of 2 B samples, the negative prompts first.
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
        """What a step, counted from 0, runs the denoiser on at this guidance scale."""
        if not self.is_guided(step, scale=scale):
            return {"cond": self.positive}
        if self.batched:
            return {"both": self._both}
        return {"uncond": self._negative, "cond": self.positive}

    def is_guided(self, step: int, *, scale: float) -> bool:
        """Whether a step has an unconditional branch."""
        return scale > 1 and step in self.guided

    def replace(self, *, sequence: Tensor | None = None, pooled: Tensor | None = None) -> None:
        """Go on with other T5 states [B, L, D] or CLIP vectors [B, P] of the prompts."""
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
