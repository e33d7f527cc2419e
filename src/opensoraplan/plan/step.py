"""A training step that is to be planned: of which model, on what, on which mesh, with which options."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from opensoraplan.models.sizes import BYTES, BatchShape, DenoiserSizes
from opensoraplan.parallel.mesh import MeshSettings
from opensoraplan.parallel.sequence import padded_tokens

ONE_DEVICE = MeshSettings(dp_shard=1)


@dataclass(frozen=True)
class TrainingOptions:
    """How the denoiser is trained; names and meanings as in train/config.py, `ema` is where the EMA is."""

    compute: Literal["bf16", "fp32"] = "bf16"
    master: Literal["bf16", "fp32"] = "fp32"
    accumulate: int = 1
    recompute_blocks: int = 0
    recompute_feed_forwards: int = 0
    keep_attention: bool = False
    ema: Literal["device", "host"] | None = "device"
    cpu_offload: bool = False

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
        if self.alone and self.options.cpu_offload:
            raise ValueError("cpu_offload is FSDP's, which takes at least 2 devices")

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.sizes().values())

    @property
    def alone(self) -> bool:
        """Whether there is a single device."""
        return self.devices == 1

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
