"""Method "vae": WF-VAE is trained by L1, wavelet and KL losses, with LPIPS and a discriminator if wanted. The
losses themselves are in vae_losses.py and adversarial.py.

Everything random is drawn from generators seeded by (seed, step), so that a run resumes exactly.
"""

import logging
import random
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from opensoraplan.data.buckets import BucketSampler
from opensoraplan.data.dataset import Batch, ClipDataset, collate, iter_readable
from opensoraplan.data.selection import Sample
from opensoraplan.data.video import to_uint8
from opensoraplan.device import DTYPES, prepare, resolve_device
from opensoraplan.fidelity import Fidelity
from opensoraplan.formats.assemble import open_vae
from opensoraplan.formats.export import new_folder, write_component
from opensoraplan.models import original
from opensoraplan.models.strict import name_wrong_types
from opensoraplan.models.wfvae import WFVAE
from opensoraplan.parallel.ranks import Ranks, place_in_job
from opensoraplan.shapes import latent_shape
from opensoraplan.train.config import VAEClipSettings, VAEModelSettings, VAETrainSettings
from opensoraplan.train.inputs.loading import micro_batches, shares_of_steps
from opensoraplan.train.inputs.sources import clip_bytes, clips_of, global_batch_of, select_clips
from opensoraplan.train.learner.gradient_clip import FixedClip
from opensoraplan.train.learner.learner import Learner, check_finite
from opensoraplan.train.learner.master import MasterWeights
from opensoraplan.train.learner.optimizer import begin_state
from opensoraplan.train.log.metrics import Averages
from opensoraplan.train.log.speed import Speed
from opensoraplan.train.methods.adversarial import (
    PatchDiscriminator3d,
    adaptive_weight,
    hinge_loss,
    load_lpips,
    perceptual_loss,
)
from opensoraplan.train.methods.method import Account, OutlierPolicy
from opensoraplan.train.methods.vae_losses import Reconstruction, reconstruct
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.folder import CONFIG
from opensoraplan.train.run.state import RunState

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

FINISHED = "vae"
# How many clips tell the latents' shift and scale.
_MEASURED = 256
# So many steps in a row may be left out.
_PATIENCE = 20
_FULL = "pieces of this size do not fit into memory: lower data.batch_size, frames, height or width"


def export_vae(run: Path, out: Path, *, step: str = "latest") -> None:
    """Write the VAE of a run's checkpoint, as the run does after its last step, to the new folder `out`. The
    latents' shift and scale are measured on the run's clips, which a run with a frozen encoder does not need.
    Raises ValueError for a step that is not there.
    """
    settings = VAETrainSettings.read_file(run / CONFIG)
    start = checkpoint.find(run, step)
    with new_folder(out) as folder:
        model = WFVAE(**checkpoint.read_state(run, start, RunState).architecture)
        parts: dict[str, Mapping[str, Tensor]] = {"model": model.state_dict()}
        if settings.optimizer.ema_decay is not None:  # over the last weights
            _freeze(model, settings.model)
            parts["ema"] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        checkpoint.read_into(run, start, parts)
        samples: Sequence[Sample] = ()
        if not settings.model.freeze_encoder:
            device = resolve_device(settings.device)
            prepare(device, allow_tf32=settings.allow_tf32)
            samples = _samples_to_train_on(settings)
            model.to(device)  # type: ignore[arg-type]
        _write(model, folder, settings, samples)
    logger.info("wrote the VAE of step %d to %s", start, out)


