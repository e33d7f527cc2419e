"""What a denoiser is held against in training: its loss on held-out clips, and videos of fixed prompts."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from opensoraplan.data.dataset import iter_readable
from opensoraplan.data.video import VideoWriter
from opensoraplan.device import DTYPES
from opensoraplan.generate.session import Session
from opensoraplan.models.conditions import Conditions
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.parallel.ranks import ALONE, Ranks
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.samplers import make_scheduler
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.inputs.encoders import Encoders, caption_settings, sample_posterior
from opensoraplan.train.inputs.sources import Source, clips_of_all, encoders_of_run, open_source
from opensoraplan.train.methods import flow_loss

logger = logging.getLogger(__name__)


class Validation:
    """Held-out clips and prompts of a run, ready to be used every `validation.every` steps.

    The same clips, noise and sigmas each time, and each prompt with its own seed, so that numbers and videos
    of different steps compare.
    """

    def __init__(
        self,
        settings: TrainSettings,
        *,
        encoders: Encoders | None,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        """Open what the settings name; raises ValueError for what is missing. `encoders`: already loaded. Of
        several `ranks`, the first writes the videos.
        """
        self.settings = settings.validation
        self.run_settings = settings
        self.device = device
        self.ranks = ranks
        self.source: Source | None = None
        self.encoders = encoders
        if self.settings.prompts:
            self._check_prompts()
            self.encoders = encoders or encoders_of_run(settings, device)
        if self.settings.manifest is not None or self.settings.features is not None:
            self.source, self.encoders = open_source(
                settings, device=device, held_out=True, encoders=self.encoders
            )
            clips_of_all(self.source.samples, ranks)

    def _check_prompts(self) -> None:
        """Warn of words that cleaning removes. Raises ValueError for a prompt of which nothing is left:
        before the run begins, not when its first videos are due.
        """
        for prompt in self.settings.prompts:
            try:
                warning = caption_settings(self.run_settings.text).check(prompt)
            except ValueError as error:
                raise ValueError(f"validation.prompts: {error} (in a run, by the settings of text)") from None
            if warning and self.ranks.first:
                logger.warning("validation.prompts: %s", warning)

    def run(self, model: SparseUMMDiT, step: int, check: Callable[[], None]) -> dict[str, float]:
        """Losses, weighted as in training, at the fixed sigmas and their mean; the videos are written on the
        way. `check` is called for each clip and after each denoising step, and may raise to end this.
        """
        model.eval()
        try:
            if self.settings.prompts:
                assert self.encoders is not None
                with self.encoders.there():
                    self._write_videos(model, self.encoders, step, check)
            return {} if self.source is None else self._losses(model, self.source, check)
        finally:
            model.train()

    @torch.no_grad()
    def _losses(self, model: SparseUMMDiT, source: Source, check: Callable[[], None]) -> dict[str, float]:
        dtype = DTYPES[self.run_settings.model.compute]
        losses: dict[float, list[float]] = {sigma: [] for sigma in self.settings.sigmas}
        count = min(self.settings.samples, len(source.shapes))
        for place, item in iter_readable(source.dataset, count, agree=self.ranks.any):
            check()
            batch = source.collate([item])
            encoded = source.encode(batch)
            shape = (encoded.moments.shape[1] // 2, *encoded.moments.shape[2:])
            drawn = flow_loss.draw([place], shape, self.run_settings.flow, seed=0).to(self.device)
            latents = source.vae.normalize_latents(sample_posterior(encoded.moments.float(), drawn.posterior))
            for sigma in self.settings.sigmas:
                loss = flow_loss.losses(
                    model,
                    latents,
                    Conditions(encoded.prompt),
                    sigma=torch.full_like(drawn.sigma, sigma),
                    noise=drawn.noise,
                    dtype=dtype,
                    weighting=self.run_settings.flow.weighting,
                )
                losses[sigma].append(loss.item())
        means = {sigma: sum(values) / len(values) for sigma, values in losses.items()}
        by_sigma = {f"validation_loss/sigma_{sigma:g}": value for sigma, value in means.items()}
        return {"validation_loss": sum(means.values()) / len(means), **by_sigma}

    def _write_videos(
        self, model: SparseUMMDiT, encoders: Encoders, step: int, check: Callable[[], None]
    ) -> None:
        """One mp4 a prompt in OUTPUT/samples, named by step and number."""
        pipeline = OpenSoraPlanPipeline(
            transformer=model,
            vae=encoders.vae,
            **encoders.text_components(),
            scheduler=make_scheduler(),
            prompt_template=None,
            default_negative_prompt="",
            clean_prompts=encoders.clean,
            keep_chinese=encoders.keep_chinese,
            max_text_tokens=encoders.max_tokens,
        )
        pipeline.set_progress_bar_config(disable=True)
        session = Session(pipeline, model=str(self.run_settings.output), ranks=self.ranks)
        for number, request in enumerate(self.settings.requests()):
            latents = session.denoise(request, after_step=lambda *_: check())
            if not self.ranks.first:
                continue
            path = self._path(step, number)
            with VideoWriter(path, fps=request.fps, title=request.prompt) as writer:
                for frames in pipeline.iter_pictures(latents):
                    writer.write(frames)
            logger.info("step %d: %s -> %s", step, request.prompt, writer.path)

    def _path(self, step: int, number: int) -> Path:
        folder = self.run_settings.output / "samples"
        folder.mkdir(exist_ok=True)
        return folder / f"step-{step:08d}-{number}.mp4"
