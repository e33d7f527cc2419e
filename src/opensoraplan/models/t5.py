"""T5's encoder. Its feature of a text is "sequence" [L, D], the states of the L tokens, of which the last is
the end token (D is 2048 in the release).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opensoraplan.models import pretrained_text
from opensoraplan.models.pretrained_text import Epsilon, Size
from opensoraplan.settings import Settings
from opensoraplan.shapes import FeatureShape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Sizes(Settings):
    """What T5 computes with, in its config.json."""

    vocab_size: Size
    d_model: Size
    d_kv: Size
    d_ff: Size
    num_layers: Size
    num_heads: Size
    relative_attention_num_buckets: Size
    relative_attention_max_distance: Size
    layer_norm_epsilon: Epsilon


@dataclass(frozen=True, eq=False)
class T5(pretrained_text.PretrainedTextEncoder):
    """A `TextEncoder`. The original pads every sequence to 512 and masks the padding; here a text runs at its
    real length: the same up to rounding.
    """

    name = "T5"
    gives = ("sequence",)
    # The decoder is left in the files.
    used = ("shared.", "encoder.")
    keys = (
        "num_heads",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "feed_forward_proj",
        "layer_norm_epsilon",
    )

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")

    @staticmethod
    def class_and_config(folder: Path) -> tuple[Any, Any]:
        from transformers import T5Config, T5EncoderModel

        config = T5Config.from_pretrained(folder, local_files_only=True)
        return T5EncoderModel, pretrained_text.checked(config, _Sizes, folder)

    @property
    def shapes(self) -> dict[str, FeatureShape]:
        return {"sequence": (None, self.model.config.d_model)}

    def features(self, text: str, *, device: torch.device) -> dict[str, Tensor]:
        pretrained_text.avoid_added_masks(self.model, device)
        known = self.model.config.vocab_size
        ids = pretrained_text.token_ids(
            text, self.tokenizer, name=self.name, known=known, most=self.max_tokens
        )
        rows = torch.tensor([ids], device=device)
        return {"sequence": self.model(input_ids=rows).last_hidden_state[0]}

    def warnings(self, text: str, *, caption: bool) -> list[str]:
        unread = pretrained_text.unread_tokens(text, self.tokenizer, name=self.name, most=self.max_tokens)
        words = [] if caption else _unknown_words(text, self.tokenizer)
        if not words:
            return unread
        shown = shorten(", ".join(words), 200, placeholder=" ...")
        return [f"{self.name} has no tokens for {shown}: it only sees that they are unknown", *unread]


def _unknown_words(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The words, each once, that the tokenizer has no tokens for, or only for a part: it reads what is
    missing as one token that means "unknown".
    """
    unknown = tokenizer.unk_token_id
    if unknown not in tokenizer(text, verbose=False).input_ids:
        return []
    return [word for word in dict.fromkeys(text.split()) if unknown in tokenizer(word).input_ids]
