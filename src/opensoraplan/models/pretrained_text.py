"""What text encoders of transformers have in common: tokens, hashes, and loading from local folders, whole or
not at all. Which encoders there are is in text.py.

transformers is imported inside the functions, because that takes seconds.
"""

from __future__ import annotations

import json
import pickle
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from opensoraplan.documents import read_json, read_json_object, read_shard_index
from opensoraplan.fingerprint import hash_text
from opensoraplan.models.hashes import hash_plain, hash_tensors, plain
from opensoraplan.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

# Bounds of a config's values.
Size = Annotated[int, Field(strict=True, ge=1, le=10**6)]
Epsilon = Annotated[float, Field(strict=True, gt=0, le=1)]

# A folder's class of model, and its config.
ClassAndConfig = Callable[[Path], tuple[Any, Any]]


@dataclass(frozen=True, eq=False)
class PretrainedTextEncoder(ABC):
    """What a `TextEncoder` of transformers has in common with others: loading and fingerprint. See there.

    `used`: how the names of its tensors begin; others are left in the files. `keys`: what of the config
    decides the output, beside the weights.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int = 512

    name: ClassVar[str]
    gives: ClassVar[tuple[str, ...]]
    used: ClassVar[tuple[str, ...]]
    keys: ClassVar[tuple[str, ...]]

    @staticmethod
    @abstractmethod
    def class_and_config(folder: Path) -> tuple[Any, Any]:
        """The class of the model in a folder, and its config, checked."""
        ...

    @classmethod
    def load(cls, folder: Path, *, dtype: torch.dtype) -> nn.Module:
        """Of a released repository, which may have more than the encoder, or of what transformers saved."""
        return load_pretrained(folder, cls.class_and_config, dtype=dtype, used=cls.used)

    @classmethod
    def empty(cls, folder: Path) -> nn.Module:
        return empty_pretrained(folder, cls.class_and_config)

    @classmethod
    def load_tokenizer(cls, folder: Path) -> PreTrainedTokenizerBase:
        return load_tokenizer(folder)

    def fingerprint(self) -> dict[str, str]:
        return {
            self.name: hash_encoder(self.model, self.keys),
            f"{self.name} tokenizer": hash_tokenizer(self.tokenizer),
        }


# --- Encoding -----------------------------------------------------------------------------------------------


def token_ids(
    text: str, tokenizer: PreTrainedTokenizerBase, *, name: str, known: int, most: int, pad: bool = False
) -> list[int]:
    """At most `most` tokens of a text, filled up to that with `pad`. Raises ValueError for a tokenizer with
    more tokens than the `known` ones of the encoder `name`.
    """
    ids = tokenizer(text, truncation=True, max_length=most, padding="max_length" if pad else False).input_ids
    # Out of range, a lookup on an accelerator fails without saying where.
    if max(ids) >= known:
        raise ValueError(
            f"the tokenizer gives token {max(ids)}, but {name} knows {known} tokens: "
            "is it the tokenizer of another model?"
        )
    return ids


def unread_tokens(text: str, tokenizer: PreTrainedTokenizerBase, *, name: str, most: int) -> list[str]:
    """A sentence about the tokens of a text that the encoder `name` does not read beyond `most`, if any."""
    whole = tokenizer(text, verbose=False).input_ids
    if len(whole) <= most:
        return []
    unread = whole[most - 1 : -1]  # the last of what is read, and of the whole, is the end token
    words = str(tokenizer.decode(unread, skip_special_tokens=True)).split()
    start = " ".join(words[:8]) + (" ..." if len(words) > 8 else "")
    shown = text if len(text) <= 24 else text[:24] + "..."
    count = f"{name} reads {most} tokens; the last {len(unread)} tokens"
    return [f"{count} of the prompt '{shown}' are not read: {start}"]


def avoid_added_masks(encoder: Any, device: torch.device | str) -> None:  # noqa: ANN401 (a model of transformers)
    """On an NPU, have an encoder compute attention by plain products. The fused kernel there takes masks of
    booleans only, and T5 adds its position bias to the scores.
    """
    if torch.device(device).type == "npu" and encoder.config._attn_implementation != "eager":
        encoder.set_attn_implementation("eager")


def hash_encoder(model: Any, keys: Sequence[str]) -> str:  # noqa: ANN401 (a model of transformers)
    """Of an encoder's weights and of what its config has under these keys."""
    known = plain({key: getattr(model.config, key) for key in keys})
    return hash_text(f"{known} {hash_tensors(model.state_dict())}")


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of its rules, not of its files, which are of several kinds. How it pads and cuts is left from
    its last call.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one without the tokenizers library
        return hash_plain([type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map])
    rules = json.loads(backend.to_str())
    return hash_plain({key: rules[key] for key in rules if key not in ("truncation", "padding")})


