"""A training step that is to be planned: of which model, on what, on which mesh, with which options."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from opensoraplan.defaults import BasePrecision
from opensoraplan.models.sizes import (
    ADALN,
    BYTES,
    BatchShape,
    DenoiserSizes,
    attention_flops,
    block_flops,
    training_flops,
)
from opensoraplan.parallel.mesh import MeshSettings
from opensoraplan.parallel.sequence import padded_tokens

ONE_DEVICE = MeshSettings(dp_shard=1)


@dataclass(frozen=True)
class AdapterOptions:
    """An adapter that is trained while the model stays frozen. `layers`: the linear layers that have one, by
    name, as (outputs, inputs); `base`: the precision of the frozen weights; `streamed`: those of blocks are
    in host memory.
    """

    layers: Mapping[str, tuple[int, int]]
    rank: int
    dora: bool = False
    base: BasePrecision = "whole"
    streamed: bool = False

    def numbers(self, unit: int | None = None) -> int:
        """How many parameters it has, in one block or in all (None)."""
        prefix = "" if unit is None else f"transformer_blocks.{unit}."
        shapes = [shape for name, shape in self.layers.items() if name.startswith(prefix)]
        own = sum(self.rank * (outputs + inputs) for outputs, inputs in shapes)
        return own + (sum(outputs for outputs, _ in shapes) if self.dora else 0)

    def adapts(self, *parts: str) -> bool:
        """Whether a layer whose name has one of these parts has an adapter."""
        return any(part in name for name in self.layers for part in parts)


@dataclass(frozen=True)
class TrainingOptions:
    """How the denoiser is trained; names and meanings as in train/config.py, `ema` is where the EMA is,
    `bits` are those of the optimizer's moments. `adapter`: what is trained instead of all weights.
    """

    compute: Literal["bf16", "fp32"] = "bf16"
    master: Literal["bf16", "fp32"] = "fp32"
    accumulate: int = 1
    recompute_blocks: int = 0
    recompute_feed_forwards: int = 0
    keep_attention: bool = False
    inputs_on_host: bool = False
    bits: Literal[32, 8] = 32
    ema: Literal["device", "host"] | None = "device"
    cpu_offload: bool = False
    adapter: AdapterOptions | None = None

    def check(self, model: DenoiserSizes) -> None:
        """Raise ValueError for what the model or the trainer refuses."""
        depth = len(model.blocks)
        if self.recompute_blocks and self.recompute_feed_forwards:
            raise ValueError(
                f"recompute blocks ({self.recompute_blocks}) or feed-forwards "
                f"({self.recompute_feed_forwards}), not both"
            )
        for name in ("recompute_blocks", "recompute_feed_forwards"):
            if not 0 <= (count := getattr(self, name)) <= depth:
                raise ValueError(f"{name} must be between 0 and {depth}, the model's blocks, got {count}")
        if self.adapter is not None and self.adapter.streamed and self.recompute_blocks < depth:
            raise ValueError(
                f"streamed weights need all {depth} blocks recomputed, got recompute_blocks "
                f"{self.recompute_blocks}"
            )


@dataclass(frozen=True)
class TrainingStep:
    """A step of `model`, whose micro-batches have this shape. The sizes of `mesh` are all known; one
    of a single device is the trainer without FSDP, with a copy of the weights where they compute in
    a lower precision.
    """

    model: DenoiserSizes
    shape: BatchShape
    mesh: MeshSettings = ONE_DEVICE
    options: TrainingOptions = TrainingOptions()

    def check(self) -> None:
        """Raise ValueError for what the model or the trainer refuses."""
        self.options.check(self.model)
        self.mesh.check_model(self.model.heads)
        if self.options.bits == 8 and not self.alone:
            raise ValueError(f"moments in 8 bits need one device, got {self.devices}: FSDP shards them in 32")
        if self.alone and self.options.cpu_offload:
            raise ValueError("cpu_offload is FSDP's, which takes at least 2 devices")
        if self.needs_one_device and not self.alone:
            raise ValueError(
                f"quantised or streamed frozen weights need one device, got {self.devices}: FSDP shards them"
            )

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.sizes().values())

    @property
    def alone(self) -> bool:
        """Whether there is a single device."""
        return self.devices == 1

    @property
    def needs_one_device(self) -> bool:
        """Whether the frozen weights are kept in a way that FSDP does not know."""
        adapter = self.options.adapter
        return adapter is not None and (adapter.base != "whole" or adapter.streamed)

    @property
    def trains_modulation(self) -> bool:
        """Whether vectors of AdaLN have gradients."""
        return self.options.adapter is None or self.options.adapter.adapts(*ADALN)

    @property
    def trains_skips(self) -> bool:
        """Whether the linear layers of skip connections have gradients."""
        return self.options.adapter is None or self.options.adapter.adapts("skip.linear", "skip_enc.linear")

    def trained(self, *, unit: int | None = None, tp: int = 1, shards: int = 1) -> int:
        """How many of the parameters that are trained the first rank has, as `DenoiserSizes.numbers`."""
        adapter = self.options.adapter
        if adapter is None:
            return self.model.numbers(unit=unit, tp=tp, shards=shards)
        return math.ceil(adapter.numbers(unit) / shards)

    @property
    def flops(self) -> int:
        """FLOPs of a micro-batch without what is computed again, as MFU counts them. A frozen weight has no
        gradient, which is a third of the products.
        """
        flops = training_flops(self.model.config, self.shape)
        return flops if self.options.adapter is None else flops * 2 // 3

    @property
    def recomputed_flops(self) -> int:
        """FLOPs of a micro-batch that are computed a second time."""
        options, model, text, flops = self.options, self.model, self.shape.text, 0
        for index, block in enumerate(model.blocks):
            tokens, dim = self.padded(block.rate), model.dim
            if index < options.recompute_blocks:
                embed = model.config["timestep_embed_dim"]
                flops += block_flops(dim, tokens, text, rate=block.rate, embed_dim=embed)
                if options.keep_attention:
                    flops -= attention_flops(dim, tokens, text, rate=block.rate)
            elif index < options.recompute_feed_forwards:
                flops += 2 * (tokens + text) * 8 * dim**2
        return self.shape.batch * flops

    @property
    def weight_shards(self) -> int:
        """Over how many devices FSDP shares out the weights."""
        return self.mesh.dp_shard * self.mesh.sp

    @property
    def samples(self) -> int:
        """Of all devices together."""
        return self.mesh.dp_replicate * self.mesh.dp_shard * self.shape.batch * self.options.accumulate

    @property
    def compute_bytes(self) -> int:
        """Of a number in the precision that blocks compute in."""
        return BYTES[self.options.compute]

    @property
    def master_bytes(self) -> int:
        """Of a number in the precision of the weights that the optimizer changes."""
        return BYTES[self.options.master]

    @cached_property
    def tokens(self) -> int:
        """Video tokens of a sample, with those that are added so that sp * tp ranks can share them."""
        tokens = self.shape.tokens(self.model.config["patch_size"])
        ranks = self.mesh.sp * self.mesh.tp
        return tokens if ranks == 1 else padded_tokens(tokens, ranks=ranks, rates=self.model.rates)

    @property
    def tokens_of_rank(self) -> int:
        """Of these, what a rank has between attention and feed-forward."""
        return self.tokens // (self.mesh.sp * self.mesh.tp)

    def padded(self, rate: int) -> int:
        """Tokens of a sample in a stage of this rate."""
        return math.ceil(self.tokens / rate**2) * rate**2
