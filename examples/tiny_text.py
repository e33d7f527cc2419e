"""Tiny text encoders with random weights, in the layouts of google/t5-v1_1-xl and laion/CLIP-ViT-bigG-14.

For the tests and the demo, offline: vocabularies are built here. Their embeddings carry no meaning.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration

# Word pieces are learned from these; every printable ASCII character becomes one besides.
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

    The first holds a whole T5 v1.1 (encoder and decoder, `pytorch_model.bin`, `spiece.model`) of width
    `caption_channels`. The second holds a whole CLIP (text and vision tower, sharded safetensors,
    `vocab.json` and `merges.txt`) whose text embedding has `pooled_projection_dim` values. One seed gives
    one set of weights, and the caller's random state is left as it was.
    """
    t5, clip = folder / "t5", folder / "clip"
    for path in (t5, clip):
        path.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _write_t5(t5, width=caption_channels)
        _write_clip(clip, projection_dim=pooled_projection_dim)
    return t5, clip


def _write_t5(folder: Path, *, width: int) -> None:
    pieces = sentence_pieces(_SENTENCES, count=240)
    (folder / "spiece.model").write_bytes(pieces)
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    tokenizer = {
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": len(sentinels),
        "additional_special_tokens": sentinels,
    }
    _write_json(folder / "tokenizer_config.json", tokenizer)
    learned = sentencepiece.SentencePieceProcessor(model_proto=pieces).vocab_size()
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": learned + len(sentinels) + 28,  # the release, too, has 28 rows more than its tokenizer
        "d_model": width,
        "d_kv": 8,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 32,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "use_cache": True,
    }
    _write_json(folder / "config.json", config)
    model = T5ForConditionalGeneration(T5Config.from_dict(config))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def sentence_pieces(texts: Sequence[str], *, count: int, words: Sequence[str] = ()) -> bytes:
    """A serialised unigram model of about `count` pieces, learned from `texts`, with T5's special ids (pad 0,
    end 1, unknown 2) and text normalisation. Each of `words` is one piece at the start of a word.
    """
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, " ".join(_ASCII)]),
        model_writer=out,
        vocab_size=count,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars=_ASCII,
        user_defined_symbols=[f"\u2581{word}" for word in words],
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def _write_clip(folder: Path, *, projection_dim: int) -> None:
    vocab, merges = byte_pairs(_SENTENCES)
    _write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    tokenizer = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": _START,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": _END,
        "model_max_length": 77,
    }
    _write_json(folder / "tokenizer_config.json", tokenizer)
    # `eos_token_id` names the true end token, where transformers pools. (Under the 2 of older configs it
    # pools at the highest id, the same token here.) The text part keeps 512 as the width of its projection,
    # a default that the top level overrules, as in configs that were converted from open_clip.
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
    # As the library initialises them, an untrained tower gives nearly the same vector for every prompt.
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight)
    model.save_pretrained(folder, max_shard_size="40KB")


def byte_pairs(texts: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """The vocabulary in CLIP's order (bytes, bytes at a word's end, merged, start, end), and the merges that
    make every word of `texts` one token.
    """
    alphabet = sorted(ByteLevel.alphabet())
    merges: dict[str, None] = {}
    for word in sorted({word.strip(",.;:") for text in texts for word in text.split()}):
        letters = [*word[:-1], word[-1] + "</w>"]
        piece = letters[0]
        for letter in letters[1:]:
            merges.setdefault(f"{piece} {letter}")
            piece += letter
    merged = (merge.replace(" ", "") for merge in merges)
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *merged, _START, _END]
    return {piece: index for index, piece in enumerate(pieces)}, list(merges)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
