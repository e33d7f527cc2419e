"""Method "flow": the denoiser is trained by flow matching. The loss itself is in flow_loss.py.

A step is a pure function of the state before it and its number: order of clips, captions, sigmas and noise
come from (seed, step, slot), so that a resumed run continues bit for bit on the CPU.
"""

import logging
import math
import random
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from opensoraplan.data.buckets import BucketSampler
from opensoraplan.data.features import read_parts
from opensoraplan.device import DTYPES
from opensoraplan.models.attention import check_backend
from opensoraplan.models.hashes import hash_plain
from opensoraplan.models.lora import check_peft
from opensoraplan.models.sizes import BatchShape, training_flops
from opensoraplan.models.strict import plain_config
from opensoraplan.parallel.ranks import Ranks
from opensoraplan.runtime.compiling import compile_blocks
from opensoraplan.runtime.quantisation import check_weight_precision
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.inputs.encoders import fingerprint_files
from opensoraplan.train.inputs.sources import clips_of_all, global_batch_of, open_source
from opensoraplan.train.inputs.turns import Turn, encoded_batches
from opensoraplan.train.learner.adapter import BASE_SETTING, fingerprint_base, lr_ratios
from opensoraplan.train.learner.building import build
from opensoraplan.train.learner.fitting import Fitting
from opensoraplan.train.learner.gradient_clip import AdaptiveClip
from opensoraplan.train.learner.learner import Learner
from opensoraplan.train.log.metrics import Averages
from opensoraplan.train.log.speed import Speed
from opensoraplan.train.log.validation import Validation
from opensoraplan.train.methods import flow_loss
from opensoraplan.train.methods.method import Account, OutlierPolicy
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.state import DenoiserState

logger = logging.getLogger(__name__)


