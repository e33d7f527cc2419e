"""How the processes of a job are arranged: dp_replicate x dp_shard x sp x tp, and their groups.

tp ranks share every layer of a sample, sp ranks its tokens; dp ranks have samples of their own. Weights are
sharded (FSDP) over dp_shard and sp together, and are replicated over dp_replicate.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Self

import torch.distributed as dist
from pydantic import Field, model_validator
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opensoraplan.settings import Settings

REPLICATE, SHARD, SEQUENCE, TENSOR = "dp_replicate", "dp_shard", "sp", "tp"
NAMES = (REPLICATE, SHARD, SEQUENCE, TENSOR)
# Joined dimensions: those that weights are sharded over, those of one sample, those of different samples.
WEIGHTS, SAMPLE, DATA = "weights", "sample", "data"

Size = Annotated[int, Field(ge=-1, le=10**6)]


class MeshSettings(Settings):
    """Sizes of the mesh's dimensions. One of them may be -1, which means all remaining processes."""

    dp_replicate: Size = 1
    """Groups of processes that each hold all weights (HSDP). Raise it if FSDP over all machines is slow."""
    dp_shard: Size = -1
    """Processes that share weights, gradients and optimizer state (FSDP), each with its own samples."""
    sp: Size = 1
    """Processes that share the tokens of a sample (Ulysses). Raise it if long videos do not fit."""
    tp: Size = 1
    """Processes that share every layer of a sample. Raise it, within a machine, if `sp` is not enough."""

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        sizes = self.sizes()
        if 0 in sizes.values() or list(sizes.values()).count(-1) > 1:
            raise ValueError(
                f"sizes must be at least 1, and one of them may be -1 (what is left): {said(sizes)}"
            )
        return self

    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in NAMES}

    def filled(self, world: int) -> Self:
        """With the size of -1 computed for `world` processes. ValueError if they cannot be arranged so."""
        sizes = self.sizes()
        given = math.prod(size for size in sizes.values() if size > 0)
        free = [name for name, size in sizes.items() if size == -1]
        if world % given or (not free and given != world):
            shape = " x ".join(str(size) for size in sizes.values() if size > 0)
            below, above = world // given * given, (world // given + 1) * given
            nearest = f"{given}" if not free else " or ".join(str(n) for n in (below, above) if n)
            raise ValueError(
                f"{world} processes cannot be arranged as {said(sizes)}: start {nearest} of them "
                f"({shape} = {given}), or change a size"
            )
        return self.model_copy(update={name: world // given for name in free})

    def check_model(self, heads: int) -> None:
        """Raise ValueError unless `heads` attention heads can be shared out over sp * tp ranks."""
        shares = self.sp * self.tp
        if heads % shares:
            possible = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"sp {self.sp} x tp {self.tp} = {shares} must divide the model's {heads} attention heads: "
                f"use a product of {', '.join(map(str, possible))}"
            )


def said(sizes: dict[str, int]) -> str:
    """The sizes in one line."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items())


@dataclass(frozen=True, eq=False)
class Mesh:
    """The arranged processes. `settings` have no -1 any more. `devices`: those along each dimension, or along
    joined ones, that this process belongs to.
    """

    settings: MeshSettings
    devices: Mapping[str, DeviceMesh]

    @classmethod
    def build(cls, settings: MeshSettings, *, device_type: str) -> Self:
        """Arrange all processes of the default group, which must be initialised. Raises as `filled`."""
        settings = settings.filled(dist.get_world_size())
        whole = init_device_mesh(device_type, tuple(settings.sizes().values()), mesh_dim_names=NAMES)
        devices = {name: whole[name] for name in NAMES}
        devices[WEIGHTS] = whole[SHARD, SEQUENCE]._flatten(WEIGHTS)
        devices[SAMPLE] = whole[SEQUENCE, TENSOR]._flatten(SAMPLE)
        devices[DATA] = whole[REPLICATE, SHARD]._flatten(DATA)
        return cls(settings, devices)

    def group(self, name: str) -> dist.ProcessGroup:
        return self.devices[name].get_group()

    def groups(self) -> Iterator[dist.ProcessGroup]:
        return (self.group(name) for name in self.devices)

    def rank(self, name: str) -> int:
        """This process's place in `group(name)`."""
        return self.devices[name].get_local_rank()

    def size(self, name: str) -> int:
        return self.devices[name].size()

    @property
    def for_weights(self) -> DeviceMesh:
        """What FSDP takes: one dimension to shard over, or two, replicated over the first (HSDP)."""
        if self.settings.dp_replicate > 1:
            return DeviceMesh._concatenate([self.devices[REPLICATE], self.devices[WEIGHTS]])
        return self.devices[WEIGHTS]
