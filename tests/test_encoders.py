"""The frozen encoders: what they make of clips and captions, and their fingerprint."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from opensoraplan.formats.mindspeed.inference import read_inference
from opensoraplan.models.captions import clean_caption
from opensoraplan.models.text import PromptEmbeds, encode_prompts, text_encoder_of
from opensoraplan.train.config import TextSettings, VAESettings
from opensoraplan.train.inputs.encoders import Encoders, load_encoders, sample_posterior


@pytest.fixture(scope="module")
def encoders(tiny_model: Path) -> Encoders:
    """Everything from one pipeline folder, text in fp32. Read only."""
    text = TextSettings(t5=tiny_model, clip=tiny_model, compute="fp32")
    return load_encoders(VAESettings(pretrained=tiny_model), text, device="cpu")


def test_videos(encoders: Encoders) -> None:
    videos = torch.rand(2, 3, 9, 16, 24) * 2 - 1
    moments = encoders.encode_videos(videos)
    assert moments.shape == (2, 8, 2, 2, 3)
    assert moments.dtype == torch.float32
    assert not moments.requires_grad
    for video, expected in zip(videos, moments, strict=True):
        assert torch.equal(encoders.encode_videos(video[None])[0], expected)
    expected = torch.cat(list(encoders.vae.iter_encode([videos])), dim=2)
    torch.testing.assert_close(moments, expected)


def test_chunks_change_no_features(tiny_model: Path, encoders: Encoders) -> None:
    text = TextSettings(t5=tiny_model, clip=tiny_model, compute="fp32")
    single = load_encoders(VAESettings(pretrained=tiny_model, chunk=1), text, device="cpu")
    assert [part.vae.streaming_latent_frames for part in (encoders, single)] == [4, 1]
    assert single.fingerprint() == encoders.fingerprint()
    videos = torch.rand(1, 3, 25, 16, 24) * 2 - 1
    torch.testing.assert_close(single.encode_videos(videos), encoders.encode_videos(videos))


def test_everything_is_frozen(encoders: Encoders) -> None:
    for model in (encoders.vae, *(encoder.model for encoder in encoders.text)):
        assert not model.training
        assert not any(weight.requires_grad for weight in model.parameters())


def test_captions_are_cleaned_and_in_no_template(encoders: Encoders) -> None:
    captions = ["A Red  Ball!! https://x.com/y", ""]

    def encode(texts: list[str]) -> torch.Tensor:
        return encode_prompts(texts, encoders.text).sequence

    cleaned = PromptEmbeds.of(encoders.encode_captions(captions))
    assert torch.equal(cleaned.sequence, encode([clean_caption(text) for text in captions]))
    raw = PromptEmbeds.of(dataclasses.replace(encoders, clean=False).encode_captions(captions))
    assert torch.equal(raw.sequence, encode(captions))
    assert raw.mask.sum(1)[1] == 1  # "" is the end token alone


def test_chinese_characters_may_stay_in_captions(tiny_model: Path, encoders: Encoders) -> None:
    def load(**text: bool) -> Encoders:
        paths = TextSettings(t5=tiny_model, clip=tiny_model, compute="fp32", **text)
        return load_encoders(VAESettings(pretrained=tiny_model), paths, device="cpu")

    def sequence(encoders: Encoders, text: str) -> torch.Tensor:
        return encoders.encode_captions([text])[0]["sequence"]

    def cleaned(text: str) -> torch.Tensor:
        return sequence(dataclasses.replace(encoders, clean=False), text)

    caption = "A Cat \u732b  runs"
    kept = load(keep_chinese=True)
    assert torch.equal(sequence(kept, caption), cleaned("a cat \u732b runs"))
    assert torch.equal(sequence(encoders, caption), cleaned("a cat runs"))
    # Caches of the default stay valid; where nothing is cleaned, nothing is removed.
    parts = [made.fingerprint() for made in (encoders, kept, load(keep_chinese=True, clean=False))]
    assert [part.pop("caption cleaning") for part in parts] == ["on", "on, Chinese kept", "off"]
    assert parts[0] == parts[1] == parts[2]


def test_long_captions_warn_for_t5_only(encoders: Encoders, caplog: pytest.LogCaptureFixture) -> None:
    text = [text_encoder_of(one.model, one.tokenizer, max_tokens=4) for one in encoders.text]
    short = dataclasses.replace(encoders, text=text)
    with caplog.at_level(logging.WARNING):
        (features,) = short.encode_captions(["a red ball " * 60])
    assert features["sequence"].shape[0] == 4
    assert [record.getMessage()[:16] for record in caplog.records] == ["T5 reads 4 token"]


def test_fingerprint_is_of_what_is_in_the_files_not_of_their_kind(
    encoders: Encoders, tiny_release: Path
) -> None:
    inference = read_inference(tiny_release / "inference.json")
    vae = VAESettings(pretrained=tiny_release / "wfvae.ckpt", config=inference.vae_config)
    text = TextSettings(t5=tiny_release / "t5", clip=tiny_release / "clip", compute="fp32")
    released = load_encoders(vae, text, device="cpu")
    released.encode_captions(["calls leave settings in the tokenizers"])
    assert released.fingerprint() == encoders.fingerprint()


def test_fingerprint_names_what_changed(tiny_model: Path, encoders: Encoders) -> None:
    before = encoders.fingerprint()
    text = TextSettings(t5=tiny_model, clip=tiny_model, compute="fp32", max_tokens=9, clean=False)
    other = load_encoders(VAESettings(pretrained=tiny_model, compute="bf16"), text, device="cpu")

    def changed() -> set[str]:
        return {name for name, value in other.fingerprint().items() if value != before[name]}

    expected = {"VAE weights", "VAE precision", "max_tokens", "caption cleaning"}
    assert changed() == expected
    with torch.no_grad():
        other.vae.decoder.conv_out.weight.add_(1)
    assert changed() == expected
    t5, clip = other.text
    with torch.no_grad():
        t5.model.encoder.final_layer_norm.weight[0] += 1e-6
    assert changed() == expected | {"T5"}
    clip.model.config.hidden_act = "quick_gelu"
    t5.tokenizer.add_tokens(["<new>"])
    other.vae.register_to_config(shift=[0.0] * 4)
    assert changed() == expected | {"T5", "CLIP", "T5 tokenizer", "VAE config"}


def test_a_config_of_the_settings_goes_before_the_checkpoints_own(tiny_model: Path) -> None:
    """Which is not lost: shift and scale of the latents are in it."""
    text = TextSettings(t5=tiny_model, clip=tiny_model)
    own = load_encoders(VAESettings(pretrained=tiny_model), text, device="cpu").vae.config
    same = load_encoders(VAESettings(pretrained=tiny_model, config={}), text, device="cpu").vae.config
    assert same["shift"] == own["shift"] is not None
    given = VAESettings(pretrained=tiny_model, config={"scale": [2.0] * own["latent_channels"]})
    other = load_encoders(given, text, device="cpu").vae.config
    assert (other["shift"], other["scale"]) == (own["shift"], [2.0] * own["latent_channels"])


def test_settings_are_checked_first(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing: vae\.pretrained \(.*, text\.t5 \(.*, text\.clip \("):
        load_encoders(VAESettings(), TextSettings(), device="cpu")
    gone = TextSettings(t5=tmp_path / "gone", clip=tiny_model, clip_tokenizer=tmp_path / "lost")
    with pytest.raises(FileNotFoundError) as raised:
        load_encoders(VAESettings(pretrained=tiny_model), gone, device="cpu")
    parts = (
        f"text.t5: {tmp_path / 'gone'}",
        f"text.t5_tokenizer: {tmp_path / 'gone'}",
        f"text.clip_tokenizer: {tmp_path / 'lost'}",
    )
    assert str(raised.value) == "these paths do not exist: " + "; ".join(parts)


def test_sample_posterior() -> None:
    moments = torch.randn(2, 8, 1, 2, 3) * 40  # beyond the bounds of logvar, too
    noise = torch.randn(2, 4, 1, 2, 3, generator=torch.Generator().manual_seed(3))
    expected = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(3))
    assert torch.equal(sample_posterior(moments, noise), expected)