class FlowMatching:
    """The denoiser's learner, the clips or features that it learns from, and the held-out ones."""

    state = DenoiserState
    validation_advice = (
        "validation does not fit into memory: lower vae.chunk or the frames, height and width of validation, "
        'or set optimizer.ema_device to "cpu"'
    )

    @staticmethod
    def check(settings: TrainSettings) -> None:
        """Raise ValueError for what can be told to be impossible before anything is opened."""
        pretrained = settings.model.pretrained
        if pretrained is not None and not pretrained.exists():
            raise ValueError(
                f"model.pretrained {pretrained} does not exist: `osp convert` makes such a folder"
            )
        if settings.model.attention is not None:
            check_backend(settings.model.attention)

    def __init__(self, settings: TrainSettings, *, device: torch.device, ranks: Ranks) -> None:
        if settings.parallel.cpu_offload and ranks.mesh is None:
            raise ValueError(
                "parallel.cpu_offload needs several processes (FSDP): start them with osp launch"
            )
        _check_adapter(settings, device, ranks)
        self._settings = settings
        self._ranks = ranks
        self._dtype = DTYPES[settings.model.compute]
        self._adapts = settings.adapter.kind != "none"
        self.global_batch = global_batch_of(settings) * ranks.data_ranks
        self._source, encoders = open_source(settings, device=device, global_batch=self.global_batch)
        self._sampler = BucketSampler(self._source.shapes, global_batch=self.global_batch, seed=settings.seed)
        if self._sampler.dropped_per_epoch:
            left = ", ".join(
                f"{n} of {'x'.join(map(str, shape))}" for shape, n in self._sampler.dropped_per_epoch.items()
            )
            logger.info("clips that do not fill a whole step are skipped, other ones in each epoch: %s", left)
        self._validation = None
        if settings.validation.every:
            self._validation = Validation(settings, encoders=encoders, device=device, ranks=ranks)
        self.clips = clips_of_all(self._source.samples, ranks)
        self.encoders = ranks.agree(self._fingerprints)
        self._fitting = None
        if settings.memory.placement == "auto":
            encoders = encoders or (self._validation and self._validation.encoders)
            self._fitting = Fitting(settings, self._largest_batch(), device, encoders=encoders)
            settings = self._settings = self._fitting.settings
        self.fits = self._fitting is not None
        self._model = build(settings, device=device, mesh=ranks.mesh).train()
        self._source.check_fits(self._model)
        self._config = plain_config(self._model)
        self.learners = (self._learner(),)
        self.outliers = OutlierPolicy(
            settings.clip.patience,
            restores=True,
            advice="check the data, resume with clip.outlier="
            '"clip", which scales such gradients down, or start again with a lower optimizer.lr',
        )
        self.speed = Speed(settings.log, device=device, dtype=self._dtype)

    def _learner(self) -> Learner:
        """What trains the model, in the precision of the optimizer and in that of the model."""
        settings = self._settings
        master = compute = DTYPES[settings.model.master]
        if self._ranks.mesh is None:  # on a mesh, FSDP casts the weights that it gathers, and compiles blocks
            compute = self._dtype
            if settings.memory.compile:
                compile_blocks(self._model)
        return Learner.from_settings(
            self._model,
            settings.optimizer,
            clip=AdaptiveClip(ema_decay=settings.clip.ema_decay, outlier=settings.clip.outlier),
            master=master,
            compute=compute,
            lr_ratios=lr_ratios((name for name, _ in self._model.named_parameters()), settings.adapter),
        )

    def _largest_batch(self) -> BatchShape:
        """Of all micro-batches the one that needs the most memory."""
        indices = {shape: index for index, shape in enumerate(self._source.shapes)}.values()
        more = int(self._settings.conditions.first_last > 0)  # the last frame, behind the clip
        grids = [(t + more, h, w) for _, t, h, w in map(self._source.latent_shape, indices)]
        text = self._settings.text.max_tokens
        return BatchShape(max(grids, key=math.prod), text, self._settings.data.batch_size)

    def _fingerprints(self) -> dict[str, str]:
        """Of what the run uses and does not train."""
        settings, base = self._settings, self._settings.model.pretrained
        found = fingerprint_files(settings.vae, settings.text)
        if self._adapts and base is not None:
            found[BASE_SETTING] = fingerprint_base(base)
        if settings.data.features is not None:
            found["data.features"] = hash_plain(read_parts(settings.data.features))
        return found

    def batches(self, start: int, account: Account) -> Generator[Turn, None, None]:
        return encoded_batches(
            self._source, self._sampler, self._settings, self._ranks, start=start, account=account
        )

    def memory_advice(self, batch: Turn) -> str:
        moments, text = batch.encoded.moments, batch.encoded.prompt.sequence
        shape = " x ".join(map(str, (len(moments), moments.shape[1] // 2, *moments.shape[2:])))
        return (
            f"latents of {shape} with {text.shape[1]} text tokens do not fit into memory: raise "
            "memory.recompute_blocks, or lower data.batch_size or data.selection's sizes; osp plan "
            "predicts what they need"
        )

    def go_leaner(self) -> bool:
        return self._fitting is not None and self._fitting.go_leaner(self._model)

    def loss(self, batch: Turn, *, step: int, micro: int, averages: Averages) -> Tensor:
        drawn, encoded = batch.drawn, batch.encoded
        if self._settings.adapter.dropout:
            place = f"{self._settings.seed} {step} {micro} {self._ranks.data_rank}"
            torch.manual_seed(random.Random(place).getrandbits(63))
        latents, conditions, drawn = flow_loss.prepare(encoded, drawn, self._source.vae)
        losses = flow_loss.losses(
            self._model,
            latents,
            conditions,
            sigma=drawn.sigma,
            noise=drawn.noise,
            dtype=self._dtype,
            weighting=self._settings.flow.weighting,
        )
        sigma = drawn.sigma if drawn.sigma.ndim == 1 else drawn.sigma.mean(1)
        averages.add_losses(losses, sigma)
        self._count(batch, latents)
        return losses.mean()

    def _count(self, batch: Turn, latents: Tensor) -> None:
        """Let `speed` know of latents [B, C, T, H, W] that go forward and backward."""
        samples, _, frames, height, width = latents.shape
        text_tokens = batch.encoded.prompt.sequence.shape[1]
        shape = BatchShape((frames, height, width), text_tokens, samples)
        self.speed.waited(batch.waited, encoding=batch.encoding)
        self.speed.count(
            samples=samples,
            tokens=samples * frames * height * width // self._config["patch_size"] ** 2,
            # A frozen weight has no gradient, which is a third of the products.
            flops=training_flops(self._config, shape) * (2 if self._adapts else 3) // 3,
        )

    def finish_step(self, step: int, averages: Averages) -> None:
        pass

    def validate(self, step: int, check: Callable[[], None]) -> Mapping[str, float]:
        """Losses on held-out clips; videos are written on the way."""
        assert self._validation is not None
        return self._validation.run(self._model, step, check)

    def finish(self) -> Path:
        """The folder of the last checkpoint."""
        output = self._settings.output
        last = checkpoint.path_of(output, self._settings.optimizer.steps)
        logger.info("the last checkpoint is %s", last)
        if (best := checkpoint.best(output)) is not None:
            logger.info(
                "the checkpoint with the lowest held-out loss is %s", checkpoint.path_of(output, best)
            )
        return last


def _check_adapter(settings: TrainSettings, device: torch.device, ranks: Ranks) -> None:
    """Raise ValueError for an adapter that cannot be trained here, or a frozen base that cannot be kept as
    the settings say.
    """
    if settings.adapter.kind != "none":
        check_peft()
    base, placement = settings.adapter.base, settings.memory.placement
    if ranks.mesh is not None and (base != "whole" or placement != "resident"):
        asked = f'adapter.base "{base}"' if base != "whole" else f'memory.placement "{placement}"'
        raise ValueError(
            f"{asked} works in one process only, got {ranks.count}: FSDP shards the frozen weights instead"
        )
    if base != "auto":
        check_weight_precision(base, device, DTYPES[settings.model.compute])
