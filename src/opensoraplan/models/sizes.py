"""Sizes of these models by formula: weights and how tensor parallelism splits them, FLOPs, memory of a
forward pass and of decoding. Nothing is measured or run; what training needs besides is in plan/.

Bytes, unless it says otherwise. FLOPs are multiplications and additions of matrix products, nothing else.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch

from opensoraplan.defaults import BasePrecision
from opensoraplan.models.chunks import latents_at_a_time, tile_starts
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.strict import name_wrong_types
from opensoraplan.shapes import COLOURS, SPATIAL_STRIDE

FP32 = 4
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_NF4_BLOCK = 64  # numbers with a scale
ROOT = -1  # the unit of what is outside of all blocks

# --- Tensor parallelism -------------------------------------------------------------------------------------

# As in the original: attention is split by heads, feed-forwards by their inner width, AdaLN by its outputs.
# All other tensors are whole on every rank.
ADALN = ("norm1.linear", "norm2.linear", "norm_out.linear")
# Linear layers whose outputs are split, in dimension 0 of weight and bias ...
_BY_OUTPUTS = (
    *(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
    *("net.0.proj", *ADALN),
)
# ... or inputs, in dimension 1 of the weight; the bias is whole.
_BY_INPUTS = ("attn1.to_out.0", "attn1.to_add_out", "net.2")


def split_dimension(name: str) -> int | None:
    """The dimension in which ranks split the tensor of this name, the model's or the release's, or None."""
    layer, _, kind = name.rpartition(".")
    if layer.endswith(_BY_OUTPUTS):
        return 0
    return 1 if kind == "weight" and layer.endswith(_BY_INPUTS) else None


# --- Weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A parameter: the block that it is in (or ROOT), its shape, the dimension that tp splits, whether it is
    of AdaLN's linear layers, or of feed-forwards.
    """

    unit: int
    shape: tuple[int, ...]
    split: int | None
    adaln: bool
    feed_forward: bool

    def numbers(self, *, tp: int = 1, shards: int = 1) -> int:
        """How many of its numbers the first rank has; no rank has more."""
        shape = list(self.shape)
        if self.split is not None:
            shape[self.split] = math.ceil(shape[self.split] / tp)
        return math.ceil(shape[0] / shards) * math.prod(shape[1:])


@dataclass(frozen=True)
class Block:
    """A block: its stage and rate, whether it begins with a skip Linear, whether it is the model's last.

    `shares_kept`: what the skip Linear takes is the very tensor that a block before it takes.
    """

    rate: int
    skip: bool
    last: bool
    shares_kept: bool


