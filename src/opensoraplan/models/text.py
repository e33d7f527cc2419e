"""Text conditioning: the T5 and CLIP encoders, and the embeddings that the denoiser takes.

The only file that knows transformers; it is imported inside the functions, because that takes seconds.
What happens to prompts before is in prompts.py. Behaviour: the inference of Open-Sora Plan v1.5.0.
B prompts, L text tokens, D width of T5 (2048 in the release), P width of CLIP's projection (1280).
"""

from __future__ import annotations

import logging
import pickle
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from opensoraplan.documents import read_json, read_json_object, read_shard_index
from opensoraplan.models.original import aligned
from opensoraplan.settings import Settings

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

logger = logging.getLogger(__name__)

Kind = Literal["t5", "clip"]

_MODEL_TYPES = {"t5": ("t5",), "clip": ("clip", "clip_text_model")}
_ROLES = {
    "t5": ("text_encoder", "a T5 encoder"),
    "clip": ("text_encoder_2", "a CLIP text tower with projection"),
}
# The tensors of the part that is used. The T5 decoder and the CLIP vision tower are left in the file.
_USED_TENSORS = {"t5": ("shared.", "encoder."), "clip": ("text_model.", "text_projection.")}
# In the order in which transformers looks for them.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What transformers reads beside the weights.
_JSON_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json"),
)
_TOKENIZER_FILES = (("tokenizer.json",), ("spiece.model",), ("vocab.json", "merges.txt"))


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """Encoded prompts, all tensors on one device. Every method returns new embeddings.

    `sequence` [B, L, D] T5 states, `mask` [B, L] bool with True for a real token, `pooled` [B, P] CLIP's text
    embedding. Shapes that do not belong together are a ValueError.
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


@dataclass(frozen=True, eq=False)
class TextEncoders:
    """T5 and CLIP, each after its tokenizer; named as in the pipeline."""

    tokenizer: PreTrainedTokenizerBase
    text_encoder: T5EncoderModel
    tokenizer_2: PreTrainedTokenizerBase
    text_encoder_2: CLIPTextModelWithProjection


@torch.no_grad()
def encode_prompts(
    texts: Sequence[str],
    encoders: TextEncoders,
    *,
    max_length: int = 512,
    device: torch.device | str | None = None,
    warn_of_clip: bool = True,
) -> PromptEmbeds:
    """Encode B texts as they are (`prompts.PromptSettings` comes before). "" is legal: the end token alone.

    T5 reads at most `max_length` tokens, CLIP as many as it has positions (77); a warning says what is not
    read, by CLIP only with `warn_of_clip`. The original pads every T5 sequence to 512 and masks the padding.
    Here each text runs by itself at its real length: the same up to rounding, and a batch is bit-equal to
    single runs. L is the longest real length. CLIP is padded to 77 and gets no mask, as in the original.

    The states have the encoders' dtypes and are on T5's device. Token ids go to the encoders' own
    devices, or to `device` where an offloading hook keeps the weights elsewhere. A tokenizer of another
    model is a ValueError.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts must be a list of one prompt or more, got {texts!r}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    t5, clip = encoders.text_encoder, encoders.text_encoder_2
    positions = clip.config.max_position_embeddings
    parts = []
    for encoder in (t5, clip):
        _avoid_added_masks(encoder, torch.device(device or encoder.device))
    for text in texts:
        ids = _token_ids(text, encoders.tokenizer, t5, name="T5", max_length=max_length)
        rows = torch.tensor([ids], device=device or t5.device)
        sequence = t5(input_ids=rows).last_hidden_state  # [1, L, D]

        ids = _token_ids(
            text,
            encoders.tokenizer_2,
            clip,
            name="CLIP",
            max_length=positions,
            pad=True,
            warn=warn_of_clip,
        )
        _check_pooling(ids, encoders.tokenizer_2, clip)
        rows = torch.tensor([ids], device=device or clip.device)
        pooled = clip(input_ids=rows).text_embeds  # [1, P]

        mask = torch.ones(sequence.shape[:2], dtype=torch.bool, device=sequence.device)
        parts.append(PromptEmbeds(sequence, mask, pooled.to(sequence.device)))
    return PromptEmbeds.cat(parts)


def _avoid_added_masks(encoder: T5EncoderModel | CLIPTextModelWithProjection, device: torch.device) -> None:
    """On an NPU, have an encoder compute attention by plain products. The fused kernel there takes masks of
    booleans only, and T5 adds its position bias to the scores.
    """
    if device.type == "npu" and encoder.config._attn_implementation != "eager":
        encoder.set_attn_implementation("eager")


