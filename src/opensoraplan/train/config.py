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
from opensoraplan.defaults import BasePrecision, Fps, Initialisation
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
    """The denoiser: where its weights come from, and the precision of training."""

    pretrained: ModelPath | None = None
    """Checkpoint of any format to start from, or "builtin". Leave it out to train a new model."""
    config: dict[str, object] | None = None
    """Constructor arguments of SparseUMMDiT, for a new model or for a checkpoint without a config."""
    init: Initialisation = "adaln_zero"
    """How a new model starts. "adaln_zero": every block is the identity (arXiv 2212.09748). "original": as
    Open-Sora Plan v1.5.0 does, normal(0, 0.02) with only the skip connections at zero.
    """
    sparse_n: tuple[Positive, ...] | None = None
    """Skiparse rate of each stage, instead of the config's. All 1 is dense. Weights do not depend on it, so
    train dense first and sparse later.
    """
    compute: Precision = "bf16"
    """Precision of the forward and backward pass. Use "fp32" on CPUs without bf16 instructions."""
    master: Precision = "fp32"
    """Precision of the weights that the optimizer updates. "bf16" saves memory,
    but small updates are lost.
    """
    attention: str | None = None
    """Attention backend of diffusers, such as "flash"; None is torch's own. Some backends take no mask, which
    batches of captions of several lengths need.
    """

    @model_validator(mode="after")
    def _given(self) -> Self:
        if self.pretrained is None and self.config is None:
            raise ValueError("a model needs `pretrained` (a checkpoint) or `config` (to start from nothing)")
        if self.pretrained is not None and self.init != "adaln_zero":
            raise ValueError(
                f"init {self.init!r} is for a new model, but `pretrained` has weights: give one of both"
            )
        return self


class AdapterSettings(Settings):
    """A LoRA that is trained instead of the denoiser's own weights, which stay frozen."""

    kind: Literal["none", "lora", "dora"] = "none"
    """"lora" trains a low-rank addition to the weights of linear layers (arXiv 2106.09685), "dora" also the
    norms of the weights' rows (arXiv 2402.09353). "none" trains all weights.
    """
    rank: Annotated[int, Field(ge=1, le=2**14)] = 32
    """Rank of the additions. Higher ranks can learn more, and make the file larger."""
    alpha: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """The additions are scaled by alpha / rank. None is the rank, which scales by 1."""
    targets: tuple[Expression, ...] = ()
    """Regular expressions; linear layers with a match in their names are trained. Empty: attention and
    feed-forwards of both streams.
    """
    up_lr_ratio: Annotated[float, Field(gt=0, le=10**4)] = 1.0
    """Learning rate of the up matrices (B) as a multiple of optimizer.lr: LoRA+ (arXiv 2402.12354), which
    advises 16 with a lower lr. Try it if learning is slow at first.
    """
    dropout: Beta = 0.0
    """Fraction of the additions' inputs that are dropped in training. Raise it if
    few clips are overfitted.
    """
    base: BasePrecision | Literal["auto"] = "whole"
    """Precision in which the frozen weights are kept. "int8" halves their memory, "fp8" saves a third and
    multiplies faster on cards with fp8 instructions, "nf4" takes a quarter and needs the extra
    `bitsandbytes`. They change the model a little, "nf4" the most. "whole" is `model.compute`. "auto", with
    `memory.placement` "auto": int8 if they do not fit whole.
    """

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.kind == "dora" and self.base != "whole":
            raise ValueError(f'kind "dora" reads the weights whole, got base "{self.base}": use kind "lora"')
        return self

    @model_validator(mode="after")
    def _used(self) -> Self:
        given = [name for name in sorted(self.model_fields_set - {"kind"}) if self.kind == "none"]
        if any(getattr(self, name) != type(self).model_fields[name].default for name in given):
            raise ValueError(f'{", ".join(given)} needs kind = "lora" or "dora": all weights are trained')
        return self


