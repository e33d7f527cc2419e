"""What is asked of a text encoder, whichever it is, and the text encoders that there are: another one is a
file with its class, and a line here. Their features of several prompts are one `PromptEmbeds`.

What happens to prompts before is in prompts.py. Behaviour: the inference of Open-Sora Plan v1.5.0.
B prompts, L text tokens, D width of the token states (2048 in the release), P of the pooled vector (1280).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from opensoraplan.models import pretrained_text
from opensoraplan.models.clip import CLIP
from opensoraplan.models.original import aligned
from opensoraplan.models.t5 import T5
from opensoraplan.shapes import FeatureShape

logger = logging.getLogger(__name__)

# What the denoiser is told of a text: the states [L, D] of its tokens, and one vector [P] of the whole.
FEATURES = ("sequence", "pooled")


class TextEncoder(Protocol):
    """A frozen text encoder: a model with its tokenizer. Its class takes (model, tokenizer, max_tokens).

    What it makes of a text are features: tensors with names, which `gives` lists. `name`: for messages and
    fingerprints. `model` has a `config` with the `model_type` that the class is found by, and a `dtype` and a
    `device`, as models of transformers do. `max_tokens`: how many tokens of a text are read at most.
    """

    name: ClassVar[str]
    gives: ClassVar[tuple[str, ...]]

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype) -> nn.Module:
        """The model from a local folder, on the CPU. Raises ValueError or FileNotFoundError, and names the
        file, for what cannot be loaded whole.
        """
        ...

    @classmethod
    def empty(cls, folder: Path) -> nn.Module:
        """The model on the meta device, by the folder's config.json alone."""
        ...

    @classmethod
    def load_tokenizer(cls, folder: Path) -> Any: ...  # noqa: ANN401 (each has its own)

    @property
    def model(self) -> Any: ...  # noqa: ANN401 (an nn.Module, with what is said above)
    @property
    def tokenizer(self) -> Any: ...  # noqa: ANN401
    @property
    def max_tokens(self) -> int: ...
    @property
    def shapes(self) -> Mapping[str, FeatureShape]:
        """Of each feature of a text, by the model's config alone: weights may be on the meta device."""
        ...

    def features(self, text: str, *, device: torch.device) -> dict[str, Tensor]:
        """Those of one text, without a dimension of the batch; "" is a text, too. `device`: where the model
        computes. Raises ValueError for a tokenizer of another model.
        """
        ...

    def warnings(self, text: str, *, caption: bool) -> list[str]:
        """Sentences about what it does not read of a prompt, or of a training `caption`."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Hashes of all that the features depend on, but dtype and `max_tokens`, under names for messages.
        The same weights have the same ones from whatever kind of file.
        """
        ...


# By the `model_type` of a config.json.
TEXT_ENCODERS: Mapping[str, Any] = {"t5": T5, "clip": CLIP, "clip_text_model": CLIP}


class TextPart(NamedTuple):
    """A text encoder's place in a pipeline: the names of encoder and tokenizer there, and the feature that
    the encoder has to give.
    """

    encoder: str
    tokenizer: str
    feature: str


