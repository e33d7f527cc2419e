"""CLIP's text tower with its projection. Its feature of a text is "pooled" [P], the projected state of the
end token (P is 1280 in the release).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensoraplan.models import pretrained_text
from opensoraplan.models.pretrained_text import Epsilon, Size
from opensoraplan.settings import Settings
from opensoraplan.shapes import FeatureShape


class _Sizes(Settings):
    """What CLIP's text tower computes with."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    projection_dim: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    max_position_embeddings: Size
    layer_norm_eps: Epsilon


@dataclass(frozen=True, eq=False)
class CLIP(pretrained_text.PretrainedTextEncoder):
    """A `TextEncoder`. It reads as many tokens as it has positions (77), whatever `max_tokens` is: texts are
    padded to that and have no mask, as in the original.
    """

    name = "CLIP"
    gives = ("pooled",)
    # The vision tower is left in the files.
    used = ("text_model.", "text_projection.")
    keys = ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id")

    @staticmethod
    def class_and_config(folder: Path) -> tuple[Any, Any]:
        from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModelWithProjection

        if pretrained_text.model_type(folder) != "clip":
            config = CLIPTextConfig.from_pretrained(folder, local_files_only=True)
            return CLIPTextModelWithProjection, pretrained_text.checked(config, _Sizes, folder)
        whole = CLIPConfig.from_pretrained(folder, local_files_only=True)
        config = whole.get_text_config()
        # In a whole CLIP the top level says how wide the projection is. The text part often keeps a default.
        config.update({"projection_dim": whole.projection_dim})
        return CLIPTextModelWithProjection, pretrained_text.checked(config, _Sizes, folder)

    @property
    def shapes(self) -> dict[str, FeatureShape]:
        return {"pooled": (self.model.config.projection_dim,)}

    def features(self, text: str, *, device: torch.device) -> dict[str, Tensor]:
        """Raises ValueError for a tower that would not pool at the end token, too."""
        pretrained_text.avoid_added_masks(self.model, device)
        config = self.model.config
        ids = pretrained_text.token_ids(
            text, self.tokenizer, name=self.name, known=config.vocab_size, most=self._positions, pad=True
        )
        self._check_pooling(ids)
        rows = torch.tensor([ids], device=device)
        return {"pooled": self.model(input_ids=rows).text_embeds[0]}

    def warnings(self, text: str, *, caption: bool) -> list[str]:
        """None of captions: as in the original, they are longer than what CLIP reads."""
        if caption:
            return []
        return pretrained_text.unread_tokens(text, self.tokenizer, name=self.name, most=self._positions)

    @property
    def _positions(self) -> int:
        return self.model.config.max_position_embeddings

    def _check_pooling(self, ids: list[int]) -> None:
        """transformers takes the first token with the config's `eos_token_id`, or with the highest id where
        an older config says 2. Where there is no such token it takes the first one, the same for every
        prompt, without a word.
        """
        eos = self.model.config.eos_token_id
        pooled_at = max(ids) if eos == 2 else eos
        if pooled_at != self.tokenizer.eos_token_id:
            raise ValueError(
                f"CLIP would pool at token {pooled_at}, but the tokenizer ends a text with "
                f"{self.tokenizer.eos_token_id}: is it the tokenizer of another model?"
            )