class VAESettings(Settings):
    """The frozen VAE that encodes clips and decodes sample videos."""

    pretrained: ModelPath | None = None
    """VAE checkpoint, model folder or "builtin". Needed unless the run trains on `data.features`."""
    config: dict[str, object] | None = None
    """Constructor arguments of the VAE, for a checkpoint without a config."""
    compute: Precision = "fp32"
    """Precision of encoding and decoding. "bf16" is faster and slightly less exact."""
    chunk: Side = 4
    """Latent frames, of 8 frames each, that are encoded or decoded at a time. Fewer need less memory and give
    the same result up to rounding.
    """


class TextSettings(Settings):
    """The frozen text encoders and how captions are prepared for them."""

    t5: ModelPath | None = None
    """Folder of the T5 encoder, a model folder or "builtin". Needed unless the run
    trains on `data.features`.
    """
    clip: ModelPath | None = None
    """Folder of the CLIP text model with projection, a model folder or "builtin". Needed as `t5` is."""
    t5_tokenizer: ModelPath | None = None
    """Folder of T5's tokenizer, if it is not in the encoder's folder."""
    clip_tokenizer: ModelPath | None = None
    """Folder of CLIP's tokenizer, if it is not in the encoder's folder."""
    max_tokens: Annotated[int, Field(ge=1, le=2**20)] = 512
    """Most T5 tokens of a caption; longer captions are cut. Lower it to save memory if captions are short."""
    clean: bool = True
    """Clean captions as the original does. Switch it off for captions with identifiers or markup to keep."""
    keep_chinese: bool = False
    """Keep Chinese characters when cleaning. The original removes them."""
    compute: Precision = "bf16"
    """Precision of the text encoders. Use "fp32" on CPUs without bf16 instructions."""


class ClipSourceSettings(Settings):
    """Where clips come from and how they are read."""

    manifest: Path | None = None
    """Folder or manifest of clips: anything that `osp data check` reads."""
    root: Path | None = None
    """Folder that the manifest's relative paths start from, if it is not the manifest's own."""
    selection: SelectionSettings = SelectionSettings()
    batch_size: Samples = 1
    """Samples of a micro-batch, in each group of processes that share samples.
    Raise it until memory is full.
    """
    new_windows: bool = True
    """Draw another window of a long clip in each epoch. Switch it off to train on the windows that
    `osp cache` encodes.
    """
    reader: Reader = "pyav"
    """Library that decodes videos. "decord" and "torchcodec" have to be installed."""
    workers: Workers = 4
    """Processes of each rank that decode clips. Raise it if `data_wait` in metrics.jsonl is more than
    a few percent.
    """
    max_bad_files: Count = 20
    """Unreadable files that are replaced by other clips before the run stops."""
    other_clips: bool = False
    """Allow resuming with other clips than the run began with, if some are gone or new. The losses then
    differ from those of an undisturbed run.
    """


class DataSettings(ClipSourceSettings):
    """What the denoiser is trained on: clips, or their features."""

    features: Path | None = None
    """Folder written by `osp cache`, to train on instead of clips. It has one window of each clip."""
    repeat: dict[Expression, Repeats] = Field(default={})
    """Regular expressions and how many more times an epoch has the clips whose captions match. Counts of
    several matches add up.
    """
    caption_dropout: Fraction = 0.1
    """Fraction of captions that are replaced by the empty one, which guidance needs."""
    use_aesthetic: bool = False
    """Add a sentence on quality to captions of clips with a very low or very high aesthetic score."""

    @model_validator(mode="after")
    def _given(self) -> Self:
        if self.manifest is None and self.features is None:
            raise ValueError("data needs `manifest` (clips with captions) or `features` (from osp cache)")
        return self


class FlowSettings(Settings):
    """How sigmas are drawn and losses weighted."""

    weighting: Weighting = "logit_normal"
    """Distribution of sigmas and weight of their losses. "logit_normal", the original's, draws
    mostly medium noise.
    """
    shift: Literal["dynamic"] | Shift = "dynamic"
    """Timestep shift: higher values train more on high noise. "dynamic" computes it from the number of tokens
    of a frame.
    """


