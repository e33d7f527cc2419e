"""The frozen encoders that training and `osp cache` share: pixels to posterior moments, captions to states.

Which videos and captions those are is decided in data/.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from opensoraplan.device import DTYPES, dtype_name
from opensoraplan.fingerprint import fingerprint_parts, other_parts
from opensoraplan.formats.assemble import empty_vae, load_vae
from opensoraplan.formats.checkpoints import open_checkpoint
from opensoraplan.models import original
from opensoraplan.models.prompts import PromptSettings
from opensoraplan.models.text import (
    PromptEmbeds,
    TextEncoders,
    encode_prompts,
    load_text_encoder,
    load_tokenizer,
)
from opensoraplan.models.vae import VideoVAE
from opensoraplan.train.config import TextSettings, VAESettings

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

logger = logging.getLogger(__name__)

_PIPELINE = "model_index.json"
# What of a text encoder's config decides its output, beside the weights. The rest of it changes from one way
# of saving to the other.
_T5_KEYS = (
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "feed_forward_proj",
    "layer_norm_epsilon",
)
_CLIP_KEYS = ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id")


@dataclass(frozen=True, eq=False)
class Encoders:
    """VAE and text encoders in evaluation mode, without gradients, each in its own precision."""

    vae: VideoVAE
    text_encoder: "T5EncoderModel"
    tokenizer: "PreTrainedTokenizerBase"
    text_encoder_2: "CLIPTextModelWithProjection"
    tokenizer_2: "PreTrainedTokenizerBase"
    max_tokens: int = 512
    clean: bool = True
    keep_chinese: bool = False

    @property
    def text_encoders(self) -> TextEncoders:
        return TextEncoders(self.tokenizer, self.text_encoder, self.tokenizer_2, self.text_encoder_2)

    @property
    def text_widths(self) -> tuple[int, int]:
        """Of T5's states and of CLIP's pooled one: the denoiser's
        caption_channels and pooled_projection_dim.
        """
        t5: Any = self.text_encoder.config
        clip: Any = self.text_encoder_2.config
        return t5.d_model, clip.projection_dim

    def to(self, device: torch.device) -> Self:
        """The same models, moved."""
        for model in (self.vae, self.text_encoder, self.text_encoder_2):
            model.to(device)  # type: ignore[arg-type]
        return self

    @torch.no_grad()
    def encode_videos(self, video: Tensor) -> Tensor:
        """Moments [B, 2 C, t, h, w] of the posterior of clips [B, 3, T, H, W] in [-1, 1], in the VAE's
        precision and on its device. Clip by clip: a batch is bit-equal to its clips alone.
        """
        clips = (clip[None].to(self.vae.device, self.vae.dtype) for clip in video)
        return torch.cat([torch.cat(list(self.vae.iter_encode([clip])), dim=2) for clip in clips])

    def encode_captions(self, captions: Sequence[str]) -> PromptEmbeds:
        """States of captions as the original trains on them: cleaned (with `clean`; `keep_chinese` leaves
        Chinese characters in), in no template.
        """
        settings = caption_settings(self)
        return encode_prompts(
            [settings.positive(caption) for caption in captions],
            self.text_encoders,
            max_length=self.max_tokens,
            warn_of_clip=False,  # as in the original, captions are longer than what CLIP reads
        )

    def fingerprint(self) -> dict[str, str]:
        """What features depend on, part by part under names for messages; reads all weights once.

        The same weights have the same fingerprint from whatever kind of checkpoint. The VAE's decoder takes
        no part in it.
        """
        text = f"{dtype_name(self.text_encoder.dtype)} {dtype_name(self.text_encoder_2.dtype)}"
        cleaning = "off" if not self.clean else "on, Chinese kept" if self.keep_chinese else "on"
        return {
            **_vae_parts(self.vae),
            **_t5_parts(self.text_encoder, self.tokenizer),
            **_clip_parts(self.text_encoder_2, self.tokenizer_2),
            "text precision": text,
            "max_tokens": str(self.max_tokens),
            "caption cleaning": cleaning,
        }


def caption_settings(text: TextSettings | Encoders) -> PromptSettings:
    """What happens to captions, and to the prompts of validation, before they are encoded: cleaning alone."""
    return PromptSettings(template=None, negative_prompt="", clean=text.clean, keep_chinese=text.keep_chinese)


# All names that `Encoders.fingerprint` gives.
ENCODER_PARTS = (
    *("VAE weights", "VAE config", "VAE precision", "T5", "T5 tokenizer", "CLIP", "CLIP tokenizer"),
    *("text precision", "max_tokens", "caption cleaning"),
)


def fingerprint_of_named(vae: VAESettings, text: TextSettings) -> dict[str, str]:
    """As `Encoders.fingerprint`, of those parts that the settings name."""
    parts: dict[str, str] = {}
    paths, dtype, cpu = given_paths(vae, text), DTYPES[text.compute], torch.device("cpu")
    _check_there(paths)
    if (path := paths.get("vae.pretrained")) is not None:
        parts |= _vae_parts(_load_vae(path, vae.config, dtype=DTYPES[vae.compute], device=cpu))
    if (path := paths.get("text.t5")) is not None:
        encoder = load_text_encoder(path, kind="t5", dtype=dtype, device=cpu)
        parts |= _t5_parts(encoder, load_tokenizer(paths["text.t5_tokenizer"]))
    if (path := paths.get("text.clip")) is not None:
        encoder = load_text_encoder(path, kind="clip", dtype=dtype, device=cpu)
        parts |= _clip_parts(encoder, load_tokenizer(paths["text.clip_tokenizer"]))
    return parts


def fingerprint_files(vae: VAESettings, text: TextSettings) -> dict[str, str]:
    """Fingerprints of the files that the settings name, as far as they are there, by their settings. Unlike
    `Encoders.fingerprint` they are read in part, and the same weights in another format have another one.
    """
    paths = given_paths(vae, text)
    return fingerprint_parts({name: path for name, path in paths.items() if path.exists()})


def warn_of_other_encoders(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warn of files that are others `now` than when a checkpoint was made, by `fingerprint_files` of both."""
    if changed := other_parts(before, now):
        logger.warning(
            "%s: the files are not those that the run was trained with until now: it continues with other "
            "latents or text states",
            ", ".join(changed),
        )


