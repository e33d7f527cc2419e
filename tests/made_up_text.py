"""A text encoder that the package does not know: a GRU over the bytes of a text, which gives a "sequence"."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import ByT5Tokenizer, PreTrainedConfig, PreTrainedModel

from opensoraplan.models.hashes import hash_plain, hash_tensors
from opensoraplan.shapes import FeatureShape


class ByteGRUConfig(PreTrainedConfig):
    model_type = "byte_gru"

    def __init__(self, width: int = 10, **others: object) -> None:
        super().__init__(**others)
        self.width = width


class ByteGRU(PreTrainedModel):
    config_class = ByteGRUConfig

    def __init__(self, config: ByteGRUConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(259, config.width)  # 256 bytes, and the end among three others
        self.layer = nn.GRU(config.width, config.width, batch_first=True)
        self.post_init()

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.embedding(ids))[0]


@dataclass(frozen=True, eq=False)
class Bytes:
    """A `TextEncoder`."""

    model: ByteGRU
    tokenizer: ByT5Tokenizer
    max_tokens: int = 512

    name: ClassVar[str] = "Bytes"
    gives: ClassVar[tuple[str, ...]] = ("sequence",)

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype) -> ByteGRU:
        return ByteGRU.from_pretrained(folder, dtype=dtype, local_files_only=True)

    @classmethod
    def empty(cls, folder: Path) -> ByteGRU:
        with torch.device("meta"):
            return ByteGRU(ByteGRUConfig.from_pretrained(folder))

    @classmethod
    def load_tokenizer(cls, folder: Path) -> ByT5Tokenizer:
        return ByT5Tokenizer.from_pretrained(folder, local_files_only=True)

    @property
    def shapes(self) -> dict[str, FeatureShape]:
        return {"sequence": (None, self.model.config.width)}

    def features(self, text: str, *, device: torch.device) -> dict[str, Tensor]:
        ids = self.tokenizer(text, truncation=True, max_length=self.max_tokens).input_ids
        return {"sequence": self.model(torch.tensor([ids], device=device))[0]}

    def warnings(self, text: str, *, caption: bool) -> list[str]:
        unread = len(self.tokenizer(text).input_ids) - self.max_tokens
        return [f"{unread} bytes of {text!r} are not read"] if unread > 0 and not caption else []

    def fingerprint(self) -> dict[str, str]:
        return {"Bytes": hash_plain([self.model.config.width, hash_tensors(self.model.state_dict())])}