def unknown_words(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The words, each once, that T5's tokenizer has no tokens for, or only for a part: it reads what is
    missing as one token that means "unknown".
    """
    unknown = tokenizer.unk_token_id
    if unknown not in tokenizer(text, verbose=False).input_ids:
        return []
    return [word for word in dict.fromkeys(text.split()) if unknown in tokenizer(word).input_ids]


def _token_ids(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    encoder: T5EncoderModel | CLIPTextModelWithProjection,
    *,
    name: str,
    max_length: int,
    pad: bool = False,
    warn: bool = True,
) -> list[int]:
    padding = "max_length" if pad else False
    ids = tokenizer(text, truncation=True, max_length=max_length, padding=padding).input_ids
    if warn and len(whole := tokenizer(text, verbose=False).input_ids) > max_length:
        unread = whole[max_length - 1 : -1]  # the last of what is read, and of the whole, is the end token
        words = str(tokenizer.decode(unread, skip_special_tokens=True)).split()
        start = " ".join(words[:8]) + (" ..." if len(words) > 8 else "")
        logger.warning(
            "%s reads %d tokens; the last %d tokens of the prompt '%s' are not read: %s",
            name,
            max_length,
            len(unread),
            text if len(text) <= 24 else text[:24] + "...",
            start,
        )
    # Out of range, a lookup on an accelerator fails without saying where.
    if max(ids) >= encoder.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {max(ids)}, but {name} knows {encoder.config.vocab_size} tokens: "
            "is it the tokenizer of another model?"
        )
    return ids


def _check_pooling(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, encoder: CLIPTextModelWithProjection
) -> None:
    """Refuse a tower that would not pool at the end token.

    transformers takes the first token with the config's `eos_token_id`, or with the highest id where an
    older config says 2. Where there is no such token it takes the first one, the same for every prompt,
    without a word.
    """
    eos = encoder.config.eos_token_id
    pooled_at = max(ids) if eos == 2 else eos
    if pooled_at != tokenizer.eos_token_id:
        raise ValueError(
            f"CLIP would pool at token {pooled_at}, but the tokenizer ends a text with "
            f"{tokenizer.eos_token_id}: is it the tokenizer of another model?"
        )


@overload
def load_text_encoder(
    folder: Path | str, *, kind: Literal["t5"], dtype: torch.dtype, device: torch.device | str
) -> T5EncoderModel: ...
@overload
def load_text_encoder(
    folder: Path | str, *, kind: Literal["clip"], dtype: torch.dtype, device: torch.device | str
) -> CLIPTextModelWithProjection: ...
def load_text_encoder(
    folder: Path | str, *, kind: Kind, dtype: torch.dtype, device: torch.device | str
) -> T5EncoderModel | CLIPTextModelWithProjection:
    """Load one encoder from a local folder, frozen and in evaluation mode. Nothing is downloaded.

    `folder` holds `config.json` and weights (safetensors or `pytorch_model.bin`, whole or in shards): a
    released repository as it is, with the T5 decoder or the CLIP vision tower, or what transformers saved.
    Raises FileNotFoundError for what is not there, and ValueError for another kind of model, unreadable
    files, and weights that do not fill the encoder exactly, naming each tensor.
    """
    if kind not in _MODEL_TYPES:
        raise ValueError(f"kind must be one of {list(_MODEL_TYPES)}, got {kind!r}")
    folder = _existing_folder(folder)
    model_type = _model_type(folder, kind)
    _check_weight_files(folder)

    with _only_value_errors(folder), _without_load_report():
        model, info = _load(folder, kind, model_type, dtype)
    _check_complete(folder, kind, info)
    for parameter in model.parameters():
        parameter.data = aligned(parameter.data)
    return model.requires_grad_(False).eval().to(device)


_Size = Annotated[int, Field(strict=True, ge=1, le=10**6)]
_Epsilon = Annotated[float, Field(strict=True, gt=0, le=1)]


class _T5Sizes(Settings):
    """What T5 computes with, in its config.json; transformers checks types, and not all."""

    vocab_size: _Size
    d_model: _Size
    d_kv: _Size
    d_ff: _Size
    num_layers: _Size
    num_heads: _Size
    relative_attention_num_buckets: _Size
    relative_attention_max_distance: _Size
    layer_norm_epsilon: _Epsilon


class _CLIPSizes(Settings):
    """What CLIP's text tower computes with."""

    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    projection_dim: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    max_position_embeddings: _Size
    layer_norm_eps: _Epsilon


def _checked_sizes(config: Any, folder: Path) -> Any:  # noqa: ANN401 (a config of transformers)
    """The config, if a model can be made of it. Raises ValueError that names file and keys."""
    sizes = _T5Sizes if config.model_type == "t5" else _CLIPSizes
    values = {name: getattr(config, name, None) for name in sizes.model_fields}
    sizes.read(values, where=str(folder / "config.json"))
    return config


@contextmanager
def _only_value_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"the weights in {folder} hold code or objects that could run code ({match[1]}): refused"
            ) from None
        raise ValueError(f"the weights in {folder} are no checkpoint: {_short(error)}") from error
    except Exception as error:  # transformers, torch and safetensors have no common error for a damaged file
        raise ValueError(
            f"cannot load the model in {folder}, its files may be damaged or incomplete: {_short(error)}"
        ) from error