TEXT_PARTS = (
    TextPart("text_encoder", "tokenizer", "sequence"),
    TextPart("text_encoder_2", "tokenizer_2", "pooled"),
)


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """Encoded prompts, all tensors on one device. Every method returns new embeddings.

    `sequence` [B, L, D] are the tokens' states, `mask` [B, L] bool has True for a real token, `pooled` [B, P]
    is a vector of the whole text. Shapes that do not belong together are a ValueError.
    """

    sequence: Tensor
    mask: Tensor
    pooled: Tensor

    def __post_init__(self) -> None:
        sequence, mask, pooled = (tuple(t.shape) for t in (self.sequence, self.mask, self.pooled))
        if len(sequence) != 3:
            raise ValueError(f"sequence must be [batch, tokens, width], got {sequence}")
        if self.mask.dtype != torch.bool or mask != sequence[:2]:
            raise ValueError(f"mask must be torch.bool {sequence[:2]}, got {self.mask.dtype} {mask}")
        if len(pooled) != 2 or pooled[0] != sequence[0]:
            raise ValueError(
                f"pooled must be [{sequence[0]}, width], as the sequence is {sequence}, got {pooled}"
            )

    @property
    def batch_size(self) -> int:
        return self.sequence.shape[0]

    @cached_property
    def key_mask(self) -> Tensor | None:
        """`mask`, or None where all tokens are real, so that attention needs none. Asks the device once."""
        return None if bool(self.mask.all()) else self.mask

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PromptEmbeds:
        """On `device`, with the states (not the mask) in `dtype`; None leaves either as it is."""
        return PromptEmbeds(
            self.sequence.to(device=device, dtype=dtype),
            self.mask.to(device=device),
            self.pooled.to(device=device, dtype=dtype),
        )

    def repeat(self, n: int) -> PromptEmbeds:
        """Each prompt `n` times in a row: a, b becomes a, a, b, b for n = 2."""
        if n < 1:
            raise ValueError(f"prompts can be repeated 1 time or more, got {n}")
        return PromptEmbeds(*(t.repeat_interleave(n, dim=0) for t in (self.sequence, self.mask, self.pooled)))

    def select(self, rows: slice | Sequence[int]) -> PromptEmbeds:
        """The prompts at `rows`, in that order. L stays as it is: see `trimmed`."""
        index = rows if isinstance(rows, slice) else list(rows)
        return PromptEmbeds(self.sequence[index], self.mask[index], self.pooled[index])

    def trimmed(self) -> PromptEmbeds:
        """Without the columns at the end in which no prompt has a token. L: the longest real length."""
        real = self.mask.any(dim=0).nonzero()  # [columns, 1]
        length = int(real[-1]) + 1 if len(real) else 0
        return PromptEmbeds(self.sequence[:, :length], self.mask[:, :length], self.pooled)

    @staticmethod
    def of(texts: Sequence[Mapping[str, Tensor]]) -> PromptEmbeds:
        """Of the features of B texts, all on one device. Shorter sequences get masked zeros at their end."""
        missing = sorted(name for name in FEATURES if any(name not in text for text in texts))
        if missing:
            raise ValueError(f"the texts have no {' and no '.join(missing)}: no text encoder gave that")
        sequences = [text["sequence"] for text in texts]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return PromptEmbeds(
            pad_sequence(sequences, batch_first=True),
            mask.to(sequences[0].device),
            torch.stack([text["pooled"] for text in texts]),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields by their names."""
        return {"sequence": self.sequence, "mask": self.mask, "pooled": self.pooled}

    @property
    def shapes(self) -> dict[str, FeatureShape]:
        """Of the features of each prompt."""
        return {"sequence": (None, self.sequence.shape[2]), "pooled": (self.pooled.shape[1],)}

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """The prompts of all `parts` in one batch. Shorter sequences get masked zeros at their end."""
        if not parts:
            raise ValueError("cat needs at least one PromptEmbeds, got none")
        widths = [(p.sequence.shape[2], p.pooled.shape[1]) for p in parts]
        if len(set(widths)) > 1:
            raise ValueError(f"only equal widths (sequence, pooled) can be joined, got {widths}")
        longest = max(p.sequence.shape[1] for p in parts)
        missing = [longest - p.sequence.shape[1] for p in parts]
        return PromptEmbeds(
            torch.cat([F.pad(p.sequence, (0, 0, 0, n)) for p, n in zip(parts, missing, strict=True)]),
            torch.cat([F.pad(p.mask, (0, n)) for p, n in zip(parts, missing, strict=True)]),
            torch.cat([p.pooled for p in parts]),
        )


# --- Encoding -----------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_texts(
    texts: Sequence[str],
    encoders: Sequence[TextEncoder],
    *,
    device: torch.device | str | None = None,
    captions: bool = False,
) -> list[dict[str, Tensor]]:
    """The features of each text as it is (`prompts.PromptSettings` comes before), those of all encoders.

    Each text runs by itself: a batch is bit-equal to single runs. What is not read of prompts, or of the
    `captions` of training, is logged, once for each text.

    The features have the encoders' dtypes and are on the first one's device. Encoders compute where they are,
    or on `device` if an offloading hook keeps the weights elsewhere. Raises ValueError for a tokenizer
    that belongs to another model.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a list of one prompt or more, got {texts!r}")
    for text in dict.fromkeys(texts):
        for encoder in encoders:
            for warning in encoder.warnings(text, caption=captions):
                logger.warning(warning)
    return [_features(text, encoders, device) for text in texts]


def _features(
    text: str, encoders: Sequence[TextEncoder], device: torch.device | str | None
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for encoder in encoders:
        found |= encoder.features(text, device=torch.device(device or encoder.model.device))
    home = next(iter(found.values())).device
    return {name: feature.to(home) for name, feature in found.items()}


def encode_prompts(
    texts: Sequence[str],
    encoders: Sequence[TextEncoder],
    *,
    device: torch.device | str | None = None,
) -> PromptEmbeds:
    """The features of B texts as the denoiser takes them, see `encode_texts`. L is the longest text's."""
    return PromptEmbeds.of(encode_texts(texts, encoders, device=device))


def shapes_of(encoders: Sequence[TextEncoder]) -> dict[str, FeatureShape]:
    """Of all features that these encoders give. Raises ValueError if two of them give the same."""
    shapes: dict[str, FeatureShape] = {}
    for encoder in encoders:
        if twice := sorted(shapes.keys() & encoder.shapes.keys()):
            names = ", ".join(one.name for one in encoders)
            raise ValueError(f"of the text encoders {names}, two give {twice[0]}: leave one of them out")
        shapes |= encoder.shapes
    return shapes


# --- Loading ------------------------------------------------------------------------------------------------


def text_encoder_of(model: Any, tokenizer: Any, *, max_tokens: int = 512) -> TextEncoder:  # noqa: ANN401
    """A model and its tokenizer as what they are. Raises ValueError for a model that is no text encoder."""
    found = str(getattr(getattr(model, "config", None), "model_type", None))
    if found not in TEXT_ENCODERS:
        known = ", ".join(TEXT_ENCODERS)
        raise ValueError(f"there is no text encoder of type {found!r}: it must be one of {known}")
    return TEXT_ENCODERS[found](model, tokenizer, max_tokens)


def load_text_encoder(
    folder: Path | str,
    tokenizer: Path | str,
    part: TextPart,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    max_tokens: int = 512,
) -> TextEncoder:
    """Load an encoder and its tokenizer from local folders. Raises as `load_text_model`."""
    model = load_text_model(folder, part, dtype=dtype, device=device)
    loaded = TEXT_ENCODERS[model.config.model_type].load_tokenizer(tokenizer)
    return text_encoder_of(model, loaded, max_tokens=max_tokens)


def load_text_model(
    folder: Path | str, part: TextPart, *, dtype: torch.dtype, device: torch.device | str
) -> Any:  # noqa: ANN401 (see `TextEncoder.model`)
    """Load one encoder from a local folder, frozen and in evaluation mode. Nothing is downloaded.

    Raises FileNotFoundError for what is not there, and ValueError for a kind of model that has no place in
    this part, unreadable files, and weights that do not fill the encoder exactly, naming each tensor.
    """
    folder = pretrained_text.existing_folder(folder)
    model = _class_of(folder, part).load(folder, dtype=dtype)
    for parameter in model.parameters():
        parameter.data = aligned(parameter.data)
    return model.requires_grad_(False).eval().to(device)


def empty_text_model(folder: Path | str, part: TextPart) -> Any:  # noqa: ANN401
    """The model on the meta device, of which `folder` needs no more than `config.json`. Errors are
    those of `load_text_model`.
    """
    folder = pretrained_text.existing_folder(folder)
    return _class_of(folder, part).empty(folder)


def _class_of(folder: Path, part: TextPart) -> Any:  # noqa: ANN401 (a class)
    """The encoder whose `model_type` the folder's config has, if it gives the feature of this part."""
    found = pretrained_text.model_type(folder)
    kind = TEXT_ENCODERS.get(found)
    if kind is not None and part.feature in kind.gives:
        return kind
    wanted = " or ".join(dict.fromkeys(k.name for k in TEXT_ENCODERS.values() if part.feature in k.gives))
    others = (other.encoder for other in TEXT_PARTS if kind is not None and other.feature in kind.gives)
    other = next(others, None)
    hint = f" This is one for {other}: were the two folders swapped?" if other else ""
    raise ValueError(
        f"{part.encoder} must be a {wanted} encoder, but {folder} holds a model of type {found!r}.{hint}"
    )
