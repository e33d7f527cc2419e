"""The frozen encoders that training and `osp cache` share: pixels to posterior moments, captions to features.

Which videos and captions those are is decided in data/.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensoraplan.device import DTYPES, dtype_name
from opensoraplan.fingerprint import fingerprint_parts, other_parts
from opensoraplan.formats.assemble import empty_vae, load_vae
from opensoraplan.formats.checkpoints import open_checkpoint
from opensoraplan.models import original
from opensoraplan.models.hashes import hash_plain, hash_tensors
from opensoraplan.models.prompts import PromptSettings
from opensoraplan.models.text import TEXT_PARTS, TextEncoder, TextPart, encode_texts, load_text_encoder
from opensoraplan.models.vae import VideoVAE
from opensoraplan.runtime.streaming import brought
from opensoraplan.train.config import TextSettings, VAESettings

logger = logging.getLogger(__name__)

_PIPELINE = "model_index.json"
# The settings of `text` that name each text encoder and its tokenizer.
_SETTINGS = {"text_encoder": ("t5", "t5_tokenizer"), "text_encoder_2": ("clip", "clip_tokenizer")}


@dataclass(frozen=True, eq=False)
class Encoders:
    """VAE and text encoders in evaluation mode, without gradients, each in its own precision. They compute on
    `device`; one that is elsewhere is brought there each time.
    """

    vae: VideoVAE
    text: Sequence[TextEncoder]
    device: torch.device
    clean: bool = True
    keep_chinese: bool = False

    @property
    def max_tokens(self) -> int:
        """Most tokens that are read of a caption."""
        return self.text[0].max_tokens

    def text_components(self) -> dict[str, Any]:
        """The text encoders and tokenizers by their names in a pipeline."""
        parts = zip(TEXT_PARTS, self.text, strict=True)
        return {
            name: component
            for part, encoder in parts
            for name, component in ((part.encoder, encoder.model), (part.tokenizer, encoder.tokenizer))
        }

    @property
    def models(self) -> list[Any]:
        """The VAE, then the text encoders."""
        return [self.vae, *(encoder.model for encoder in self.text)]

    def stay(self) -> None:
        """Keep all of them on the device from now on."""
        for model in self.models:
            model.to(self.device)

    def wait(self) -> None:
        """Keep all of them in the host's memory while they do not encode."""
        for model in self.models:
            model.to("cpu")

    @contextmanager
    def there(self) -> Iterator[None]:
        """All of them are on the device inside the block."""
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(brought(model, self.device))
            yield

    @torch.no_grad()
    def encode_videos(self, video: Tensor) -> Tensor:
        """Moments [B, 2 C, t, h, w] of the posterior of clips [B, 3, T, H, W] in [-1, 1], in the VAE's
        precision and on its device. Clip by clip: a batch is bit-equal to its clips alone.
        """
        clips = (clip[None].to(self.device, self.vae.dtype) for clip in video)
        with brought(self.models[0], self.device):
            return torch.cat([torch.cat(list(self.vae.iter_encode([clip])), dim=2) for clip in clips])

    def encode_captions(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Features of captions as the original trains on them: cleaned (with `clean`; `keep_chinese` leaves
        Chinese characters in), in no template.
        """
        settings = caption_settings(self)
        texts = [settings.positive(caption) for caption in captions]
        found: list[dict[str, Tensor]] = [{} for _ in texts]
        for encoder in self.text:
            with brought(encoder.model, self.device):
                for features, more in zip(found, encode_texts(texts, [encoder], captions=True), strict=True):
                    features |= more
        return found

    def fingerprint(self) -> dict[str, str]:
        """What features depend on, part by part under names for messages; reads all weights once.

        The same weights have the same fingerprint from whatever kind of checkpoint. The VAE's decoder takes
        no part in it.
        """
        cleaning = "off" if not self.clean else "on, Chinese kept" if self.keep_chinese else "on"
        return {
            **_vae_parts(self.vae),
            **{name: value for encoder in self.text for name, value in encoder.fingerprint().items()},
            "text precision": " ".join(dtype_name(encoder.model.dtype) for encoder in self.text),
            "max_tokens": str(self.max_tokens),
            "caption cleaning": cleaning,
        }


def caption_settings(text: TextSettings | Encoders) -> PromptSettings:
    """What happens to captions, and to the prompts of validation, before they are encoded: cleaning alone."""
    return PromptSettings(template=None, negative_prompt="", clean=text.clean, keep_chinese=text.keep_chinese)


def fingerprint_of_named(vae: VAESettings, text: TextSettings) -> dict[str, str]:
    """As `Encoders.fingerprint`, of those parts that the settings name."""
    parts: dict[str, str] = {}
    paths, cpu = given_paths(vae, text), torch.device("cpu")
    _check_there(paths)
    if (path := paths.get("vae.pretrained")) is not None:
        parts |= _vae_parts(_load_vae(path, vae.config, dtype=DTYPES[vae.compute], device=cpu))
    for part in TEXT_PARTS:
        if f"text.{_SETTINGS[part.encoder][0]}" in paths:
            parts |= _load_text(part, paths, text, device=cpu).fingerprint()
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
        "VAE weights": hash_tensors(getattr(vae, "encoder", vae).state_dict()),
        "VAE config": hash_plain(config),
        "VAE precision": dtype_name(vae.dtype),
    }


def load_encoders(
    vae: VAESettings, text: TextSettings, *, device: torch.device | str, on_host: bool = False
) -> Encoders:
    """Load VAE, text encoders and tokenizers from local files; each path may also be a whole pipeline's. They
    compute on `device`, and are there unless they are to wait `on_host`.

    All settings and paths are checked before anything is loaded. Raises ValueError for a setting that is
    missing and FileNotFoundError for paths that do not exist, naming each, and what loading the parts raises.
    """
    device = torch.device(device)
    home = torch.device("cpu") if on_host else device
    paths = find_parts(vae, text)
    loaded = _load_vae(paths["vae.pretrained"], vae.config, dtype=DTYPES[vae.compute], device=home)
    loaded.enable_streaming(latent_frames=vae.chunk)
    return Encoders(
        vae=loaded.requires_grad_(False).eval(),
        text=[_load_text(part, paths, text, device=home) for part in TEXT_PARTS],
        device=device,
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
    given = {"vae.pretrained": (vae.pretrained, "vae")}
    for part in TEXT_PARTS:
        encoder, tokenizer = _SETTINGS[part.encoder]
        path = getattr(text, encoder)
        given[f"text.{encoder}"] = path, part.encoder
        given[f"text.{tokenizer}"] = getattr(text, tokenizer) or path, part.tokenizer
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


def _load_text(
    part: TextPart, paths: Mapping[str, Path], text: TextSettings, *, device: torch.device
) -> TextEncoder:
    """One of the text encoders whose `paths` are known by their settings."""
    encoder, tokenizer = (paths[f"text.{name}"] for name in _SETTINGS[part.encoder])
    return load_text_encoder(
        encoder, tokenizer, part, dtype=DTYPES[text.compute], device=device, max_tokens=text.max_tokens
    )
