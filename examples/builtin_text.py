"""Small T5 and CLIP text encoders for the built-in model, trained to tell what captions of shapes say.

    python examples/builtin_text.py FOLDER

writes FOLDER/text_encoder, tokenizer, text_encoder_2 and tokenizer_2 in the layout of a diffusers
pipeline. The tokenizers are made from captions. Each encoder learns to name every attribute of a scene
from its caption; held out combinations are left out, as in the training of the denoiser. About four
minutes on two CPU cores.
"""

import argparse
import json
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from moving_shapes.captions import caption
from moving_shapes.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES, Scene, scene_for
from tiny_text import byte_pairs, sentence_pieces
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from opensoraplan.models.captions import clean_caption
from opensoraplan.models.pretrained_text import load_tokenizer

logger = logging.getLogger(__name__)

WIDTH, LAYERS, HEADS = 192, 3, 6
POOLED_WIDTH = 128
PIECES = 600
BATCH, LEARNING_RATE = 64, 1e-3
# The attributes of a scene: what each thing is and does, left one first, then how many and where.
VALUES = (tuple(COLOURS), tuple(SHAPES), tuple(SIZES), MOTIONS)
UNSAID = -100  # cross_entropy leaves these out


class Question(NamedTuple):
    """A caption and the class of each attribute that it tells, UNSAID for others."""

    text: str
    answers: list[int]


def answers(scene: Scene, *, short: bool) -> list[int]:
    """The class of every attribute, of the first thing, the second, then of the scene."""
    classes = []
    for place in range(2):
        if place < len(scene.things):
            thing = scene.things[place]
            size = UNSAID if short else list(SIZES).index(thing.size)
            classes += [list(COLOURS).index(thing.colour), list(SHAPES).index(thing.shape)]
            classes += [size, MOTIONS.index(thing.motion)]
        else:
            classes += [UNSAID] * len(VALUES)
    where = UNSAID if short else list(BACKGROUNDS).index(scene.background)
    return [*classes, len(scene.things) - 1, where]


CLASSES = [len(values) for values in (*VALUES, *VALUES)] + [2, len(BACKGROUNDS)]


def questions(seed: int) -> Iterator[Question]:
    """An endless list of captions in every wording, a fifth of them short."""
    rng = random.Random(seed)
    for index in iter(range(1 << 62)):
        scene = scene_for(index, seed=seed)
        short = rng.random() < 0.2
        text = caption(scene, variant=rng.randrange(1000), short=short)
        yield Question(clean_caption(clean_caption(text)), answers(scene, short=short))


def write_t5_tokenizer(folder: Path, texts: list[str]) -> None:
    """A unigram tokenizer with T5's special ids (pad 0, end 1, unknown 2) and the words of `texts` whole."""
    words = sorted({word for text in texts for word in re.findall(r"[a-z-]+", text)})
    (folder / "spiece.model").write_bytes(sentence_pieces(texts, count=PIECES, words=words))
    config = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "extra_ids": 0}))


def write_clip_tokenizer(folder: Path, texts: list[str]) -> None:
    """A byte-pair tokenizer that knows the words of `texts`."""
    vocab, merges = byte_pairs(texts)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    end = "<|endoftext|>"
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": end}
    tokenizer |= {"unk_token": end, "pad_token": end, "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def new_t5(vocab_size: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=2 * WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
        initializer_factor=0.3,
    )
    return T5EncoderModel(config)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED_WIDTH,
        intermediate_size=3 * POOLED_WIDTH,
        projection_dim=POOLED_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="gelu",
        bos_token_id=tokenizer.convert_tokens_to_ids("<|startoftext|>"),
        eos_token_id=end,
        pad_token_id=end,
        initializer_factor=1.0,
    )
    return CLIPTextModelWithProjection(config)


class Heads(nn.Module):
    """A linear classifier of each attribute on top of a vector [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in CLASSES)

    def forward(self, pooled: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and how many answers [] of how many said ones [] are right; `wanted` [B, attributes]."""
        logits = [head(self.norm(pooled)) for head in self.heads]
        losses = [
            F.cross_entropy(guess, right, ignore_index=UNSAID)
            for guess, right in zip(logits, wanted.unbind(1), strict=True)
            if (right != UNSAID).any()
        ]
        guesses = torch.stack([guess.argmax(1) for guess in logits], dim=1)
        return torch.stack(losses).mean(), (guesses == wanted).sum(), (wanted != UNSAID).sum()


def train(folder: Path, *, steps: int, seed: int = 0) -> None:
    """Make the tokenizers, train both encoders side by side, write all four folders."""
    t5_tokenizer_folder, clip_tokenizer_folder = folder / "tokenizer", folder / "tokenizer_2"
    for path in (t5_tokenizer_folder, clip_tokenizer_folder):
        path.mkdir(parents=True, exist_ok=True)
    source = questions(seed)
    texts = [next(source).text for _ in range(4000)]
    write_t5_tokenizer(t5_tokenizer_folder, texts)
    write_clip_tokenizer(clip_tokenizer_folder, texts)
    t5_tokenizer, clip_tokenizer = load_tokenizer(t5_tokenizer_folder), load_tokenizer(clip_tokenizer_folder)

    torch.manual_seed(seed)
    t5, clip = new_t5(len(t5_tokenizer)), new_clip(clip_tokenizer)
    t5_heads, clip_heads = Heads(WIDTH), Heads(POOLED_WIDTH)
    parameters = [p for part in (t5, clip, t5_heads, clip_heads) for p in part.parameters()]
    logger.info("T5 %d, CLIP %d parameters", t5.num_parameters(), clip.num_parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    progress = tqdm(range(steps), desc="text encoders")
    for _ in progress:
        batch = [next(source) for _ in range(BATCH)]
        wanted = torch.tensor([question.answers for question in batch])
        t5_loss, *t5_right = t5_heads(_t5_pooled(t5, t5_tokenizer, batch), wanted)
        clip_loss, *clip_right = clip_heads(_clip_pooled(clip, clip_tokenizer, batch), wanted)
        optimizer.zero_grad()
        (t5_loss + clip_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        shares = {name: f"{int(a) / int(b):.3f}" for name, (a, b) in (("t5", t5_right), ("clip", clip_right))}
        progress.set_postfix(shares)
    logger.info("answers right in the last batch: %s", shares)
    t5.save_pretrained(folder / "text_encoder")
    clip.save_pretrained(folder / "text_encoder_2")


def _t5_pooled(model: T5EncoderModel, tokenizer: object, batch: list[Question]) -> Tensor:
    """The mean of the real tokens' states [B, D]."""
    tokens = tokenizer([question.text for question in batch], padding=True, return_tensors="pt")
    states = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    weights = tokens.attention_mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _clip_pooled(model: CLIPTextModelWithProjection, tokenizer: object, batch: list[Question]) -> Tensor:
    texts = [question.text for question in batch]
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    return model(input_ids=tokens.input_ids).text_embeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=700)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if (arguments.folder / "text_encoder_2" / "config.json").exists():  # what is written last
        logger.info("%s is there already", arguments.folder)
        return
    train(arguments.folder, steps=arguments.steps)


if __name__ == "__main__":
    main()
