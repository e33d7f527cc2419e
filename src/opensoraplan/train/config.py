"""What a training run is: frozen settings with one section per concern. Reading files is in files.py.

Every default is the original's, where it has one (docs/model.md, sections 4 to 6). Nothing here computes.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from opensoraplan import builtin
from opensoraplan.data.reading import Reader
from opensoraplan.data.selection import SelectionSettings
from opensoraplan.defaults import Fps, Initialisation
from opensoraplan.flow import Weighting
from opensoraplan.parallel.mesh import MeshSettings
from opensoraplan.requests import Request
from opensoraplan.settings import Settings
from opensoraplan.train.learner.gradient_clip import Outlier


def _builtin(value: object) -> object:
    """The package's own model may be named instead of its folder."""
    return builtin.folder() if value == "builtin" else value


def _expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression: {error}") from None
    return value


ModelPath = Annotated[Path, BeforeValidator(_builtin)]
Precision = Literal["fp32", "bf16"]
# Bounds beyond which a number is surely a mistake.
Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Samples = Annotated[int, Field(ge=1, le=10**6)]
Workers = Annotated[int, Field(ge=0, le=1024)]
Repeats = Annotated[int, Field(ge=1, le=10**4)]
Side = Annotated[int, Field(ge=1, le=2**16)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
LearningRate = Annotated[float, Field(gt=0, le=0.1)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=10**4)]
Shift = Annotated[float, Field(gt=0, le=1000)]
Decay = Annotated[float, Field(gt=0, lt=1)]
Expression = Annotated[str, AfterValidator(_expression)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelSettings(Settings):
    """The denoiser. `pretrained`: a checkpoint of any dialect to go on from; `config`: constructor arguments
    of SparseUMMDiT, for a new model or for a checkpoint without config; `init`: how a new model starts:
    "adaln_zero" (every block as the identity, arXiv 2212.09748) or "original" (as Open-Sora Plan v1.5.0:
    normal(0, 0.02), nothing zero but the skip connections). `sparse_n`: Skiparse rates instead of the
    config's (all 1: dense). `compute` is the precision of the forward and backward pass, `master` that of
    the weights which the optimizer changes. `attention`: the implementation, one of diffusers' backends, such
    as "flash" (None: torch's own); some take no mask, which captions of several lengths in a batch need.
    """

    pretrained: ModelPath | None = None
    config: dict[str, object] | None = None
    init: Initialisation = "adaln_zero"
    sparse_n: tuple[Positive, ...] | None = None
    compute: Precision = "bf16"
    master: Precision = "fp32"
    attention: str | None = None

    @model_validator(mode="after")
    def _given(self) -> Self:
        if self.pretrained is None and self.config is None:
            raise ValueError("a model needs `pretrained` (a checkpoint) or `config` (to start from nothing)")
        if self.pretrained is not None and self.init != "adaln_zero":
            raise ValueError(
                f"init {self.init!r} is for a new model, but `pretrained` has weights: give one of both"
            )
        return self


class VAESettings(Settings):
    """The frozen VAE. `config` for a checkpoint without one. `chunk`: how many latent frames, each of 8
    frames, are encoded or decoded at a time; fewer need less memory and give the same result up to rounding.
    """

    pretrained: ModelPath | None = None
    config: dict[str, object] | None = None
    compute: Precision = "fp32"
    chunk: Side = 4


class TextSettings(Settings):
    """The frozen text encoders: folders of a T5 encoder and a CLIP text model with projection, and of their
    tokenizers (None: in the encoder's folder). `clean` captions as the original does, which removes Chinese
    characters unless `keep_chinese` is on.
    """

    t5: ModelPath | None = None
    clip: ModelPath | None = None
    t5_tokenizer: ModelPath | None = None
    clip_tokenizer: ModelPath | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**20)] = 512
    clean: bool = True
    keep_chinese: bool = False
    compute: Precision = "bf16"


class ClipSourceSettings(Settings):
    """Where clips come from. `manifest`: anything that `osp data check` reads. `batch_size` is that of a
    micro-batch in the processes that share samples. `new_windows`: draw another window of a long clip each
    epoch. `max_bad_files`: how many unreadable files are replaced by others before the run stops.
    `other_clips`: a run may be resumed with other clips than it was begun with, since some are gone or have
    come; its steps then have other ones than they would have had.
    """

    manifest: Path | None = None
    root: Path | None = None
    selection: SelectionSettings = SelectionSettings()
    batch_size: Samples = 1
    new_windows: bool = True
    reader: Reader = "pyav"
    workers: Workers = 4
    max_bad_files: Count = 20
    other_clips: bool = False