class _Adversary:
    """The discriminator, which plays against the VAE from step `start` on, and its learner."""

    def __init__(self, settings: VAETrainSettings, *, device: torch.device) -> None:
        self.start = settings.loss.adversarial_start or 0
        self.factor = settings.loss.adversarial
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed + 1)
            self.model = PatchDiscriminator3d().to(device).train()
        weights = MasterWeights(self.model, master=torch.float32, compute=torch.float32)
        rate = settings.loss.discriminator_lr
        optimizer = torch.optim.AdamW(weights.parameters.values(), lr=rate, fused=True)
        begin_state(optimizer)
        self.learner = Learner(weights, optimizer, name="discriminator")

    def loss(self, made: Reconstruction, l1: Tensor, last_layer: Tensor) -> Tensor:
        """What the VAE pays for pixels that are told from real ones, weighted against `l1`."""
        self.model.requires_grad_(False)
        fooled = -self.model(made.pixels).mean()
        return adaptive_weight(l1, fooled, last_layer, factor=self.factor) * fooled

    def learn(self, step: int, real: Tensor, made: Tensor) -> Tensor:
        """Take a step towards telling them apart; returns the hinge loss."""
        self.model.requires_grad_(True)
        self.learner.begin_step(step)
        loss = hinge_loss(self.model(real), self.model(made.detach()))
        self.learner.backward(loss)
        self.learner.finish_step(step)
        return loss.detach()


