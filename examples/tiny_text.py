"""Tiny text encoders with random weights, written to disk in the layouts of google/t5-v1_1-xl and laion/CLIP-ViT-bigG-14.

For the tests and the demo, offline: vocabularies are built here. Not a way to get meaningful text embeddings.
"""

import io
import json
from pathlib import Path

import sentencepiece
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration

# Text that the word pieces are learned from. What they are does not matter: every ASCII character is a piece as well.
_SENTENCES = (
    "a red ball rolls over green grass in the morning light, high quality",
    "a drone view of waves crashing against the cliffs along the beach",
    "worst quality, normal quality, low quality, blurry, watermark, out of frame",
    "the camera moves slowly through a quiet street while rain is falling",
)
_ASCII = "".join(map(chr, range(33, 127)))
_START, _END = "<|startoftext|>", "<|endoftext|>"


def write_text_encoders(
    folder: Path, *, caption_channels: int = 24, pooled_projection_dim: int = 20, seed: int = 0
) -> tuple[Path, Path]:
    """Write `folder`/t5 and `folder`/clip and return both paths.

    The first holds a whole T5 v1.1 (encoder and decoder, `pytorch_model.bin`, `spiece.model`) of width `caption_channels`,
    a multiple of 4. The second holds a whole CLIP (text and vision tower, sharded safetensors, `vocab.json` and
    `merges.txt`) whose text and image embeddings have `pooled_projection_dim` values. One seed gives one set of weights,
    and the caller's random state is left as it was.
    """
    if caption_channels < 4 or caption_channels % 4:
        nearest = max(4, round(caption_channels / 4) * 4)
        raise ValueError(f"caption_channels must be a multiple of 4, got {caption_channels}: use {nearest}")
    folder = Path(folder)
    t5, clip = folder / "t5", folder / "clip"
    for path in (t5, clip):
        path.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _write_t5(t5, width=caption_channels)
        _write_clip(clip, projection_dim=pooled_projection_dim)
    return t5, clip


def _write_t5(folder: Path, *, width: int) -> None:
    pieces = _sentence_pieces()
    (folder / "spiece.model").write_bytes(pieces)
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    _write_json(
        folder / "tokenizer_config.json",
        {
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "extra_ids": len(sentinels),
            "additional_special_tokens": sentinels,
        },
    )
    learned = sentencepiece.SentencePieceProcessor(model_proto=pieces).vocab_size()
    config = T5Config(
        vocab_size=learned + len(sentinels) + 28,  # the released model has 28 rows more than its tokenizer
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config = None
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(folder)
    torch.save({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "pytorch_model.bin")


def _sentence_pieces() -> bytes:
    """A serialised unigram model with T5's special ids (pad 0, end 1, unknown 2) and text normalisation."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*_SENTENCES, " ".join(_ASCII)]),
        model_writer=out,
        vocab_size=240,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars=_ASCII,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def _write_clip(folder: Path, *, projection_dim: int) -> None:
    vocab, merges = _byte_pairs()
    _write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": _START,
            "eos_token": _END,
            "unk_token": _END,
            "pad_token": _END,
            "model_max_length": 77,
        },
    )
    # `eos_token_id` names the true end token. Under the 2 of older configs transformers pools at the highest id instead, which
    # is the same token. The released config has the projection width on its top level only, so it is absent below it here too.
    text = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "bos_token_id": vocab[_START],
        "eos_token_id": vocab[_END],
        "pad_token_id": vocab[_END],
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "hidden_act": "gelu",
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim))
    # The library starts embeddings so small that an untrained tower gives nearly the same vector for every prompt.
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight)
    model.save_pretrained(folder, max_shard_size="40KB")


def _byte_pairs() -> tuple[dict[str, int], list[str]]:
    """CLIP's vocabulary order (bytes, bytes that end a word, merged pieces, start, end) and the merges, first first."""
    alphabet = sorted(ByteLevel.alphabet())
    merges: dict[str, None] = {}
    for word in sorted({word.strip(",") for sentence in _SENTENCES for word in sentence.split()}):
        letters = [*word[:-1], word[-1] + "</w>"]
        piece = letters[0]
        for letter in letters[1:]:
            merges.setdefault(f"{piece} {letter}")
            piece += letter
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *(merge.replace(" ", "") for merge in merges), _START, _END]
    return {piece: index for index, piece in enumerate(pieces)}, list(merges)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