class DataSettings(ClipSourceSettings):
    """What a denoiser is trained on: clips of `manifest`, or `features` of them, a folder that `osp cache`
    wrote (it has one window of each clip). `caption_dropout`: how often the caption is the empty one.
    `use_aesthetic`: captions of clips with a very low or high aesthetic score say so.
    `repeat`: how many times more an epoch has clips with a caption in which a regular expression is found;
    for several of them these add up.
    """

    features: Path | None = None
    repeat: dict[Expression, Repeats] = Field(default={})
    caption_dropout: Fraction = 0.1
    use_aesthetic: bool = False

    @model_validator(mode="after")
    def _given(self) -> Self:
        if self.manifest is None and self.features is None:
            raise ValueError("data needs `manifest` (clips with captions) or `features` (from osp cache)")
        return self


class FlowSettings(Settings):
    """How sigmas are drawn and losses weighted. `shift`: "dynamic" (by the frame's tokens) or a number."""

    weighting: Weighting = "logit_normal"
    shift: Literal["dynamic"] | Shift = "dynamic"


class OptimizerSettings(Settings):
    """AdamW. `steps` of `accumulate` batches each; the learning rate rises over `warmup_steps`, then stays or
    falls on a cosine to `final_lr`.

    `ema_decay` None: no EMA of the weights; `ema_device` "cpu" keeps it out of the accelerator's memory.
    """

    steps: Positive = 1000
    accumulate: Samples = 1
    lr: LearningRate = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Count = 0
    final_lr: Fraction = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Epsilon = 1e-15
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 1e-4
    ema_decay: Decay | None = 0.9999
    ema_device: Literal["same", "cpu"] = "same"

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.schedule == "cosine" and self.final_lr > self.lr:
            raise ValueError(
                f"final_lr {self.final_lr:g} is above lr {self.lr:g}, from which cosine falls to it"
            )
        return self


class GradientClipSettings(Settings):
    """Gradients clipped at mean + 3 sigma of the norms so far, as in the original (`ema_decay`: of both).
    `outlier` is what happens to a step whose norm is not finite or beyond max(mean + 5 sigma, 5). "skip"
    leaves the step out and, after `patience` such steps in a row, goes back to the last checkpoint that was
    made before them.
    """

    ema_decay: Decay = 0.99
    outlier: Outlier = "skip"
    patience: Positive = 5


class MemorySettings(Settings):
    """What is computed again in the backward pass instead of kept: whole `recompute_blocks`, or only the
    feed-forwards of the first `recompute_feed_forwards` blocks. `keep_attention`: of the former, what
    attention gives is kept, which takes much of the time. `compile`: torch.compile of each block.
    """

    recompute_blocks: Count = 0
    recompute_feed_forwards: Count = 0
    keep_attention: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.recompute_blocks and self.recompute_feed_forwards:
            raise ValueError(
                f"recompute_blocks {self.recompute_blocks} and recompute_feed_forwards "
                f"{self.recompute_feed_forwards} exclude each other: set one of them to 0"
            )
        if self.keep_attention and not self.recompute_blocks:
            raise ValueError("keep_attention is about recompute_blocks, which is 0: give both or none")
        return self


class ParallelSettings(MeshSettings):
    """How several processes, started by torchrun or `osp launch`, are arranged.

    `cpu_offload` keeps shards, gradients and optimizer state in host memory. `encoder_dp`: processes that
    work on the same sample encode different ones in turn, instead of the first all. `timeout_s`: how long a
    process waits for the others, also for them to write a checkpoint, before it takes the job down.
    """

    cpu_offload: bool = False
    encoder_dp: bool = True
    timeout_s: Annotated[float, Field(gt=0, le=10**6)] = 600


class LogSettings(Settings):
    """A line of metrics.jsonl every `every` steps, and the same to TensorBoard or wandb if wanted.

    `peak_tflops` (osp train) of the device in the model's precision, for MFU; None: measured at the start.
    """

    every: Positive = 10
    tensorboard: bool = False
    wandb_project: str | None = None
    peak_tflops: Annotated[float, Field(gt=0, le=10**6)] | None = None


class ValidationSettings(Settings):
    """Every `every` steps (0: never) the EMA's loss on `samples` held-out clips of `manifest` (with `root`,
    as in `data`) or `features`, at fixed sigmas and noise, and a video of each of `prompts` (`frames` x
    `height` x `width`), or one of both.
    """

    every: Count = 0
    manifest: Path | None = None
    root: Path | None = None
    features: Path | None = None
    samples: Positive = 16
    sigmas: Annotated[tuple[Decay, ...], Field(min_length=1)] = (0.2, 0.5, 0.8)
    prompts: tuple[str, ...] = ()
    frames: Side = 33
    height: Side = 288
    width: Side = 512
    sampling_steps: Annotated[int, Field(ge=1, le=10**4)] = 50
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] = 8.0
    shift: Shift | None = None
    fps: Fps = 24.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.manifest is not None and self.features is not None:
            raise ValueError("validation takes `manifest` or `features`, not both")
        if self.every and self.manifest is None and self.features is None and not self.prompts:
            raise ValueError(
                f"validation every {self.every} steps of what? Give `manifest` or `features` (held-out "
                "clips), or `prompts` (videos), or set `every` to 0"
            )
        if self.prompts and not self.every:
            raise ValueError("`prompts` are given, but `every` is 0, which is never: give validation.every")
        for prompt in self.prompts:
            wanted = {"frames": self.frames, "height": self.height, "width": self.width}
            Request.read({"prompt": prompt, **wanted}, where=f"the video of {prompt!r}")
        return self