class DenoiserSizes:
    """Sizes of a denoiser of this config, the constructor's arguments; weights are those of a real one, made
    without values. Raises ValueError as the constructor does, and for unknown keys.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        SparseUMMDiT.check_config(config, where="the model's config")
        with torch.device("meta"), name_wrong_types("the model's config"):
            model = SparseUMMDiT(**config)
        self._measure(model)

    @classmethod
    def of(cls, model: SparseUMMDiT) -> Self:
        """Sizes of a denoiser that exists, whose weights are whole (runtime/quantisation.py)."""
        sizes = cls.__new__(cls)
        sizes._measure(model)
        return sizes

    def _measure(self, model: SparseUMMDiT) -> None:
        self.config: dict[str, Any] = {k: v for k, v in model.config.items() if not k.startswith("_")}
        self.heads: int = self.config["num_attention_heads"]
        self.head_dim: int = self.config["attention_head_dim"]
        self.dim = self.heads * self.head_dim
        self.depths: Sequence[int] = self.config["num_layers"]
        self.rates: Sequence[int] = self.config["sparse_n"] or [1] * len(self.depths)
        self.weights = [_weight(name, tuple(p.shape)) for name, p in model.named_parameters()]
        self._numbers: dict[tuple[int, int, int], int] = {}

    @cached_property
    def blocks(self) -> list[Block]:
        middle, skips, rates = len(self.depths) // 2, self.config["skip_connection"], self.rates
        blocks = [
            Block(
                rate,
                skip=skips and stage > middle and not index,
                last=False,
                # Going to another rate and back is a copy each; the stage after the one that was kept is
                # the mirror of the one before this.
                shares_kept=rate == rates[-stage] == 1 if stage else False,
            )
            for stage, (depth, rate) in enumerate(zip(self.depths, rates, strict=True))
            for index in range(depth)
        ]
        return [*blocks[:-1], replace(blocks[-1], last=True)]

    def numbers(self, *, unit: int | None = None, tp: int = 1, shards: int = 1) -> int:
        """How many parameters the first rank has, of one unit or of all (None)."""
        if not self._numbers.get((ROOT, tp, shards)):
            for weight in self.weights:
                key = weight.unit, tp, shards
                self._numbers[key] = self._numbers.get(key, 0) + weight.numbers(tp=tp, shards=shards)
        units = range(ROOT, len(self.blocks)) if unit is None else (unit,)
        return sum(self._numbers[of, tp, shards] for of in units)

    def stored(
        self,
        compute: str,
        *,
        unit: int | None = None,
        kind: BasePrecision = "whole",
        adaln: bool | None = None,
    ) -> int:
        """Bytes of the weights of one unit or of all, on one device, kept as `kind`
        (runtime/quantisation.py): a byte for each number of the smaller ones, and a scale for each of their
        outputs; of "nf4" half a byte, and a scale for each block of 64. `adaln`: only AdaLN's linear layers,
        or only the others.
        """
        whole, total = BYTES[compute], 0
        scale = FP32 if kind == "fp8" else whole
        for weight in self.weights:
            if unit in (None, weight.unit) and adaln in (None, weight.adaln):
                in_block = weight.unit != ROOT and len(weight.shape) == 2
                smaller = weight.feed_forward if kind == "fp8" else kind in ("int8", "nf4") and in_block
                numbers = weight.numbers()
                if smaller and kind == "nf4":
                    total += math.ceil(numbers / 2) + math.ceil(numbers / _NF4_BLOCK) * FP32
                else:
                    total += numbers + weight.shape[0] * scale if smaller else numbers * whole
        return total


def _weight(name: str, shape: tuple[int, ...]) -> Weight:
    parts = name.split(".")
    unit = int(parts[1]) if parts[0] == "transformer_blocks" else ROOT
    layer = name.rpartition(".")[0]
    feed_forward = unit != ROOT and parts[2] in ("ff", "ff_enc")
    return Weight(unit, shape, split_dimension(name), adaln=layer.endswith(ADALN), feed_forward=feed_forward)


@dataclass(frozen=True)
class BatchShape:
    """A micro-batch of the ranks that share samples: latents [batch, C, *grid] and texts of `text` tokens."""

    grid: tuple[int, int, int]
    text: int
    batch: int = 1

    def tokens(self, patch: int) -> int:
        """Video tokens of a sample. ValueError for sides that are no multiples of the patch."""
        frames, height, width = self.grid
        if height % patch or width % patch:
            raise ValueError(f"latent sides must be multiples of {patch}, got {height} x {width}")
        return frames * (height // patch) * (width // patch)


# --- FLOPs --------------------------------------------------------------------------------------------------


def attention_flops(dim: int, tokens: int, text: int, *, rate: int) -> int:
    """FLOPs of attention proper, of `rate` subsequences, for `tokens` and `text` tokens of a sample."""
    return 4 * rate * (tokens // rate + text) ** 2 * dim  # scores, and sums of the values


def block_flops(dim: int, tokens: int, text: int, *, rate: int, embed_dim: int) -> int:
    """FLOPs of a block without skip Linear that updates the text, for `tokens` and
    `text` tokens of a sample.
    """
    both = tokens + text
    once = 2 * embed_dim * 6 * dim  # two modulations
    once += 3 * both * dim**2  # q, k, v
    once += both * dim**2  # output: of the text, once the copies of all subsequences are averaged
    once += both * 8 * dim**2  # feed-forward
    return 2 * once + attention_flops(dim, tokens, text, rate=rate)


def forward_flops(config: Mapping[str, Any], shape: BatchShape) -> int:
    """FLOPs of one forward pass of SparseUMMDiT with this `config` (its constructor arguments, all of them:
    `model.config`), for text cut to the longest real length.
    """
    depths: Sequence[int] = config["num_layers"]
    rates: Sequence[int] = config["sparse_n"] or [1] * len(depths)
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    embed, patch, text = config["timestep_embed_dim"], config["patch_size"], shape.text
    tokens = shape.tokens(patch)

    # Multiplications, each followed by an addition.
    once = tokens * dim * patch**2 * (config["in_channels"] + config["out_channels"])
    once += text * config["caption_channels"] * dim
    once += embed * (3 * embed + config["pooled_projection_dim"])
    once += embed * 2 * dim  # the last modulation
    once -= text * 9 * dim**2  # the last block has no text output and no text feed-forward

    flops = 2 * once
    for stage, (depth, rate) in enumerate(zip(depths, rates, strict=True)):
        padded = math.ceil(tokens / rate**2) * rate**2
        flops += depth * block_flops(dim, padded, text, rate=rate, embed_dim=embed)
        if stage > len(depths) // 2 and config["skip_connection"]:
            flops += 2 * (padded + text) * 2 * dim**2
    return shape.batch * flops


def training_flops(config: Mapping[str, Any], shape: BatchShape) -> int:
    """FLOPs of forward and backward of one micro-batch: three times `forward_flops`. What is computed again
    to save memory does not count, as usual for MFU.
    """
    return 3 * forward_flops(config, shape)


# --- Memory of what is computed -----------------------------------------------------------------------------


def cache_bytes(
    model: DenoiserSizes, shape: BatchShape, *, moments: str = "fp32", states: str = "bf16"
) -> int:
    """What one sample takes in the feature cache: posterior moments, and the states of one caption."""
    video = 2 * model.config["out_channels"] * math.prod(shape.grid) * BYTES[moments]
    text = shape.text * model.config["caption_channels"] + model.config["pooled_projection_dim"]
    return video + text * BYTES[states]


def forward_memory(
    model: DenoiserSizes, shape: BatchShape, compute: str, *, kind: BasePrecision = "whole"
) -> int:
    """Bytes of one forward pass without gradients, without weights, which have this precision. The peaks of a
    block are GELU (its input and output, and five tensors of the stream's width; in fp8 its output, scaled
    and rounded), the norm of k (seven of them, and three in fp32) and attention (seven, and four that have
    the text once for each subsequence); earlier stages' outputs wait for the later ones. Rotary tables are in
    both orders of each rate.
    """
    c, tokens = BYTES[compute], shape.tokens(model.config["patch_size"])
    waiting = len(model.depths) // 2 if model.config["skip_connection"] else 0
    width = shape.batch * model.dim * c
    stream = (tokens + shape.text) * width
    padded = {n: math.ceil(tokens / n**2) * n**2 for n in model.rates}
    attended = max(padded[n] + n * shape.text for n in padded) * width
    tables = sum(padded[n] * (1 if n == 1 else 2) for n in padded) * model.head_dim * FP32
    busiest = max((15 if kind == "fp8" else 13) * stream, (7 + 3 * FP32 // c) * stream)
    return max(busiest, 7 * stream + 4 * attended) + waiting * stream + tables


def vector_bytes(model: DenoiserSizes, compute: str, *, steps: int) -> int:
    """What AdaLN's linear layers give to all steps of a guided video (models/modulation.py)."""
    numbers = sum(weight.shape[0] for weight in model.weights if weight.adaln and len(weight.shape) > 1)
    return 2 * steps * numbers * BYTES[compute]


