"""Step cache: skips the blocks in some denoising steps, with diffusers' MagCache (arXiv 2506.09045),
calibrated for each model.

From one step to the next, the residual of all blocks together changes little, and the ratio of its
norms is much the same for every prompt. Where the calibrated ratios predict a small error, a step
reuses the last residual.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from diffusers.hooks.mag_cache import MagCacheConfig
from pydantic import Field
from torch import Tensor, nn

from opensoraplan.defaults import STEP_CACHE_FILE
from opensoraplan.disk import write_whole
from opensoraplan.models.caching import check_dense_ends
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.settings import Settings

logger = logging.getLogger(__name__)

# Most consecutive skipped steps, and the first part of the steps, in which none is skipped: as published.
_MOST_SKIPPED, _RETAINED = 3, 0.2


class Calibration(Settings):
    """The ratios of a model, one for each step; 1 for the first. `transformer`: the fingerprint of the
    denoiser that they were measured on; older files have none.
    """

    ratios: tuple[Annotated[float, Field(gt=0, le=1000)], ...] = Field(min_length=2, max_length=10_000)
    transformer: str | None = None

    @classmethod
    def of(cls, model: Path) -> Self:
        """Read the calibration in a model's folder. Raises FileNotFoundError, with advice, if it has none."""
        if not (model / STEP_CACHE_FILE).is_file():
            raise FileNotFoundError(
                f"{model} has no {STEP_CACHE_FILE}: `osp calibrate --model {model}` writes it"
            )
        return cls.read_file(model / STEP_CACHE_FILE)

    def warn_of_other_weights(self, transformer: str, model: Path) -> None:
        """Warn if the ratios were measured on another denoiser than the one in the folder `model`."""
        if self.transformer not in (None, transformer):
            logger.warning(
                "%s was measured on other files than those in %s: unless the weights are the same, delete it "
                "and run `osp calibrate --model %s`",
                *(model / STEP_CACHE_FILE, model / "transformer", model),
            )

    def write(self, path: Path) -> None:
        text = json.dumps(self.model_dump(), indent=1) + "\n"
        write_whole(path, lambda file: file.write_text(text))


@contextmanager
def measure_ratios(model: SparseUMMDiT) -> Iterator[list[float]]:
    """Measure ratios in the block: each forward pass appends the mean over tokens of the residual's norm,
    relative to the pass before.
    """
    check_dense_ends(model.config["sparse_n"])
    ratios: list[float] = []
    state: dict[str, Tensor] = {}
    first, last = model.transformer_blocks[0], model.transformer_blocks[-1]

    def before(_block: nn.Module, args: tuple[Any, ...]) -> None:
        state["start"] = args[0]

    def after(_block: nn.Module, _args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        added = torch.linalg.norm((output[0] - state["start"]).float(), dim=-1)
        ratios.append(float((added / state["added"]).mean()) if "added" in state else 1.0)
        state["added"] = added

    handles = [first.register_forward_pre_hook(before), last.register_forward_hook(after)]
    try:
        yield ratios
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skip_steps(
    model: SparseUMMDiT, ratios: Sequence[float], *, threshold: float, steps: int
) -> Iterator[None]:
    """Skip steps in the block, in runs of `steps` steps: those whose predicted error, accumulated
    since the last computed step, is within `threshold`. Each branch of guidance has its own
    state, by `cache_context`.
    """
    check_dense_ends(model.config["sparse_n"])
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=_MOST_SKIPPED,
        retention_ratio=_RETAINED,
        num_inference_steps=steps,
        mag_ratios=list(ratios),
    )
    model.enable_cache(config)
    try:
        yield
    finally:
        model.disable_cache()