class CheckpointSettings(Settings):
    """A checkpoint every `every` steps and at the end; the newest `keep` stay, and every `keep_every`th."""

    every: Positive = 500
    keep: Positive = 2
    keep_every: Positive | None = None


class TrainSettings(Settings):
    """A whole run of `osp train`; `output` is its folder. `device` None: the best there is. `allow_tf32`: run
    fp32 matrix products and convolutions in TF32 on CUDA (None: torch's own default).
    """

    output: Path
    seed: Seed = 0
    device: str | None = None
    allow_tf32: bool | None = None
    model: ModelSettings
    vae: VAESettings = VAESettings()
    text: TextSettings = TextSettings()
    data: DataSettings
    flow: FlowSettings = FlowSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    clip: GradientClipSettings = GradientClipSettings()
    memory: MemorySettings = MemorySettings()
    parallel: ParallelSettings = ParallelSettings()
    log: LogSettings = LogSettings()
    validation: ValidationSettings = ValidationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()


class VAEModelSettings(Settings):
    """The VAE to train. `pretrained`: a checkpoint to go on from; `config`: constructor arguments of WFVAE,
    for a new one or for a checkpoint without config. `freeze_encoder` trains the decoder alone, so that
    latents, shift and scale stay what they are. `compute` is the precision of convolutions and attention;
    weights and losses are in fp32.
    """

    pretrained: ModelPath | None = None
    config: dict[str, object] | None = None
    freeze_encoder: bool = False
    compute: Precision = "fp32"

    @model_validator(mode="after")
    def _given(self) -> Self:
        if self.pretrained is None and self.config is None:
            raise ValueError("a VAE needs `pretrained` (a checkpoint) or `config` (to start from nothing)")
        if self.freeze_encoder and self.pretrained is None:
            raise ValueError("freeze_encoder needs `pretrained`: a new encoder has learned nothing yet")
        return self


class VAEClipSettings(ClipSourceSettings):
    """Clips to train a VAE on, of which random pieces of `frames` x `height` x `width` are cut; `flip`
    mirrors half of them.
    """

    frames: Side = 25
    height: Side = 256
    width: Side = 256
    flip: bool = True


class VAELossSettings(Settings):
    """Weights beside the L1 loss of the pixels (arXiv 2411.17459). `adversarial_start`: the first step, from
    1, in which a discriminator takes part, with `adversarial` times the adaptive weight; None: never.
    """

    kl: Weight = 1e-6
    wavelet: Weight = 0.1
    perceptual: Weight = 0.0
    adversarial: Weight = 0.5
    adversarial_start: Count | None = None
    discriminator_lr: LearningRate = 1e-5

    @model_validator(mode="after")
    def _begun(self) -> Self:
        fields = type(self).model_fields
        for name in ("adversarial", "discriminator_lr"):
            if self.adversarial_start is None and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} needs adversarial_start: there is no discriminator without it")
        return self


class VAEValidationSettings(Settings):
    """Every `every` steps (0: never) PSNR and SSIM of `samples` whole clips of `manifest` (and `root`, as in
    `data`).
    """

    every: Count = 0
    manifest: Path | None = None
    root: Path | None = None
    samples: Positive = 16

    @model_validator(mode="after")
    def _given(self) -> Self:
        if self.every and self.manifest is None:
            raise ValueError("`manifest` is missing: validation needs clips that are not trained on")
        return self


class VAEOptimizerSettings(OptimizerSettings):
    """As for the denoiser, but for two defaults."""

    eps: Epsilon = 1e-8
    ema_decay: Decay | None = 0.999


class VAETrainSettings(Settings):
    """A whole run of `osp train-vae`. `max_grad_norm` bounds the gradient's norm. `device` and
    `allow_tf32`: as for `osp train`.
    """

    output: Path
    seed: Seed = 0
    device: str | None = None
    allow_tf32: bool | None = None
    model: VAEModelSettings
    data: VAEClipSettings
    loss: VAELossSettings = VAELossSettings()
    optimizer: VAEOptimizerSettings = VAEOptimizerSettings()
    max_grad_norm: Annotated[float, Field(gt=0, le=10**6)] = 1.0
    log: LogSettings = LogSettings()
    validation: VAEValidationSettings = VAEValidationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    @model_validator(mode="after")
    def _given(self) -> Self:
        if self.data.manifest is None:
            raise ValueError("data.manifest is missing: training a VAE needs clips")
        return self