def step_cache_bytes(model: DenoiserSizes, shape: BatchShape, compute: str) -> int:
    """What the step cache keeps of a guided video (runtime/step_cache.py): of both branches what all blocks
    began from, and what they added.
    """
    return 2 * 2 * shape.tokens(model.config["patch_size"]) * model.dim * BYTES[compute]


def encoding_memory(shape: BatchShape, compute: str, *, base: int = 160, chunk: int = 4) -> int:
    """What the WF-VAE of `base` channels needs to encode one clip whose latents are [C, *shape.grid] besides
    weights, `chunk` latent frames at a time: the clip itself; and in the first resnets, which have half of
    its frames, height and width, about three tensors of 4 frames for each latent one, and what convolutions
    keep from chunk to chunk, as much as 12 frames.
    """
    frames, height, width = shape.grid
    clip = COLOURS * (1 + 8 * (frames - 1)) * 64 * height * width
    wide = int(12.2 * min(chunk, frames - 1) + 12) * 16 * height * width
    return (clip + wide * base) * BYTES[compute]


def decoding_memory(
    shape: BatchShape,
    compute: str,
    *,
    base: int = 160,
    chunk: int = 4,
    tiling: tuple[int, int] | None = None,
) -> int:
    """What the WF-VAE of `base` channels needs to decode besides weights, `chunk` latent frames at a time,
    perhaps in tiles (size and overlap in pixels).

    The busiest is the resnet behind the last upsampling: three tensors of 2 base channels, and inputs of
    stages that wait; two frames that the convolution puts in front, and those that convolutions keep from
    chunk to chunk, of that width 11 frames, of the stage before as much as 8. Of tiles, one is computed at a
    time, and all of them keep theirs, and their pixels.
    """
    frames, *sides = shape.grid
    largest, all_of_them = math.prod(sides), math.prod(sides)
    if tiling is not None:
        tile, overlap = (size // SPATIAL_STRIDE for size in tiling)
        lengths = [[min(tile, side - start) for start in tile_starts(side, tile, overlap)] for side in sides]
        largest, all_of_them = (math.prod(map(of, lengths)) for of in (max, sum))
    chunk = latents_at_a_time(chunk, frame=shape.batch * 2 * base * 16 * largest)
    rest = min(frames - 1, chunk)  # of the first chunk besides frame 0
    wide = (3.2 * (1 + 4 * rest) + 2) * largest + 19 * all_of_them
    pixels = 0 if tiling is None else COLOURS * (1 + 8 * rest) * 64 * (2 * all_of_them + math.prod(sides))
    return int(shape.batch * (2 * base * wide * 16 + pixels) * BYTES[compute])