class ConditionSettings(Settings):
    """Tasks besides text to video: what share of the samples is given frames of its clip, clean, and has to
    make the others. No weights are added, and any checkpoint can learn them, whole or as a LoRA.
    """

    first: Fraction = 0.0
    """Share of the samples that begin from their first frame (image to video)."""
    prefix: Fraction = 0.0
    """Share that goes on from 9 frames or more, which `osp generate --video` and `--extend` need."""
    first_last: Fraction = 0.0
    """Share that is given the first and the last frame."""
    independent: Fraction = 0.0
    """Share of all samples in which each latent frame that is not given has noise of its own."""

    @property
    def used(self) -> bool:
        """Whether there is any task but text to video."""
        return self != ConditionSettings()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (total := self.first + self.prefix + self.first_last) > 1 + 1e-9:
            raise ValueError(
                f"first, prefix and first_last are shares of all samples, but add up to {total:g}"
            )
        return self


class OptimizerSettings(Settings):
    """AdamW, its learning rate and the EMA of the weights."""

    steps: Positive = 1000
    """Optimizer steps of the whole run."""
    accumulate: Samples = 1
    """Micro-batches per step (gradient accumulation). Raise it for a larger global
    batch without more memory.
    """
    lr: LearningRate = 1e-5
    """Learning rate after the warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """"constant", or "cosine", which falls to `final_lr` at the last step."""
    warmup_steps: Count = 0
    """Steps in which the learning rate rises from 0 to `lr`."""
    final_lr: Fraction = 0.0
    """Learning rate at the end of the cosine."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moments."""
    eps: Epsilon = 1e-15
    """AdamW's epsilon. The default is the original's."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 1e-4
    """AdamW's decoupled weight decay."""
    bits: Literal[32, 8] = 32
    """Bits of AdamW's two moments of each weight. 8 saves 6 bytes for each parameter that is trained, at some
    cost in exactness. Needs the extra `bitsandbytes`, one process, and `eps` of 1e-8 at least.
    """
    ema_decay: Decay | None = 0.9999
    """Decay of the EMA of the weights per step; None is no EMA. Lower it for short runs: 0.9999 averages
    about 10,000 steps.
    """
    ema_device: Literal["same", "cpu"] = "same"
    """Where the EMA is kept. "cpu" saves 4 bytes per parameter on the accelerator."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.bits == 8 and self.eps < 1e-8:
            raise ValueError(
                f"eps {self.eps:g} is too small for bits = 8, which round small moments to 0: use 1e-8"
            )
        return self

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.schedule == "cosine" and self.final_lr > self.lr:
            raise ValueError(
                f"final_lr {self.final_lr:g} is above lr {self.lr:g}, from which cosine falls to it"
            )
        return self


class GradientClipSettings(Settings):
    """Adaptive gradient clipping at mean + 3 sigma of past gradient norms, as in the original."""

    ema_decay: Decay = 0.99
    """Decay of the averages of the norm and its variance. Higher values follow changes more slowly."""
    outlier: Outlier = "skip"
    """What happens to a step whose norm is not finite or above max(mean + 5 sigma, 5). "skip": leave it out.
    "clip": scale it down. "stop": stop the run, as the original does.
    """
    patience: Positive = 5
    """With "skip": after so many outliers in a row, go back to the last checkpoint before them."""


class MemorySettings(Settings):
    """What trades memory for time."""

    recompute_blocks: Count = 0
    """Number of blocks that are recomputed in the backward pass instead of keeping their activations. Raise
    it if memory is full; all blocks cost about a third more time.
    """
    recompute_feed_forwards: Count = 0
    """Number of blocks of which only the feed-forward is recomputed. Saves less memory than
    `recompute_blocks`, and costs less time.
    """
    keep_attention: bool = False
    """Keep the output of attention in recomputed blocks: more memory, less time."""
    inputs_on_host: bool = False
    """Keep the inputs of recomputed blocks in host memory until the backward pass (the release,
    121 x 576 x 1024: 7.3 GB per sample). Copies take a little time.
    """
    encoders: Literal["resident", "in-turn"] = "resident"
    """Where the VAE and the text encoders are when clips are encoded while training. "resident": on the
    device. "in-turn": in host memory, and each on the device only while it encodes; their copies take time,
    but the release's take 4.7 GB. "auto" of `placement` chooses this, too.
    """
    compile: bool = False
    """Compile each block with torch.compile. The first step takes minutes, later ones less time."""
    placement: Literal["resident", "streamed", "auto"] = "resident"
    """Where the frozen weights under an adapter are kept. "resident": on the device. "streamed": in host
    memory; each block is copied to the device while the one before it computes, and all blocks are
    recomputed. The result is the same, bit for bit. "auto": what fits into free memory, and how many blocks
    are recomputed; if memory is full after all, the step is repeated with less. `memory = "auto"` is short
    for it. One process only, but for "resident".
    """

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        return {"placement": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.recompute_blocks and self.recompute_feed_forwards:
            raise ValueError(
                f"recompute_blocks {self.recompute_blocks} and recompute_feed_forwards "
                f"{self.recompute_feed_forwards} exclude each other: set one of them to 0"
            )
        if self.placement == "streamed" and (self.recompute_feed_forwards or self.compile):
            given = "recompute_feed_forwards" if self.recompute_feed_forwards else "compile"
            raise ValueError(f'{given} does not go with placement "streamed", which recomputes whole blocks')
        if self.placement == "auto" and (self.recompute_blocks or self.recompute_feed_forwards):
            given = "recompute_blocks" if self.recompute_blocks else "recompute_feed_forwards"
            raise ValueError(f'{given} is chosen by placement "auto": leave it out')
        if self.inputs_on_host and not self.recompute_blocks and self.placement == "resident":
            raise ValueError("inputs_on_host is about recompute_blocks, which is 0: give both or none")
        if self.keep_attention and not self.recompute_blocks and self.placement == "resident":
            raise ValueError("keep_attention is about recompute_blocks, which is 0: give both or none")
        return self


class ParallelSettings(MeshSettings):
    """How several processes, started by torchrun or `osp launch`, are arranged."""

    cpu_offload: bool = False
    """Keep weight shards, gradients and optimizer state in host memory. Needs two
    processes at least. Slow.
    """
    encoder_dp: bool = True
    """Processes of one sample take turns in encoding clips and captions. Switched off, the first of
    them encodes all.
    """
    timeout_s: Annotated[float, Field(gt=0, le=10**6)] = 600
    """Seconds that a process waits for the others, also for a checkpoint, before the job is stopped. Raise it
    for slow disks.
    """


class LogSettings(Settings):
    """What is logged besides the terminal."""

    every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Also write TensorBoard files. Needs the extra `tensorboard`."""
    wandb_project: str | None = None
    """Project of Weights & Biases to log to, too. Needs the extra `wandb`."""
    peak_tflops: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """TFLOP/s of the device in the model's precision, for the MFU of `osp train`; None measures it
    at the start.
    """


