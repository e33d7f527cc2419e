"""`memory.placement = "auto"`: how a run keeps weights and activations so that its steps fit into the memory
that is free, and how it goes on with less when memory is full after all.
"""

import logging

import torch

from opensoraplan.defaults import BasePrecision
from opensoraplan.device import free_memory
from opensoraplan.models.sizes import BatchShape
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.plan.fits import Fit, first_fit, fits_of
from opensoraplan.plan.memory import Encoding
from opensoraplan.plan.step import TrainingStep
from opensoraplan.runtime.streaming import stream_frozen_blocks
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.inputs.encoders import Encoders
from opensoraplan.train.run.planning import training_step

logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")


class Fitting:
    """The way that was chosen, and those that need less memory. `settings`: the run's, with it in them."""

    def __init__(
        self,
        settings: TrainSettings,
        shape: BatchShape,
        device: torch.device,
        *,
        encoders: Encoders | None,
    ) -> None:
        """Choose for micro-batches of this shape, and where the encoders of their clips are, which are in
        host memory until then. Raises MemoryError if nothing fits.
        """
        self._device, self._encoders = device, encoders
        encoding = None if encoders is None else _encoding(encoders, shape, settings, device)
        fits = possible_fits(settings, training_step(settings, shape), device=device, encoding=encoding)
        free, host = free_memory(device), free_memory(_CPU)
        self._left = fits[first_fit(fits, device=free, host=host) :]
        chosen = self._left[0]
        # What is learned depends on the precision: it does not change on the way.
        self._left = [fit for fit in self._left if _base(fit) == _base(chosen)]
        logger.info("of %s, %.1f GB are free; memory.placement auto: %s", device, free / 1e9, chosen)
        self.settings = _with(settings, chosen)
        if encoders is not None and not _in_turn(chosen):
            encoders.stay()

    def go_leaner(self, model: SparseUMMDiT) -> bool:
        """Change to the next way for which the host has room; False if there is none."""
        before, *rest = self._left
        rest = [fit for fit in rest if fit.host - before.host <= free_memory(_CPU)]
        if not rest:
            return False
        self._left = rest
        logger.warning("memory is full: the step is repeated with %s", rest[0])
        options = rest[0].step.options
        keep_attention = options.keep_attention and options.recompute_blocks > 0
        model.set_recompute(
            blocks=options.recompute_blocks,
            keep_attention=keep_attention,
            inputs_on_host=options.inputs_on_host,
        )
        if _streamed(rest[0]) and not _streamed(before):
            stream_frozen_blocks(model, self._device)
        if self._encoders is not None and _in_turn(rest[0]) != _in_turn(before):
            self._encoders.wait() if _in_turn(rest[0]) else self._encoders.stay()
        return True


def possible_fits(
    settings: TrainSettings,
    step: TrainingStep,
    *,
    device: torch.device | None,
    encoding: Encoding | None = None,
) -> list[Fit]:
    """The ways of a step that the settings leave open. `device`: None is any accelerator; on a CPU nothing is
    streamed, since it is the host.
    """
    base = settings.adapter.base
    streams = (device is None or device.type != "cpu") and not settings.memory.compile
    bases: tuple[BasePrecision, ...] = ("whole", "int8") if base == "auto" else (base,)
    return fits_of(step, bases=bases, streams=streams, encoding=encoding)


def _encoding(
    encoders: Encoders, shape: BatchShape, settings: TrainSettings, device: torch.device
) -> Encoding:
    """What the encoders need, beside what the CPU has of them already, if that is the device."""
    working = encoders.vae.encoding_bytes(shape.grid)
    vae, *texts = (sum(p.nbytes for p in model.parameters()) for model in encoders.models)
    if device.type == "cpu":
        vae, texts = 0, [0 for _ in texts]
    return Encoding(vae, tuple(texts), working, in_turn=settings.memory.encoders == "in-turn")


def _with(settings: TrainSettings, fit: Fit) -> TrainSettings:
    options, memory, adapter = fit.step.options, settings.memory, settings.adapter
    placement = "streamed" if _streamed(fit) else "resident"
    update = {
        "placement": placement,
        "recompute_blocks": options.recompute_blocks,
        "inputs_on_host": options.inputs_on_host,
    }
    if options.adapter is not None:
        adapter = adapter.model_copy(update={"base": options.adapter.base})
    return settings.model_copy(update={"memory": memory.model_copy(update=update), "adapter": adapter})


def _streamed(fit: Fit) -> bool:
    return fit.step.options.adapter is not None and fit.step.options.adapter.streamed


def _in_turn(fit: Fit) -> bool:
    return fit.encoding is not None and fit.encoding.in_turn


def _base(fit: Fit) -> str | None:
    return None if fit.step.options.adapter is None else fit.step.options.adapter.base
