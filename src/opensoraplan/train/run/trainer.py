"""Training of the denoiser, one loop. What `osp train` does.

A step is a pure function of the state before it and its number: order of clips, captions, sigmas and noise
come from (seed, step, slot), so that a resumed run continues bit for bit on the CPU.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from opensoraplan.data.buckets import BucketSampler
from opensoraplan.device import DTYPES, explained_memory, prepare, resolve_device
from opensoraplan.models.attention import check_backend
from opensoraplan.models.conditions import Conditions
from opensoraplan.models.strict import plain_config
from opensoraplan.parallel.ranks import Ranks, device_of_rank, joined
from opensoraplan.runtime.compiling import compile_blocks
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.inputs.encoders import sample_posterior
from opensoraplan.train.inputs.loading import BadFileAccount
from opensoraplan.train.inputs.sources import Source, check_clips, clips_of_all, global_batch_of, open_source
from opensoraplan.train.inputs.turns import encoded_batches
from opensoraplan.train.learner.building import build
from opensoraplan.train.learner.gradient_clip import AdaptiveClip, GradientOutlierError
from opensoraplan.train.learner.learner import Learner
from opensoraplan.train.log.metrics import Averages
from opensoraplan.train.log.speed import Speed
from opensoraplan.train.log.validation import Validation
from opensoraplan.train.methods import flow as objective
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.folder import begun_together, counted, go_on_counting, run_steps
from opensoraplan.train.run.state import DenoiserState
from opensoraplan.train.run.writers import ShardedWriter, Writer

logger = logging.getLogger(__name__)

_VALIDATING = (
    "validation does not fit into memory: lower vae.chunk or the frames, height and width of validation, or "
    'set optimizer.ema_device to "cpu"'
)


def train(settings: TrainSettings, *, resume: str | None = None) -> Path:
    """Train in the folder `settings.output` for `optimizer.steps` steps, or until a signal asks to stop.

    Returns the folder of the last checkpoint. Raises ValueError for settings, data and disks that cannot be,
    before anything heavy where possible, GradientOutlierError if `clip.outlier` is "stop", RunStoppedError
    for a signal. What was learned until then is saved.
    """
    pretrained = settings.model.pretrained
    if pretrained is not None and not pretrained.exists():
        raise ValueError(f"model.pretrained {pretrained} does not exist: `osp convert` makes such a folder")
    if settings.model.attention is not None:
        check_backend(settings.model.attention)
    device = device_of_rank(resolve_device(settings.device))
    prepare(device, allow_tf32=settings.allow_tf32)
    with (
        joined(settings.parallel, device, timeout=settings.parallel.timeout_s) as ranks,
        begun_together(settings.output, settings, resume=resume, ranks=ranks) as start,
    ):
        if settings.parallel.cpu_offload and ranks.mesh is None:
            raise ValueError(
                "parallel.cpu_offload needs several processes (FSDP): start them with osp launch"
            )
        global_batch = global_batch_of(settings) * ranks.data_ranks
        source, encoders = open_source(settings, device=device, global_batch=global_batch)
        sampler = BucketSampler(source.shapes, global_batch=global_batch, seed=settings.seed)
        if sampler.dropped_per_epoch:
            left = ", ".join(
                f"{n} of {'x'.join(map(str, shape))}" for shape, n in sampler.dropped_per_epoch.items()
            )
            logger.info("clips that do not fill a whole step are skipped, other ones in each epoch: %s", left)
        validation = None
        if settings.validation.every:
            validation = Validation(settings, encoders=encoders, device=device, ranks=ranks)
        job = _Job(settings, source, sampler, validation, ranks, start=start, device=device)
        if start:
            job.load(start)
        with closing(job.batches):
            run_steps(job, settings, start=start, ranks=ranks)
        return checkpoint.path_of(settings.output, settings.optimizer.steps)


class _Job:
    """The denoiser's learner and the clips of one run, with what is done to them in a step."""

    def __init__(
        self,
        settings: TrainSettings,
        source: Source,
        sampler: BucketSampler,
        validation: Validation | None,
        ranks: Ranks,
        *,
        start: int,
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.source = source
        self.clips = clips_of_all(source.samples, ranks)
        self.sampler = sampler
        self.validation = validation
        self.ranks = ranks
        self.device = device
        self.dtype = DTYPES[settings.model.compute]
        self.model = build(settings, device=device, mesh=ranks.mesh).train()
        source.check_fits(self.model)
        self.learner = self._learner()
        self.bad_files = BadFileAccount(settings.data.max_bad_files)
        self.batches = encoded_batches(
            source,
            sampler,
            settings,
            ranks,
            start=start,
            account=lambda failures: self.bad_files.add(failures),  # which may be another account by then
        )
        self.outliers_in_a_row = 0
        self.not_finite = 0
        self.intact = True
        self.averages = Averages()
        self.speed = Speed(settings.log, device=device, dtype=self.dtype)
        self.writer = Writer(settings.output, settings.checkpoint)
        if ranks.mesh is not None:
            self.writer = ShardedWriter(settings.output, settings.checkpoint, ranks)

    def _learner(self) -> Learner:
        """What trains the model, in the precision of the optimizer and in that of the model."""
        settings = self.settings
        master = compute = DTYPES[settings.model.master]
        if self.ranks.mesh is None:  # on a mesh, FSDP casts the weights that it gathers, and compiles blocks
            compute = self.dtype
            if settings.memory.compile:
                compile_blocks(self.model)
        return Learner.from_settings(
            self.model,
            settings.optimizer,
            clip=AdaptiveClip(ema_decay=settings.clip.ema_decay, outlier=settings.clip.outlier),
            master=master,
            compute=compute,
        )

    def step(self, step: int) -> None:
        """Do optimizer step number `step`, from 1."""
        settings, accumulate = self.settings, self.settings.optimizer.accumulate
        self.learner.begin_step(step)
        for _ in range(accumulate):
            turn = next(self.batches)
            self.speed.waited(turn.waited, encoding=turn.encoding)
            drawn, encoded = turn.drawn, turn.encoded
            latents = self.source.normalize(sample_posterior(encoded.moments.float(), drawn.posterior))
            shape, text = " x ".join(map(str, latents.shape)), encoded.prompt.sequence.shape[1]
            with explained_memory(
                f"latents of {shape} with {text} text tokens do not fit into memory: raise "
                "memory.recompute_blocks, or lower data.batch_size or data.selection's sizes; osp plan "
                "predicts what they need"
            ):
                losses = objective.losses(
                    self.model,
                    latents,
                    Conditions(encoded.prompt),
                    sigma=drawn.sigma,
                    noise=drawn.noise,
                    dtype=self.dtype,
                    weighting=settings.flow.weighting,
                )
                self.learner.backward(losses.mean() / accumulate)
            self.averages.add_losses(losses, drawn.sigma)
            self.speed.count(self.model, latents, encoded.prompt)
        self._update(step)

    def _update(self, step: int) -> None:
        """Take the gradients in, unless their norm is an outlier."""
        norm, clipping = self.learner.clip_gradients()
        self.not_finite = 0 if math.isfinite(norm) else self.not_finite + 1
        self.averages.add("grad_norm", norm)
        self.averages.add("clip_threshold", clipping.threshold)
        self.averages.add("lr", self.learner.rate)
        self.averages.add("clipped", float(clipping.action == "clipped"))
        self.averages.add("skipped", float(clipping.action == "skip"))
        if clipping.action == "skip":
            self._skip(step, norm)
            return
        self.outliers_in_a_row = 0
        self.intact = False
        self.learner.finish_step(step)
        self.intact = True

    def _skip(self, step: int, norm: float) -> None:
        """Leave the step out; after `clip.patience` of them in a row, go back to the last good state."""
        outliers, patience = self.outliers_in_a_row + 1, self.settings.clip.patience
        logger.warning("step %d: gradient norm %.4g is an outlier: the step is skipped", step, norm)
        if outliers % patience == 0:
            self.writer.wait()  # or processes see different checkpoints while one is being finished
            good = self.ranks.agree(self._last_before_outliers)
            if good is None or outliers >= 3 * patience:
                raise GradientOutlierError(
                    f"step {step}: {outliers} gradient norms in a row are outliers, the last one {norm:.4g}, "
                    "and no checkpoint is older than these: check the data, resume with clip.outlier="
                    '"clip", which scales such gradients down, or start again with a lower optimizer.lr'
                )
            logger.warning("%d outliers in a row: restored the weights of step %d", outliers, good)
            self._restore(good)
        self.outliers_in_a_row = outliers

    def _last_before_outliers(self) -> int | None:
        """The newest checkpoint that was not made between outliers."""
        output = self.settings.output
        for step in reversed(checkpoint.steps(output)):
            if checkpoint.read_state(output, step, DenoiserState).outliers_in_a_row == 0:
                return step
        return None

    def report(self) -> dict[str, float]:
        """What is logged of the steps since the last report."""
        self.bad_files.share(self.ranks)
        counts = {"bad_files": float(len(self.bad_files))}
        return self.averages.take(self.ranks) | self.speed.take(self.ranks) | counts

    def learned(self) -> Iterator[Tensor]:
        """The weights and their averages."""
        return self.learner.learned()

    def save(self, step: int) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        state = {
            "model_config": plain_config(self.model),
            **self.learner.state_dict(),
            "outliers_in_a_row": self.outliers_in_a_row,
            "global_batch": self.sampler.size,
            "clips": self.clips,
            **counted(self, self.ranks),
        }
        with self.speed.apart():
            self.writer.save(step, parts=self.learner.parts(), state=state)

    def load(self, step: int) -> None:
        """Go on from a checkpoint of the same run, made by any number of processes."""
        with self.speed.apart():
            state = self._restore(step)
        check_clips(state.clips, self.clips, others=self.settings.data.other_clips)
        self.outliers_in_a_row = state.outliers_in_a_row
        go_on_counting(self, state, self.ranks)

    def _restore(self, step: int) -> DenoiserState:
        """Take over what was learned until then, without what is counted; returns the checkpoint's state."""
        state = checkpoint.read_state(self.settings.output, step, DenoiserState)
        self._check_global_batch(state.global_batch)
        self.intact = False
        checkpoint.read_into(self.settings.output, step, self.learner.parts())
        self.learner.load_state_dict({"clip": state.clip.model_dump()})
        self.intact = True
        return state

    def _check_global_batch(self, before: int | None) -> None:
        """Raise ValueError unless steps have as many samples as when the checkpoint was made."""
        now, ranks = self.sampler.size, self.ranks.data_ranks
        if before in (None, now):
            return
        if before % ranks:
            possible = [n for n in range(1, before + 1) if before % n == 0]
            advice = f"use a number of processes with different samples that divides it: {possible}"
        else:
            advice = f"set data.batch_size x optimizer.accumulate to {before // ranks}"
        raise ValueError(
            f"the run has {before} samples a step, and would have {now} with {ranks} processes x "
            f"data.batch_size {self.settings.data.batch_size} x optimizer.accumulate "
            f"{self.settings.optimizer.accumulate}: {advice}"
        )

    def validate(self, step: int, check: Callable[[], None]) -> dict[str, float]:
        """Losses of the averaged weights on held-out clips; videos are written on the way."""
        assert self.validation is not None
        with explained_memory(_VALIDATING), self.speed.apart(), self.learner.averaged():
            return self.validation.run(self.model, step, check)