class ValidationSettings(Settings):
    """Held-out losses of the EMA weights, at fixed sigmas and noise, and sample videos."""

    every: Count = 0
    """Steps between validations; 0 is never."""
    manifest: Path | None = None
    """Folder or manifest of held-out clips."""
    root: Path | None = None
    """Folder that the manifest's relative paths start from, as in `data`."""
    features: Path | None = None
    """Folder of held-out features from `osp cache`, instead of `manifest`."""
    samples: Positive = 16
    """Number of held-out clips."""
    sigmas: Annotated[tuple[Decay, ...], Field(min_length=1)] = (0.2, 0.5, 0.8)
    """Noise levels at which the loss is measured."""
    prompts: tuple[str, ...] = ()
    """Prompts of the sample videos; none if empty."""
    frames: Side = 33
    """Number of frames of a sample video, 8k + 1."""
    height: Side = 288
    """Height of a sample video in pixels, a multiple of 16."""
    width: Side = 512
    """Width of a sample video in pixels, a multiple of 16."""
    sampling_steps: Annotated[int, Field(ge=1, le=10**4)] = 50
    """Denoising steps of a sample video. Lower it to spend less time on samples."""
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] = 8.0
    """Classifier-free guidance scale of the sample videos."""
    shift: Shift | None = None
    """Timestep shift of the sample videos; None is the model's."""
    fps: Fps = 24.0
    """Frames per second of the sample videos' files."""

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
        self.requests()
        return self

    def requests(self) -> list[Request]:
        """The sample videos, each with a seed of its own. Raises ValueError for one that cannot be made."""
        wanted = {
            "frames": self.frames,
            "height": self.height,
            "width": self.width,
            "fps": self.fps,
            "steps": self.sampling_steps,
            "guidance": self.guidance_scale,
            "shift": self.shift,
        }
        return [
            Request.read({"prompt": prompt, "seed": seed, **wanted}, where=f"the video of {prompt!r}")
            for seed, prompt in enumerate(self.prompts)
        ]