# --- Loading ------------------------------------------------------------------------------------------------


def load_pretrained(
    folder: Path, class_and_config: ClassAndConfig, *, dtype: torch.dtype, used: tuple[str, ...]
) -> nn.Module:
    """A model of transformers from a folder with config.json and weights (safetensors or pytorch_model.bin,
    whole or in shards). `used`: how the names of its tensors begin; others in the files are left there.

    Raises FileNotFoundError for files that are not there, and ValueError for those that cannot be read and
    for weights that do not fill the model exactly, naming each tensor.
    """
    _check_weight_files(folder)
    with _only_value_errors(folder), _without_load_report():
        kind, config = class_and_config(folder)
        model, info = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            weights_only=True,
            ignore_mismatched_sizes=True,  # they are reported by name, with the missing ones
            output_loading_info=True,
        )
    _check_complete(folder, used, info)
    return model


def empty_pretrained(folder: Path, class_and_config: ClassAndConfig) -> nn.Module:
    """The model on the meta device, of which `folder` needs no more than config.json."""
    with _only_value_errors(folder), torch.device("meta"):
        kind, config = class_and_config(folder)
        return kind(config)


def checked(config: Any, sizes: type[Settings], folder: Path) -> Any:  # noqa: ANN401 (a config of transformers)
    """The config, if it has these `sizes`: transformers checks types, and not all. Raises ValueError that
    names file and keys.
    """
    values = {name: getattr(config, name, None) for name in sizes.model_fields}
    sizes.read(values, where=str(folder / "config.json"))
    return config


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a local folder. Nothing is downloaded, no code in it is run.

    `folder` holds `tokenizer.json`, `spiece.model` (T5) or `vocab.json` and `merges.txt` (CLIP), and
    `tokenizer_config.json` or `config.json`, which say whose it is. Raises FileNotFoundError for what is
    not there, and ValueError for files that cannot be read.
    """
    folder = existing_folder(folder)
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


def existing_folder(folder: Path | str) -> Path:
    """Raises FileNotFoundError or ValueError for what is no folder."""
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no such folder: {folder}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the folder that it is in, {folder.parent}")
    return folder


def check_json(folder: Path) -> None:
    """Read the folder's JSON files by our own reader before transformers does: its errors name no file."""
    for path in (folder / name for name in _JSON_FILES if (folder / name).exists()):
        read_json(path)


def model_type(folder: Path) -> str:
    """The `model_type` of the config in a folder. Raises FileNotFoundError if there is none, and ValueError
    for a damaged JSON file.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    found = str(read_json_object(path).get("model_type"))
    check_json(folder)
    return found


def _check_weight_files(folder: Path) -> None:
    first = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise FileNotFoundError(f"no weights in {folder}: expected one of {', '.join(_WEIGHTS)}")
    if first.endswith(".index.json"):
        shards = read_shard_index(folder / first)
        absent = sorted({name for name in shards.values() if not (folder / name).is_file()})
        if absent:
            raise FileNotFoundError(f"{folder / first} names files that are not there: {', '.join(absent)}")


def _check_complete(folder: Path, used: tuple[str, ...], info: dict) -> None:
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [
        f"{name} has shape {tuple(found)}, expected {tuple(wanted)}"
        for name, found, wanted in sorted(info["mismatched_keys"])
    ]
    problems += [
        f"{name} has no place in the model"
        for name in sorted(info["unexpected_keys"])
        if name.startswith(used)
    ]
    if problems:
        listed = "; ".join(problems)
        raise ValueError(
            f"the weights in {folder} do not fit its config.json ({len(problems)} wrong): {listed}"
        )


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
