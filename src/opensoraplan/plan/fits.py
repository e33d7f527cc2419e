"""Ways in which a training step of one device may keep its weights and activations, from the fastest to the
leanest, and the first of them that fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from opensoraplan.defaults import BasePrecision
from opensoraplan.plan.memory import Encoding, training_memory
from opensoraplan.plan.step import TrainingStep
from opensoraplan.runtime.placement import MARGIN

# Blocks that are recomputed are tried by so many equal shares of all.
_SHARES = 8


@dataclass(frozen=True)
class Fit:
    """A step, how its clips are encoded (None: they are not), and the bytes that both are predicted to need
    of the device and of the host.
    """

    step: TrainingStep
    encoding: Encoding | None
    device: int
    host: int

    def __str__(self) -> str:
        options, adapter = self.step.options, self.step.options.adapter
        words = f"{options.recompute_blocks} of {len(self.step.model.blocks)} blocks recomputed"
        words += " from the host" if options.inputs_on_host else ""
        if adapter is not None:
            kept = "whole" if adapter.base == "whole" else adapter.base
            words = f"frozen weights {kept}, {'streamed' if adapter.streamed else 'resident'}; {words}"
        if self.encoding is not None and self.encoding.in_turn:
            words += "; encoders in turn"
        host = f" and {self.host / 1e9:.1f} GB of the host" if self.host else ""
        return f"{words}; {self.device / 1e9:.1f} GB{host}"


def fits_of(
    step: TrainingStep,
    *,
    bases: Sequence[BasePrecision] = ("whole",),
    streams: bool = True,
    encoding: Encoding | None = None,
) -> list[Fit]:
    """Each needs less than all before it, of the device or of the host: more and more blocks are recomputed,
    and then the frozen weights under an adapter are streamed, if that `streams`; first in the first of
    `bases`. At last what blocks are recomputed from waits on the host. Each of these first with what encodes
    clips on the device, then with that in turn, if it `streams`.
    """
    depth = len(step.model.blocks)
    counts = sorted({depth * share // _SHARES for share in range(_SHARES + 1)})
    options = step.options
    tried = [replace(options, recompute_blocks=count, recompute_feed_forwards=0) for count in counts]
    if (adapter := options.adapter) is not None:
        whole, tried = tried, []
        for base in bases:
            tried += [replace(one, adapter=replace(adapter, base=base, streamed=False)) for one in whole]
            if streams:
                tried.append(replace(whole[-1], adapter=replace(adapter, base=base, streamed=True)))
    fits: list[Fit] = []
    tried.append(replace(tried[-1], inputs_on_host=True))
    for one in tried:
        candidate = replace(step, options=one)
        memory = training_memory(candidate)
        device, host = memory.peak, memory.host
        for way in _ways_of(encoding, in_turn=streams):
            if way is not None:
                device, host = way.peak(memory), way.host(memory)
            if not any(fit.device <= device and fit.host <= host for fit in fits):
                fits.append(Fit(candidate, way, device, host))
    return fits


def _ways_of(encoding: Encoding | None, *, in_turn: bool) -> list[Encoding | None]:
    if encoding is None or encoding.in_turn or not in_turn:
        return [encoding]
    return [encoding, replace(encoding, in_turn=True)]


def first_fit(fits: Sequence[Fit], *, device: int, host: int) -> int:
    """Index of the first of `fits` for so many free bytes of device and host. Raises MemoryError, with these
    numbers, if there is none.
    """
    for place, fit in enumerate(fits):
        if fit.device <= device * (1 - MARGIN) and fit.host <= host * (1 - MARGIN):
            return place
    raise MemoryError(
        f"a training step does not fit into the {device / 1e9:.1f} GB of the device and the {host / 1e9:.1f} "
        f"GB of the host that are free: even the leanest way ({fits[-1]}) needs more. Use smaller or shorter "
        "clips, a smaller data.batch_size or vae.chunk, features of osp cache, or an adapter.base with fewer "
        "bits"
    )