class VAETraining:
    """The VAE's learner, the discriminator that plays against it if wanted, and the clips they learn from."""

    state = RunState
    validation_advice = _FULL
    fits = False
    encoders: Mapping[str, str] = MappingProxyType({})  # it has none beside the model

    @staticmethod
    def check(settings: VAETrainSettings) -> None:
        """Raise ValueError for what can be told to be impossible before anything is opened."""
        if (processes := place_in_job()[1]) > 1:
            raise ValueError(f"a VAE is trained in one process, but torchrun started {processes}")
        piece = settings.data
        latent_shape(piece.frames, piece.height, piece.width, strides=WFVAE.strides, patch=1)

    def __init__(self, settings: VAETrainSettings, *, device: torch.device, ranks: Ranks) -> None:  # noqa: ARG002
        self._settings = settings
        self._device = device
        self._samples = _samples_to_train_on(settings)
        _check_pieces(self._samples, settings.data)
        self._held_out = _held_out_samples(settings) if settings.validation.every else ()
        self.clips = clips_of(self._samples)
        self.global_batch = global_batch_of(settings)
        self._model = _model(settings.model, seed=settings.seed).to(device).train()  # type: ignore[arg-type]
        _freeze(self._model, settings.model)
        # Checkpoints have a frozen encoder, too: an export needs nothing else.
        self._learner = Learner.from_settings(
            self._model, settings.optimizer, clip=FixedClip(settings.max_grad_norm), save_frozen=True
        )
        self._lpips = load_lpips(device) if settings.loss.perceptual else None
        adversarial = settings.loss.adversarial_start is not None
        self._adversary = _Adversary(settings, device=device) if adversarial else None
        self._played: list[tuple[Tensor, Tensor]] = []
        self.learners = (self._learner, *([self._adversary.learner] if self._adversary else []))
        self.outliers = OutlierPolicy(
            _PATIENCE,
            restores=False,
            advice=f"start a new run with a lower optimizer.lr than {settings.optimizer.lr:g}, and with "
            "model.pretrained to go on from what osp export gives",
        )
        self.speed = Speed(settings.log, device=device)

    def batches(self, start: int, account: Account) -> Generator[Batch, None, None]:
        settings, data = self._settings, self._settings.data
        accumulate, steps = settings.optimizer.accumulate, range(start, settings.optimizer.steps)
        sampler = BucketSampler(
            [sample.shape for sample in self._samples], global_batch=self.global_batch, seed=settings.seed
        )
        batches = micro_batches(
            ClipDataset(self._samples, seed=settings.seed, new_windows=data.new_windows, reader=data.reader),
            lambda: shares_of_steps(sampler, steps, accumulate=accumulate),
            workers=data.workers,
            collate=collate,
            batch_bytes=data.batch_size * max(clip_bytes(sample.shape) for sample in self._samples),
        )
        with closing(batches):
            asked = time.perf_counter()
            for batch in batches:
                self.speed.waited(time.perf_counter() - asked)
                account(batch.failures)
                yield batch
                asked = time.perf_counter()

    def memory_advice(self, batch: Batch) -> str:  # noqa: ARG002
        return _FULL

    def loss(self, batch: Batch, *, step: int, micro: int, averages: Averages) -> Tensor:
        """Nothing in it waits for the device."""
        settings, weights, frozen = self._settings, self._settings.loss, self._settings.model.freeze_encoder
        chance = f"{settings.seed} {step} {micro}"
        x = _pieces(batch.video, settings.data, chance=chance).to(self._device)
        generator = torch.Generator().manual_seed(random.Random(chance).getrandbits(63))
        grid = latent_shape(*x.shape[2:], strides=self._model.strides, patch=1)
        noise = torch.randn(len(x), self._model.latent_channels, *grid, generator=generator)
        compute = DTYPES[settings.model.compute]
        made = reconstruct(self._model, x, noise.to(self._device), freeze_encoder=frozen, compute=compute)
        loss = made.l1
        logged = {"l1": made.l1, "wavelet": made.wavelet, "kl": made.kl}
        if self._lpips is not None:
            logged["lpips"] = perceptual_loss(self._lpips, x, made.pixels)
            loss = loss + weights.perceptual * logged["lpips"]
        total = loss + weights.wavelet * made.wavelet + weights.kl * made.kl
        if (adversary := self._adversary_at(step)) is not None:
            total = total + adversary.loss(made, loss, self._model.decoder.conv_out.weight)
        pixels = made.pixels.detach()
        error = (pixels.clamp(-1, 1) - x).square().mean() / 4
        for name, value in {**logged, "loss": total, "psnr": -10 * error.clamp_min(1e-10).log10()}.items():
            averages.add(name, value)
        self._played = [*(self._played if micro else []), (x, pixels)]
        self.speed.count(samples=len(x))
        return total

    def go_leaner(self) -> bool:
        return False

    def finish_step(self, step: int, averages: Averages) -> None:
        """Let the discriminator learn from what the VAE made: only now, so that a step that fails leaves both
        as they were. (Its norms have running statistics that nothing reads.)
        """
        if (adversary := self._adversary_at(step)) is not None:
            for real, made in self._played:
                averages.add("discriminator", adversary.learn(step, real, made))

    def _adversary_at(self, step: int) -> _Adversary | None:
        return self._adversary if self._adversary is not None and step >= self._adversary.start else None

    @torch.no_grad()
    def validate(self, step: int, check: Callable[[], None]) -> Mapping[str, float]:  # noqa: ARG002
        """PSNR and SSIM of the held-out clips, by the mode of the latents."""
        fidelity = Fidelity()
        for video in _videos(self._held_out, self._settings):
            check()
            (posterior,) = self._model.encode(video.to(self._device), return_dict=False)
            (result,) = self._model.decode(posterior.mode(), return_dict=False)
            fidelity.update(to_uint8(video[0]), to_uint8(result[0].cpu()))
        return {"validation_psnr": fidelity.psnr, "validation_ssim": fidelity.ssim}

    def finish(self) -> Path:
        """The folder of the finished VAE (diffusers' format: EMA weights, the latents' shift and scale)."""
        out = self._settings.output / FINISHED
        fresh, old = out.with_name(f".{FINISHED}.new"), out.with_name(f".{FINISHED}.old")
        shutil.rmtree(fresh, ignore_errors=True)
        with new_folder(fresh) as folder, self._learner.use_ema():
            _write(self._model, folder, self._settings, self._samples)
        if out.exists():  # left by a run that was extended: there until the new one is whole
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        fresh.rename(out)
        shutil.rmtree(old, ignore_errors=True)
        logger.info("wrote the finished VAE to %s", out)
        return out


def _model(settings: VAEModelSettings, *, seed: int) -> WFVAE:
    if settings.pretrained is not None:
        opened = open_vae(settings.pretrained, settings.config)
        model = opened.model
        if not isinstance(model, WFVAE):  # of which the wavelet loss is
            raise ValueError(
                f"{settings.pretrained} is a {type(model).__name__}: only a WFVAE can be trained"
            )
        original.fill(model, opened.names, opened.tensors, dtype=torch.float32)
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config: dict[str, Any] = {"shift": None, "scale": None, **(settings.config or {})}
        WFVAE.check_config(config, where="model.config")
        with name_wrong_types("model.config"):
            return WFVAE(**config)