def _vae_parts(vae: VideoVAE) -> dict[str, str]:
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    return {
        "VAE weights": _hash_of_tensors(getattr(vae, "encoder", vae).state_dict()),
        "VAE config": _hash(_plain(config)),
        "VAE precision": dtype_name(vae.dtype),
    }


def _t5_parts(encoder: torch.nn.Module, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    return {"T5": _hash_of_encoder(encoder, _T5_KEYS), "T5 tokenizer": _hash_of_tokenizer(tokenizer)}


def _clip_parts(encoder: torch.nn.Module, tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    return {"CLIP": _hash_of_encoder(encoder, _CLIP_KEYS), "CLIP tokenizer": _hash_of_tokenizer(tokenizer)}


def load_encoders(vae: VAESettings, text: TextSettings, *, device: torch.device | str) -> Encoders:
    """Load VAE, text encoders and tokenizers from local files; each path may also be a whole pipeline's.

    All settings and paths are checked before anything is loaded. Raises ValueError for a setting that is
    missing and FileNotFoundError for paths that do not exist, naming each, and what loading the parts raises.
    """
    device = torch.device(device)
    paths = find_parts(vae, text)
    text_dtype = DTYPES[text.compute]
    loaded = _load_vae(paths["vae.pretrained"], vae.config, dtype=DTYPES[vae.compute], device=device)
    loaded.enable_streaming(latent_frames=vae.chunk)
    return Encoders(
        vae=loaded.requires_grad_(False).eval(),
        text_encoder=load_text_encoder(paths["text.t5"], kind="t5", dtype=text_dtype, device=device),
        tokenizer=load_tokenizer(paths["text.t5_tokenizer"]),
        text_encoder_2=load_text_encoder(paths["text.clip"], kind="clip", dtype=text_dtype, device=device),
        tokenizer_2=load_tokenizer(paths["text.clip_tokenizer"]),
        max_tokens=text.max_tokens,
        clean=text.clean,
        keep_chinese=text.keep_chinese,
    )


def check_paths(vae: VAESettings, text: TextSettings) -> None:
    """Raise what `load_encoders` raises for settings that are missing and paths that do not exist."""
    find_parts(vae, text)


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents [B, C, t, h, w] of posterior moments [B, 2 C, t, h, w] and standard normal noise of the
    latents' shape: mean + exp(logvar / 2) * noise, with logvar, of the variance, kept in -30 .. 20.
    """
    mean, logvar = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise


def find_parts(vae: VAESettings, text: TextSettings) -> dict[str, Path]:
    """Where each part is, by its setting."""
    paths = given_paths(vae, text)
    needed = {
        "vae.pretrained": "the folder or file of a VAE",
        "text.t5": "the folder of a T5 encoder",
        "text.clip": "the folder of a CLIP text model with projection",
    }
    missing = [f"{name} ({what})" for name, what in needed.items() if name not in paths]
    if missing:
        raise ValueError(
            f"these settings are missing: {', '.join(missing)}; each may also name a whole pipeline"
        )
    _check_there(paths)
    return paths


def given_paths(vae: VAESettings, text: TextSettings) -> dict[str, Path]:
    """The paths of those parts that the settings name, by their settings. They may not exist."""
    given = {
        "vae.pretrained": (vae.pretrained, "vae"),
        "text.t5": (text.t5, "text_encoder"),
        "text.clip": (text.clip, "text_encoder_2"),
        "text.t5_tokenizer": (text.t5_tokenizer or text.t5, "tokenizer"),
        "text.clip_tokenizer": (text.clip_tokenizer or text.clip, "tokenizer_2"),
    }
    return {name: _part(path, part) for name, (path, part) in given.items() if path is not None}


def _check_there(paths: Mapping[str, Path]) -> None:
    absent = [f"{name}: {path}" for name, path in paths.items() if not path.exists()]
    if absent:
        raise FileNotFoundError(f"these paths do not exist: {'; '.join(absent)}")


def _part(path: Path, name: str) -> Path:
    return path / name if (path / _PIPELINE).is_file() else path


def _load_vae(
    path: Path, config: Mapping[str, Any] | None, *, dtype: torch.dtype, device: torch.device
) -> VideoVAE:
    if config is None:
        return load_vae(path, dtype=dtype, device=device)
    checkpoint = open_checkpoint(path)
    vae = empty_vae(checkpoint, config)
    original.load(vae, checkpoint, dtype=dtype)
    return vae.to(device)  # type: ignore[arg-type]


def _hash_of_encoder(encoder: torch.nn.Module, keys: Sequence[str]) -> str:
    config: Any = encoder.config
    known = _plain({key: getattr(config, key) for key in keys})
    return _hash(f"{known} {_hash_of_tensors(encoder.state_dict())}")


def _hash_of_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Of its rules, not of its files, which are of several kinds. How it pads and cuts is left from
    its last call.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one without the tokenizers library
        return _hash(_plain([type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]))
    rules = json.loads(backend.to_str())
    return _hash(_plain({key: rules[key] for key in rules if key not in ("truncation", "padding")}))


def _hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and every byte, in several threads: hashing lets go of the interpreter."""
    names = sorted(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
        digests = executor.map(_hash_of_tensor, (tensors[name] for name in names))
        return _hash("\n".join(f"{name} {digest}" for name, digest in zip(names, digests, strict=True)))


def _hash_of_tensor(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{dtype_name(plain.dtype)} {list(plain.shape)} ".encode(), digest_size=16)
    digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(content: str) -> str:
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _plain(value: object) -> str:
    return json.dumps(value, sort_keys=True)