class CheckpointSettings(Settings):
    """When checkpoints are saved, and which are kept. The last step always has one."""

    every: Positive = 500
    """Steps between checkpoints, which is the most that a crash can cost."""
    keep: Positive = 2
    """Number of the newest checkpoints that are kept."""
    keep_every: Positive | None = None
    """Also keep each checkpoint whose step is a multiple of this; None keeps only the newest."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest held-out loss (of a VAE, the highest PSNR), of
    those whose steps were validated. `osp export --step best` writes it.
    """


class TrainSettings(Settings):
    """A whole run that trains the denoiser."""

    method: Literal["flow"] = "flow"
    """What is trained, and by which loss. "flow": the denoiser, by flow matching. "vae": the VAE."""
    output: Path
    """Folder of the run: settings, metrics, checkpoints and samples."""
    seed: Seed = 0
    """Seed of the order of clips, of noise, sigmas and the weights of a new model."""
    device: str | None = None
    """Device such as "cpu", "cuda" or "npu"; None is the first accelerator there is, else the CPU."""
    allow_tf32: bool | None = None
    """Run fp32 matrix products and convolutions in TF32 on CUDA, faster and less exact; None is
    torch's own default.
    """
    model: ModelSettings
    adapter: AdapterSettings = AdapterSettings()
    vae: VAESettings = VAESettings()
    text: TextSettings = TextSettings()
    data: DataSettings
    flow: FlowSettings = FlowSettings()
    conditions: ConditionSettings = ConditionSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    clip: GradientClipSettings = GradientClipSettings()
    memory: MemorySettings = MemorySettings()
    parallel: ParallelSettings = ParallelSettings()
    log: LogSettings = LogSettings()
    validation: ValidationSettings = ValidationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    @model_validator(mode="after")
    def _adapts(self) -> Self:
        if self.adapter.base == "auto" and self.memory.placement != "auto":
            raise ValueError(
                f'adapter.base "auto" is chosen with memory.placement "auto", got "{self.memory.placement}"'
            )
        held_out = self.validation.manifest is not None or bool(self.validation.prompts)
        if self.memory.encoders == "in-turn" and self.data.features is not None and not held_out:
            raise ValueError('memory.encoders "in-turn" has no effect: data.features are encoded already')
        if self.adapter.kind == "none":
            if self.memory.placement == "streamed":
                raise ValueError(
                    'memory.placement "streamed" keeps frozen weights in host memory, but all weights are '
                    'trained: set adapter.kind to "lora" or "dora"'
                )
            return self
        if self.model.pretrained is None:
            raise ValueError(f'adapter.kind "{self.adapter.kind}" needs model.pretrained: a model to adapt')
        if self.parallel.tp > 1:
            raise ValueError(
                f"parallel.tp {self.parallel.tp} splits the layers of an adapter: use fsdp or sp"
            )
        return self


class VAEModelSettings(Settings):
    """The VAE to train. Weights and losses are in fp32."""

    pretrained: ModelPath | None = None
    """Checkpoint of any format to start from, or "builtin". Leave it out to train a new VAE."""
    config: dict[str, object] | None = None
    """Constructor arguments of WFVAE, for a new VAE or for a checkpoint without a config."""
    freeze_encoder: bool = False
    """Train the decoder alone. Latents, shift and scale stay as they are, and so do denoisers
    trained on them.
    """
    compute: Precision = "fp32"
    """Precision of convolutions and attention. "bf16" is faster where the device supports it."""

    @model_validator(mode="after")
    def _given(self) -> Self:
        if self.pretrained is None and self.config is None:
            raise ValueError("a VAE needs `pretrained` (a checkpoint) or `config` (to start from nothing)")
        if self.freeze_encoder and self.pretrained is None:
            raise ValueError("freeze_encoder needs `pretrained`: a new encoder has learned nothing yet")
        return self


