"""How fast a run is: samples, tokens and FLOPs a second, MFU, waiting for data, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opensoraplan.parallel.ranks import ALONE, Ranks
from opensoraplan.train.config import LogSettings
from opensoraplan.train.log.metrics import measured_peak_tflops, peak_memory


class Speed:
    """Counts what was done since the last `take`, which tells rates. `dtype`, in which products are computed,
    is for MFU; None: tokens and FLOPs are not counted.
    """

    def __init__(
        self, settings: LogSettings, *, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        self._device = device
        self._peak = None if dtype is None else settings.peak_tflops or measured_peak_tflops(device, dtype)
        self._reset()

    def _reset(self) -> None:
        self._began = time.perf_counter()
        self._waited = self._encoded = 0.0
        self._samples = self._tokens = self._flops = 0

    def waited(self, seconds: float, *, encoding: float = 0.0) -> None:
        """So long a step has waited for data, and so long the frozen encoders have taken."""
        self._waited += seconds
        self._encoded += encoding

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What the block takes, such as saving, is no training and counts in no rate."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """If the block raises, what it has counted and the time that it took are forgotten."""
        began, before = time.perf_counter(), (self._samples, self._tokens, self._flops)
        try:
            yield
        except BaseException:
            self._samples, self._tokens, self._flops = before
            self._began += time.perf_counter() - began
            raise

    def count(self, *, samples: int, tokens: int = 0, flops: int = 0) -> None:
        """A micro-batch of this process went forward and backward."""
        self._samples += samples
        self._tokens += tokens
        self._flops += flops

    def take(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Rates of all processes together since the last `take`, TFLOP/s and MFU those of each device, memory
        this one's; `data_wait` and `encoding` are the shares of the time spent waiting for data, and in VAE
        and text encoders.
        """
        seconds = time.perf_counter() - self._began
        rates = {"samples/s": self._samples * ranks.data_ranks / seconds}
        if self._peak is not None:
            tflops = self._flops / ranks.sample_ranks / seconds / 1e12
            rates["tokens/s"] = self._tokens * ranks.data_ranks / seconds
            rates |= {"TFLOP/s": tflops, "MFU": tflops / self._peak, "encoding": self._encoded / seconds}
        rates |= {"data_wait": self._waited / seconds, "memory_GB": peak_memory(self._device) / 1e9}
        self._reset()
        return rates