def _write(model: WFVAE, folder: Path, settings: VAETrainSettings, samples: Sequence[Sample]) -> None:
    """The VAE for use, with the shift and scale of its latents, measured unless the encoder was frozen."""
    check_finite(model.parameters())
    if not settings.model.freeze_encoder:
        shift, scale = _measured(model, settings, samples)
        model.register_to_config(shift=shift, scale=scale)
    tensors = model.state_dict()
    write_component(model, {name: name for name in tensors}, tensors, folder)


@torch.no_grad()
def _measured(
    model: WFVAE, settings: VAETrainSettings, samples: Sequence[Sample]
) -> tuple[list[float], list[float]]:
    """Per channel the mean of the latents and 1 / their standard deviation, over clips of the data."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for video in _videos(spread(samples, most=_MEASURED), settings):
        (posterior,) = model.encode(video.to(model.device), return_dict=False)
        mean, variance = posterior.mean.float().cpu(), posterior.var.float().cpu()
        count += mean.numel() // mean.shape[1]
        total = total + mean.sum((0, 2, 3, 4))
        squares = squares + (mean.square() + variance).sum((0, 2, 3, 4))
    shift = total / count
    scale = (squares / count - shift.square()).clamp_min(1e-12).rsqrt()
    return [round(value, 4) for value in shift.tolist()], [round(value, 4) for value in scale.tolist()]


def spread(items: Sequence[Item], *, most: int) -> list[Item]:
    """So many of the items at most, evenly from all of them, in order."""
    count = min(most, len(items))
    return [items[n * len(items) // count] for n in range(count)]


def _videos(samples: Sequence[Sample], settings: VAETrainSettings) -> Iterator[Tensor]:
    """Each sample whole, [1, 3, T, H, W]."""
    reader = settings.data.reader
    clips = ClipDataset(samples, seed=settings.seed, new_windows=False, reader=reader, replace=False)
    for _, clip in iter_readable(clips, len(samples)):
        yield clip.video[None]


def _freeze(model: WFVAE, settings: VAEModelSettings) -> None:
    """Freeze the encoder if it is to stay as it is."""
    model.encoder.requires_grad_(not settings.freeze_encoder)


def _samples_to_train_on(settings: VAETrainSettings) -> tuple[Sample, ...]:
    data = settings.data
    assert data.manifest is not None
    return select_clips(
        data,
        data.manifest,
        root=data.root,
        seed=settings.seed,
        global_batch=global_batch_of(settings),
        need_captions=False,
    )


def _held_out_samples(settings: VAETrainSettings) -> tuple[Sample, ...]:
    wanted = settings.validation
    assert wanted.manifest is not None
    samples = select_clips(
        settings.data, wanted.manifest, root=wanted.root, seed=settings.seed, need_captions=False
    )
    return samples[: wanted.samples]


def _check_pieces(samples: Sequence[Sample], data: VAEClipSettings) -> None:
    """Raise ValueError if pieces of the wanted size cannot be cut from one of the clips."""
    piece = (data.frames, data.height, data.width)
    for sample in samples:
        if any(have < wanted for have, wanted in zip(sample.shape, piece, strict=True)):
            have, wanted = (" x ".join(map(str, shape)) for shape in (sample.shape, piece))
            raise ValueError(
                f"{sample.record.path} gives {have} (frames x height x width), pieces are to be {wanted}: "
                "lower data.frames, data.height or data.width, or raise data.selection"
            )


def _pieces(video: Tensor, data: VAEClipSettings, *, chance: str) -> Tensor:
    """A random piece of every clip of [B, 3, T, H, W], in half of the cases mirrored."""
    rng = random.Random(chance)
    pieces = []
    for clip in video:
        starts = [
            rng.randint(0, have - wanted)
            for have, wanted in zip(clip.shape[1:], (data.frames, data.height, data.width), strict=True)
        ]
        t, y, x = starts
        piece = clip[:, t : t + data.frames, y : y + data.height, x : x + data.width]
        pieces.append(piece.flip(3) if data.flip and rng.random() < 0.5 else piece)
    return torch.stack(pieces)