def _load(folder: Path, kind: Kind, model_type: str, dtype: torch.dtype) -> tuple[Any, dict]:
    """The model, and the library's account of what it found in the files."""
    cls, config = _class_and_config(folder, kind, model_type)
    loaded = cls.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        local_files_only=True,
        weights_only=True,
        ignore_mismatched_sizes=True,  # they are reported by name, with the missing ones
        output_loading_info=True,
    )
    return cast(tuple[Any, dict], loaded)


def _class_and_config(folder: Path, kind: Kind, model_type: str) -> tuple[Any, Any]:
    from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    if kind == "t5":
        config = T5Config.from_pretrained(folder, local_files_only=True)
        return T5EncoderModel, _checked_sizes(config, folder)
    if model_type != "clip":
        config = CLIPTextConfig.from_pretrained(folder, local_files_only=True)
        return CLIPTextModelWithProjection, _checked_sizes(config, folder)
    whole = CLIPConfig.from_pretrained(folder, local_files_only=True)
    config = whole.get_text_config()
    # In a whole CLIP the top level says how wide the projection is. The text part often keeps a default.
    config.update({"projection_dim": whole.projection_dim})
    return CLIPTextModelWithProjection, _checked_sizes(config, folder)


def empty_text_encoder(folder: Path | str, *, kind: Kind) -> nn.Module:
    """One encoder on the meta device, of which `folder` needs no more than `config.json`. Errors are
    those of `load_text_encoder`.
    """
    folder = _existing_folder(folder)
    model_type = _model_type(folder, kind)
    with _only_value_errors(folder), torch.device("meta"):
        cls, config = _class_and_config(folder, kind, model_type)
        return cls(config)


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a local folder. Nothing is downloaded, no code in it is run.

    `folder` holds `tokenizer.json`, `spiece.model` (T5) or `vocab.json` and `merges.txt` (CLIP), and
    `tokenizer_config.json` or `config.json`, which say whose it is. Raises FileNotFoundError for what is
    not there, and ValueError for files that cannot be read.
    """
    folder = _existing_folder(folder)
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        wanted = ", or ".join(" and ".join(names) for names in _TOKENIZER_FILES)
        raise FileNotFoundError(f"no tokenizer in {folder}: expected {wanted}")
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json")):
        raise FileNotFoundError(f"no tokenizer_config.json or config.json beside the tokenizer in {folder}")

    from transformers import AutoTokenizer

    check_json(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise ValueError(f"cannot read the tokenizer in {folder}: {_short(error)}") from error


def _existing_folder(folder: Path | str) -> Path:
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no such folder: {folder}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the folder that it is in, {folder.parent}")
    return folder


def _model_type(folder: Path, kind: Kind) -> str:
    """The `model_type` of the folder's config, if it is one that `kind` can have."""
    found = str(_read_json(folder / "config.json").get("model_type"))
    check_json(folder)
    if found in _MODEL_TYPES[kind]:
        return found
    component, wanted = _ROLES[kind]
    other = next((_ROLES[k][0] for k in _ROLES if found in _MODEL_TYPES[k]), None)
    hint = f" This is one for {other}: were the two folders swapped?" if other else ""
    raise ValueError(f"{component} must be {wanted}, but {folder} holds a model of type {found!r}.{hint}")


def _check_weight_files(folder: Path) -> None:
    first = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise FileNotFoundError(f"no weights in {folder}: expected one of {', '.join(_WEIGHTS)}")
    if first.endswith(".index.json"):
        shards = read_shard_index(folder / first)
        absent = sorted({name for name in shards.values() if not (folder / name).is_file()})
        if absent:
            raise FileNotFoundError(f"{folder / first} names files that are not there: {', '.join(absent)}")


def check_json(folder: Path) -> None:
    """Read the folder's JSON files by our own reader before transformers does: its errors name no file."""
    for path in (folder / name for name in _JSON_FILES if (folder / name).exists()):
        read_json(path)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    return read_json_object(path)


def _check_complete(folder: Path, kind: Kind, info: dict) -> None:
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [
        f"{name} has shape {tuple(found)}, expected {tuple(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    problems += [
        f"{name} has no place in the model"
        for name in sorted(info["unexpected_keys"])
        if name.startswith(_USED_TENSORS[kind])
    ]
    if problems:
        listed = "; ".join(problems)
        raise ValueError(
            f"the weights in {folder} do not fit its config.json ({len(problems)} wrong): {listed}"
        )


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error), 300) or type(error).__name__


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep the library from listing every tensor of the decoder or the vision tower as a possible mistake."""
    from transformers.utils import logging as library

    level = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(level)