class VAEClipSettings(ClipSourceSettings):
    """Random pieces of clips to train a VAE on."""

    frames: Side = 25
    """Frames of a piece, 8k + 1. Train on pieces as long as the clips will be."""
    height: Side = 256
    """Height of a piece in pixels, a multiple of 8."""
    width: Side = 256
    """Width of a piece in pixels, a multiple of 8."""
    flip: bool = True
    """Mirror half of the pieces. Switch it off if text or left and right matter."""


class VAELossSettings(Settings):
    """Weights of the losses besides the L1 loss of the pixels (arXiv 2411.17459)."""

    kl: Weight = 1e-6
    """Weight of the KL term. Higher values give smoother latents and blurrier frames."""
    wavelet: Weight = 0.1
    """Weight of the L1 loss between wavelet coefficients of encoder and decoder."""
    perceptual: Weight = 0.0
    """Weight of LPIPS, which gives sharper frames. Needs the extra `lpips` and its weights."""
    adversarial: Weight = 0.5
    """Weight of the adversarial loss, times the adaptive weight. Needs `adversarial_start`."""
    adversarial_start: Count | None = None
    """First step, counted from 1, in which the discriminator takes part; None is never. Start when PSNR
    has levelled off.
    """
    discriminator_lr: LearningRate = 1e-5
    """Learning rate of the discriminator."""

    @model_validator(mode="after")
    def _begun(self) -> Self:
        fields = type(self).model_fields
        for name in ("adversarial", "discriminator_lr"):
            if self.adversarial_start is None and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} needs adversarial_start: there is no discriminator without it")
        return self


class VAEValidationSettings(Settings):
    """PSNR and SSIM of the EMA weights on whole held-out clips."""

    every: Count = 0
    """Steps between validations; 0 is never."""
    manifest: Path | None = None
    """Folder or manifest of held-out clips."""
    root: Path | None = None
    """Folder that the manifest's relative paths start from, as in `data`."""
    samples: Positive = 16
    """Number of held-out clips."""

    @model_validator(mode="after")
    def _given(self) -> Self:
        if self.every and self.manifest is None:
            raise ValueError("`manifest` is missing: validation needs clips that are not trained on")
        return self


class VAEOptimizerSettings(OptimizerSettings):
    """Two defaults differ from those of the denoiser."""

    eps: Epsilon = 1e-8
    """AdamW's epsilon."""
    ema_decay: Decay | None = 0.999
    """Decay of the EMA of the weights per step; None is no EMA. 0.999 averages about 1,000 steps."""


class VAETrainSettings(Settings):
    """A whole run that trains the VAE."""

    method: Literal["vae"] = "vae"
    """What is trained, and by which loss: "vae" in the file of a VAE's run."""
    output: Path
    """Folder of the run: settings, metrics, checkpoints and at the end the VAE."""
    seed: Seed = 0
    """Seed of the pieces of clips, of noise and the weights of a new VAE."""
    device: str | None = None
    """As for `osp train`."""
    allow_tf32: bool | None = None
    """As for `osp train`."""
    model: VAEModelSettings
    data: VAEClipSettings
    loss: VAELossSettings = VAELossSettings()
    optimizer: VAEOptimizerSettings = VAEOptimizerSettings()
    max_grad_norm: Annotated[float, Field(gt=0, le=10**6)] = 1.0
    """Norm at which gradients are clipped."""
    log: LogSettings = LogSettings()
    validation: VAEValidationSettings = VAEValidationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()

    @model_validator(mode="after")
    def _given(self) -> Self:
        if self.data.manifest is None:
            raise ValueError("data.manifest is missing: training a VAE needs clips")
        return self


RunSettings = TrainSettings | VAETrainSettings
