"""How fast a run is: samples, tokens and FLOPs a second, MFU, waiting for data, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from opensoraplan.models.sizes import BatchShape, training_flops
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.strict import plain_config
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.parallel.ranks import ALONE, Ranks
from opensoraplan.train.config import LogSettings
from opensoraplan.train.log.metrics import measured_peak_tflops, peak_memory


class Speed:
    """Counts what was done since the last `take`, which tells rates."""

    def __init__(self, settings: LogSettings, *, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._peak = settings.peak_tflops or measured_peak_tflops(device, dtype)
        self._reset()

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._waited = self._encoded = 0.0
        self._samples = self._tokens = self._flops = 0

    def waited(self, seconds: float, *, encoding: float) -> None:
        """So long a step has waited for data, and so long the frozen encoders have taken."""
        self._waited += seconds
        self._encoded += encoding

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What the block takes, such as saving, is no training and counts in no rate."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def count(self, model: SparseUMMDiT, latents: Tensor, prompt: PromptEmbeds) -> None:
        """A micro-batch of latents [B, C, T, H, W] went forward and backward."""
        batch, _, frames, height, width = latents.shape
        self._samples += batch
        self._tokens += batch * frames * height * width // model.config["patch_size"] ** 2
        shape = BatchShape((frames, height, width), prompt.sequence.shape[1], batch)
        self._flops += training_flops(plain_config(model), shape)

    def take(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Rates of all processes together since the last `take`, TFLOP/s and MFU those of each device, memory
        this one's; `data_wait` and `encoding` are the shares of the time spent waiting for data, and in VAE
        and text encoders.
        """
        seconds = time.perf_counter() - self._began
        tflops = self._flops / ranks.sample_ranks / seconds / 1e12
        rates = {
            "samples/s": self._samples * ranks.data_ranks / seconds,
            "tokens/s": self._tokens * ranks.data_ranks / seconds,
            "TFLOP/s": tflops,
            "MFU": tflops / self._peak,
            "data_wait": self._waited / seconds,
            "encoding": self._encoded / seconds,
            "memory_GB": peak_memory(self._device) / 1e9,
        }
        self._reset()
        return rates
