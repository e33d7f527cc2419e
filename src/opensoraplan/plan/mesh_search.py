"""Which mesh trains a model on the fewest devices."""

import math
from collections.abc import Iterator
from dataclasses import replace

from opensoraplan.parallel.mesh import MeshSettings, said
from opensoraplan.plan.memory import training_memory
from opensoraplan.plan.step import TrainingStep
from opensoraplan.plan.traffic import sent_by_step


def meshes_of(devices: int, *, heads: int, machine: int) -> Iterator[MeshSettings]:
    """Every way to arrange that many devices: tp within a machine of so many, sp * tp dividing the heads."""
    for tp in _divisors(math.gcd(devices, machine)):
        for sp in _divisors(devices // tp):
            if heads % (sp * tp):
                continue
            for shard in _divisors(devices // (tp * sp)):
                yield MeshSettings(dp_replicate=devices // (tp * sp * shard), dp_shard=shard, sp=sp, tp=tp)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def cheapest_mesh(
    step: TrainingStep,
    *,
    memory: int,
    machine: int = 8,
    most_devices: int = 1024,
    others: int = 0,
) -> MeshSettings:
    """The mesh of fewest devices, instead of the step's, whose peak, and `others` besides, fit into `memory`
    bytes of each; of those the one that sends the fewest bytes for a sample. Beyond one machine only 2, 4,
    8... machines are tried.

    Raises ValueError with the least need of all meshes if none fits.
    """
    step.options.check(step.model)
    counts = [*range(1, min(machine, most_devices) + 1)]
    while counts[-1] * 2 <= most_devices:
        counts.append(counts[-1] * 2)
    least: tuple[int, MeshSettings] | None = None
    for devices in counts:
        fitting: list[tuple[float, int, MeshSettings]] = []
        for mesh in meshes_of(devices, heads=step.model.heads, machine=machine):
            if devices == 1 and step.options.cpu_offload:
                continue
            tried = replace(step, mesh=mesh)
            need = training_memory(tried).peak + others
            if least is None or need < least[0]:
                least = need, mesh
            if need <= memory:
                sent = sent_by_step(tried) * mesh.sp * mesh.tp
                fitting.append((sent, need, mesh))
        if fitting:
            return min(fitting, key=lambda one: one[:2])[2]
    assert least is not None
    raise ValueError(
        f"no mesh of up to {counts[-1]} devices fits into {memory / 1e9:.1f} GB: the least is "
        f"{least[0] / 1e9:.1f} GB a device, with {said(least[1].sizes())}. More recompute, cpu_offload, a "
        f"smaller batch or shape need less"
    )
