"""OpenSoraPlanPipeline: prompt -> embeddings -> denoising loop -> frames. No maths of its own, no
files but diffusers'.

Shapes: B videos (prompts x videos per prompt), C latent channels, T/H/W latent grid.
"""

import logging
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from opensoraplan import flow
from opensoraplan.data.video import to_uint8
from opensoraplan.defaults import FILE as GENERATE_FILE
from opensoraplan.defaults import INDEX, STEP_CACHE_FILE, Solver, check_model_files
from opensoraplan.given_frames import Clip, Picture
from opensoraplan.guidance import Branches
from opensoraplan.models.adaln import Modulation
from opensoraplan.models.conditions import Conditions, denoise, frame_timesteps, wrong_features
from opensoraplan.models.modulation import is_kept_on_host, modulations
from opensoraplan.models.overflow import take_overflows
from opensoraplan.models.pretrained_text import check_json
from opensoraplan.models.prompts import DEFAULT_NEGATIVE_PROMPT, DEFAULT_TEMPLATE, PromptSettings
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.text import (
    FEATURES,
    TEXT_PARTS,
    PromptEmbeds,
    TextEncoder,
    encode_prompts,
    shapes_of,
    text_encoder_of,
)
from opensoraplan.models.vae import VideoVAE
from opensoraplan.pipeline_inputs import (
    callback_inputs,
    changed_tensors,
    check_guidance,
    check_parts,
    check_texts,
    draw,
    make_generators,
    make_seeds,
    range_of_steps,
    repeat_texts,
)
from opensoraplan.pipeline_pixels import GivenLatents, VideoCoding
from opensoraplan.samplers import Sampler, Schedule, is_default_scheduler, make_sampler
from opensoraplan.shapes import RELEASE, latent_shape

logger = logging.getLogger(__name__)

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class NonFiniteLatentsError(FloatingPointError):
    """The latents became NaN or infinite in `step`, counted from 1. `last_good` [B, C, T, H, W] are the
    latents before it.
    """

    def __init__(self, step: int, *, steps: int, last_good: Tensor) -> None:
        super().__init__(
            f"the latents are not finite after step {step} of {steps}: try dtype bf16 or fp32, "
            "or less guidance"
        )
        self.step = step
        self.last_good = last_good


@dataclass
class VideoOutput(BaseOutput):
    """`frames`: B videos, as lists of images, an array [B, frames, height, width, 3] in [0, 1], a tensor
    [B, frames, 3, height, width] in [0, 1], or normalised latents [B, C, T, H, W]. `seeds`: the seed of each
    video, given or drawn; None if generators were given.
    """

    frames: list[list[Image.Image]] | np.ndarray | Tensor
    seeds: list[int] | None = None


class OpenSoraPlanPipeline(VideoCoding, DiffusionPipeline):
    """Text to video with Open-Sora Plan v1.5.0.

    Text encoders and tokenizers may be None if every call gets `prompt_embeds`, and the VAE may be None if
    every call asks for latents. Of the default scheduler, a FlowMatchEulerDiscreteScheduler, only `shift` and
    `use_dynamic_shifting` are used, as defaults of each call; its sigmas are `flow`'s, as in the original.
    Any other flow-matching scheduler of diffusers is used as it is. The last five arguments are those of
    `PromptSettings` and the length of a prompt in T5 tokens; they are saved with the pipeline.

    Raises ValueError for parts that do not fit each other.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "velocity", "prompt_embeds", "pooled_prompt_embeds"]  # noqa: RUF012

    transformer: SparseUMMDiT
    vae: VideoVAE
    # Where it computes, if weights come there only for that; set by runtime/placement.py.
    streamed_to: torch.device | None = None
    # State of the current call, or of the last one.
    _guidance_scale = 1.0
    _num_timesteps = 0
    _interrupt = False
    _current_timestep: Tensor | None = None
    # True while decoding; an error during decoding leaves it True.
    is_decoding = False

    def __init__(
        self,
        transformer: SparseUMMDiT,
        vae: Any,  # noqa: ANN401 (a VideoVAE; diffusers cannot check protocols)
        text_encoder: Any,  # noqa: ANN401 (transformers is imported in models/text.py only)
        tokenizer: Any,  # noqa: ANN401
        text_encoder_2: Any,  # noqa: ANN401
        tokenizer_2: Any,  # noqa: ANN401
        scheduler: Any,  # noqa: ANN401
        prompt_template: str | None = DEFAULT_TEMPLATE,
        default_negative_prompt: str = DEFAULT_NEGATIVE_PROMPT,
        clean_prompts: bool = True,
        keep_chinese: bool = False,
        max_text_tokens: int = 512,
    ) -> None:
        super().__init__()
        check_parts(transformer, vae, text_encoder, text_encoder_2)
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            scheduler=scheduler,
        )
        self.register_to_config(
            prompt_template=prompt_template,
            default_negative_prompt=default_negative_prompt,
            clean_prompts=clean_prompts,
            keep_chinese=keep_chinese,
            max_text_tokens=max_text_tokens,
        )

    @classmethod
    def from_pretrained(cls, path: Any, **options: Any) -> Any:  # noqa: ANN401
        """As in diffusers, but the JSON files of a local folder are checked first. Raises ValueError, with
        file and key, for damaged ones.
        """
        folder = Path(path)
        if (folder / INDEX).is_file():
            check_model_files(folder)
            for part in TEXT_PARTS:
                check_json(folder / part.encoder)
                check_json(folder / part.tokenizer)
        return super().from_pretrained(path, **options)

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **options: Any) -> None:  # noqa: ANN401
        """As in diffusers. Also copies generate.json and step_cache.json from the folder that this pipeline
        was loaded from.
        """
        source, target = Path(self.config.get("_name_or_path") or ""), Path(save_directory)
        for name in (GENERATE_FILE, STEP_CACHE_FILE) if (source / INDEX).is_file() else ():
            if (source / name).is_file() and source.resolve() != target.resolve():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, target / name)
        super().save_pretrained(save_directory, *args, **options)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the call. A callback may set `_guidance_scale` for the following steps."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the guidance scale asks for guidance, in the steps of the call's interval."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the call; some schedulers make more than num_inference_steps."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """1000 * sigma of the current step; None outside of denoising."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, which ends the call after its step."""
        return self._interrupt

    @property
    def _execution_device(self) -> torch.device:
        return self.streamed_to or super()._execution_device

    @property
    def prompt_settings(self) -> PromptSettings:
        """How prompts are prepared before they are encoded. Set in the constructor, or
        later with `register_to_config`.
        """
        return PromptSettings.of_config(self.config)

    def encode_prompts(self, prompts: Sequence[str], *, negative: bool = False) -> PromptEmbeds:
        """Embeddings of prompts, after the prompt settings' template and cleaning (`negative`: those
        for negative prompts). Warns of words that cleaning removes. Raises ValueError if it
        leaves almost nothing.
        """
        return self.encode_texts(self._prepare_prompts(prompts, negative=negative))

    def _prepare_prompts(self, prompts: Sequence[str], *, negative: bool = False) -> list[str]:
        """The texts to encode for prompts. Warns and raises as `encode_prompts`."""
        settings = self.prompt_settings
        for prompt in dict.fromkeys(prompts):
            if warning := settings.check(prompt, negative=negative):
                logger.warning(warning)
        return [settings.negative(p) if negative else settings.positive(p) for p in prompts]

    def encode_texts(self, texts: Sequence[str]) -> PromptEmbeds:
        """Embeddings of texts as they are. Warns of what the text encoders do not read of them."""
        encoders = self.text_encoders
        given = shapes_of(encoders)
        if missing := [name for name in FEATURES if name not in given]:
            raise ValueError(
                f"this pipeline has no text encoder that gives {' and '.join(missing)}: give prompt_embeds"
            )
        return encode_prompts(texts, encoders, device=self._execution_device)

    @property
    def text_encoders(self) -> list[TextEncoder]:
        """Those that there are, each with its tokenizer."""
        most = self.config["max_text_tokens"]
        return [
            text_encoder_of(model, getattr(self, part.tokenizer), max_tokens=most)
            for part in TEXT_PARTS
            if (model := getattr(self, part.encoder)) is not None
        ]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int = 576,
        width: int = 1024,
        num_frames: int = 121,
        num_inference_steps: int = 50,
        guidance_scale: float = 8.0,
        guidance_rescale: float = 0.7,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        batched_guidance: bool = False,
        shift: float | None = None,
        use_dynamic_shifting: bool | None = None,
        use_linear_quadratic_schedule: bool = False,
        solver: Solver = "euler",
        num_videos_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        first_step: int = 0,
        previous_velocity: Tensor | None = None,
        prompt_embeds: PromptEmbeds | None = None,
        negative_prompt_embeds: PromptEmbeds | None = None,
        image: Picture | None = None,
        last_image: Picture | None = None,
        video: Clip | None = None,
        given_latents: GivenLatents | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> VideoOutput | tuple:
        """Make B = prompts x `num_videos_per_prompt` videos, or images with one frame.

        Args:
            prompt: one or several. Or `prompt_embeds`, encoded before.
            negative_prompt: added to the settings' default one; one for all, or one for each prompt. Or
                `negative_prompt_embeds`, likewise.
            height, width: pixels, multiples of 16.
            num_frames: 8k + 1.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance scale; 1 or less switches guidance off, at half the cost.
            guidance_rescale: 0 to 1. How far the guided velocity's standard deviation is moved to that of the
                conditional one.
            guidance_interval: part of the steps that use guidance, as fractions (start, end).
            batched_guidance: compute both branches in one batch, which needs more memory.
            shift, use_dynamic_shifting: timestep shift, instead of the scheduler's. Only for the default
                scheduler.
            use_linear_quadratic_schedule: use this schedule, which has no shift. Only for the default
                scheduler.
            solver: "euler", as in the original, or "adams", the two-step Adams-Bashforth method, which needs
                half the steps for the same accuracy. Only for the default scheduler.
            num_videos_per_prompt: videos of the first prompt come first.
            seed: of the first video, each further video adds 1; or one seed for each of the B. None: drawn
                from torch's global generator, and returned in the output.
            generator: instead of a seed, one generator for all or one for each of the B. Seeds draw noise on
                the CPU, so a seed gives the same video on every device; a generator draws on its own device.
            latents: noise [B, C, T, H, W] to start from, which also sets the size of the video.
            first_step: number of steps that `latents` have already gone through. Only for the default
                scheduler.
            previous_velocity: velocity of the step before `first_step`, for "adams".
            image, last_image: pictures that every video begins and ends with, cropped and resized to fit.
            video: 8k + 1 frames that every video goes on from, instead of `image`; they are its first ones.
            given_latents: those of such frames, if they have been encoded before.
            output_type: "pil", "np", "pt" or "latent", see `VideoOutput`; `iter_decode` decodes latents.
            callback_on_step_end: called with (pipeline, step, timestep, tensors) after each step, `step`
                counting from 0; or a callback of diffusers, such as SDCFGCutoffCallback. It may return a dict
                of tensors to use from the next step on: "latents", "prompt_embeds" [B, L, D] and
                "pooled_prompt_embeds" [B, P]. It may also set `pipeline._guidance_scale`, or end the call
                after this step with `pipeline._interrupt = True`.
            callback_on_step_end_tensor_inputs: which of these tensors a callback gets, and whether it gets
                "velocity", that of this step after guidance, which it cannot replace.
            return_dict: False returns the tuple (frames,) instead.

        Raises ValueError for bad arguments before any model runs, and for impossible results of a callback;
        NonFiniteLatentsError if the latents become NaN or infinite, FloatingPointError if decoded frames do.
        """
        self.is_decoding = False
        if latents is None:
            strides = RELEASE if self.vae is None else self.vae.strides
            grid = latent_shape(num_frames, height, width, strides=strides)
        else:
            grid = self._latent_grid(latents)
        given = self._fit_frames(grid, image=image, last_image=last_image, video=video)
        check_guidance(guidance_scale, guidance_rescale, guidance_interval)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if output_type != "latent" and self.vae is None:
            raise ValueError(
                f"this pipeline has no VAE, so output_type must be 'latent', got {output_type!r}"
            )
        if self.transformer is None:
            raise ValueError(
                "this pipeline has no transformer: it can only encode prompts and decode latents"
            )
        inputs = callback_inputs(
            callback_on_step_end, callback_on_step_end_tensor_inputs, known=self._callback_tensor_inputs
        )
        prompts = self._prompts(prompt, prompt_embeds)
        negatives = self._negative_prompts(negative_prompt, negative_prompt_embeds, count=len(prompts))
        if num_videos_per_prompt < 1:
            raise ValueError(f"num_videos_per_prompt must be at least 1, got {num_videos_per_prompt}")
        batch = len(prompts) * num_videos_per_prompt
        if latents is not None and latents.shape[0] != batch:
            raise ValueError(f"latents are for {latents.shape[0]} videos, the prompts for {batch}")
        if seed is not None and generator is not None:
            raise ValueError("give either seed or generator")
        seeds = make_seeds(batch, seed) if generator is None else None
        sources = make_generators(batch, seeds, generator)
        schedule = Schedule(
            num_inference_steps, shift, use_dynamic_shifting, use_linear_quadratic_schedule, solver
        )
        if previous_velocity is not None and (given_latents or given).last is not None:
            previous_velocity = F.pad(previous_velocity, (0, 0, 0, 0, 0, 1))  # see `_denoise`
        sampler = make_sampler(self.scheduler, schedule, grid, previous=previous_velocity, sources=sources)
        self._check_first_step(first_step, sampler, latents, previous_velocity)
        steps = len(sampler.timesteps)
        guided = range_of_steps(guidance_interval, steps)
        guided_at_first = guided if guidance_scale > 1 else range(0)
        self.transformer.check_cached_call(
            steps=steps,
            first_step=first_step,
            guided=guided_at_first,
            batched=batched_guidance,
        )
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, steps, False

        try:
            # 1. Given frames and text
            clean = (given_latents or self.encode_frames(given)).over(grid[0], batch=batch)
            texts = self._prepare_prompts(prompts)
            negative_texts = self._prepare_prompts(negatives, negative=True) if guided_at_first else None
            device, dtype = self._execution_device, self.transformer.dtype
            text = prompt_embeds if prompt_embeds is not None else self.encode_texts(texts)

            def encode_negative() -> Conditions:
                if negative_prompt_embeds is None:
                    given = negative_texts or self._prepare_prompts(negatives, negative=True)
                    negative = self.encode_texts(given)
                else:
                    negative = negative_prompt_embeds.repeat(
                        len(prompts) // negative_prompt_embeds.batch_size
                    )
                negative = negative.repeat(num_videos_per_prompt).trimmed()
                return Conditions(negative.to(device, dtype), *clean)

            text = text.repeat(num_videos_per_prompt).trimmed().to(device, dtype)
            positive = Conditions(text, *clean)
            branches = Branches(positive, encode_negative, guided=guided, batched=batched_guidance)

            # 2. Noise
            if latents is None:
                shape = (self.transformer.config["out_channels"], *grid)
                latents = torch.stack([draw(shape, source) for source in sources])
            latents = latents.to(device, torch.float32)

            # 3. Denoise
            call_back = None
            if callback_on_step_end is not None:
                call_back = partial(self._call_back, callback_on_step_end, inputs)
            latents = self._denoise(
                latents,
                sampler,
                branches,
                first_step=first_step,
                rescale=guidance_rescale,
                call_back=call_back,
            )

            # 4. Decode
            frames = latents if output_type == "latent" else self._to_output(latents, output_type)
        finally:
            self._current_timestep = None
            self.maybe_free_model_hooks()
        return VideoOutput(frames=frames, seeds=seeds) if return_dict else (frames,)

    def _denoise(
        self,
        latents: Tensor,
        sampler: Sampler,
        branches: Branches,
        *,
        first_step: int,
        rescale: float,
        call_back: Callable[..., Tensor] | None,
    ) -> Tensor:
        """Run the steps from `first_step` on. Returns latents [B, C, T, H, W] in fp32. A last frame that is
        given is one more latent frame behind these, until they are returned or a callback sees them.
        """
        steps, warned, given, frames = len(sampler.timesteps), False, branches.positive, latents.shape[2]
        latents = given.restore(given.extend(latents))
        planned: tuple[float, Conditions] | None = None
        calls: list[dict[str, Conditions]] = []
        vectors: list[dict[str, Modulation]] | None = None
        names: Collection[str] | None = None
        take_overflows(self.transformer.transformer_blocks)  # forget those of earlier calls
        with self.progress_bar(total=steps) as progress:  # type: ignore[call-issue]
            progress.update(first_step)
            for index in range(first_step, steps):
                scale, timestep = self._guidance_scale, sampler.timesteps[index]
                if planned != (scale, branches.positive):
                    planned = scale, branches.positive
                    calls = [branches.of(step, scale=scale) for step in range(steps)]
                    if is_kept_on_host(self.transformer):
                        vectors = self._modulations(sampler.timesteps, calls)
                before, names = names, calls[index].keys()
                if branches.batched and before not in (None, names) and self.transformer.is_cache_enabled:
                    self.transformer._reset_stateful_cache()  # some caches hold tensors of a larger batch
                self._current_timestep = timestep
                context = {"step_index": index, "num_inference_steps": steps}
                modulation = vectors[index] if vectors else None
                velocity = self._velocity(latents, timestep, calls[index], modulation, context)
                warned = warned or self._warn_of_overflow(index + 1, steps=steps)
                if branches.is_guided(index, scale=scale):
                    uncond, cond = velocity.chunk(2)
                    velocity = flow.guide(uncond, cond, scale, rescale, where=given.generated)
                stepped = given.restore(sampler.step(velocity, index, latents))
                if not torch.isfinite(stepped).all():
                    raise NonFiniteLatentsError(index + 1, steps=steps, last_good=latents[:, :, :frames])
                latents = stepped
                if call_back is not None:
                    seen = (tensor[:, :, :frames] for tensor in (latents, velocity))
                    latents = given.restore(given.extend(call_back(index, timestep, *seen, branches)))
                progress.update()
                if self._interrupt:
                    break
        return latents[:, :, :frames]

    def _call_back(
        self,
        callback: Callable[..., Mapping[str, Tensor] | None],
        names: Sequence[str],
        index: int,
        timestep: Tensor,
        latents: Tensor,
        velocity: Tensor,
        branches: Branches,
    ) -> Tensor:
        """Call a callback after a step with the tensors of these names. Returns the latents for the next
        step; other changes are made in `branches`.
        """
        text = branches.positive.text
        given = {
            "latents": latents,
            "velocity": velocity,
            "prompt_embeds": text.sequence,
            "pooled_prompt_embeds": text.pooled,
        }
        scale = self._guidance_scale
        changed = changed_tensors(
            given, callback(self, index, timestep, {name: given[name] for name in names})
        )
        if self._guidance_scale != scale:
            check_guidance(self._guidance_scale)
        sequence, pooled = changed.get("prompt_embeds"), changed.get("pooled_prompt_embeds")
        if sequence is not None or pooled is not None:
            branches.replace(sequence=sequence, pooled=pooled)
        return changed.get("latents", latents).to(latents)

    def _to_output(
        self, latents: Tensor, output_type: OutputType
    ) -> list[list[Image.Image]] | np.ndarray | Tensor:
        if output_type == "pil":
            chunks = [torch.stack([*map(to_uint8, pixels)]).cpu() for pixels in self._decode_pixels(latents)]
            return [[*map(Image.fromarray, video)] for video in torch.cat(chunks, dim=1).numpy()]
        frames = torch.cat(list(self.iter_decode(latents)), dim=2).transpose(1, 2)  # [B, T, 3, H, W]
        return frames if output_type == "pt" else frames.movedim(2, -1).numpy()

    def _velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        branches: dict[str, Conditions],
        modulation: dict[str, Modulation] | None,
        context: dict[str, int],
    ) -> Tensor:
        """Velocities of all branches [B, ...] in fp32, the unconditional one first. `context`: step and
        number of steps, for caches.
        """
        outputs = []
        sigma = float(timestep) / flow.TIMESTEP_SCALE
        for name, conditions in branches.items():
            batch = conditions.batch_size
            with self.transformer.cache_context(name, sigma=sigma, **context):
                velocity = denoise(
                    self.transformer,
                    latents.repeat(batch // len(latents), 1, 1, 1, 1),
                    timestep.to(latents.device).expand(batch),
                    conditions,
                    modulation=modulation[name] if modulation else None,
                )
            outputs.append(velocity)
        return torch.cat(outputs)

    def _warn_of_overflow(self, step: int, *, steps: int) -> bool:
        """Warn if values in this step, counted from 1, were clipped to the range of fp16. Returns whether."""
        blocks = take_overflows(self.transformer.transformer_blocks)
        if blocks:
            logger.warning(
                "values were clipped to the range of fp16 (65504) in block %s in step %d of %d: "
                "the video may be worse for it; dtype bf16 has no such limit",
                ", ".join(map(str, blocks)),
                step,
                steps,
            )
        return bool(blocks)

    def _modulations(
        self, timesteps: Tensor, calls: Sequence[dict[str, Conditions]]
    ) -> list[dict[str, Modulation]]:
        """Modulation of each branch in each step. Computed for all steps even when resuming, so that a
        resumed video has the same bits as one that was not stopped.
        """
        conditions = [
            (frame_timesteps(timestep.expand(branch.batch_size), branch.given), branch.text.pooled)
            for timestep, branches in zip(timesteps, calls, strict=True)
            for branch in branches.values()
        ]
        made = iter(modulations(self.transformer, conditions, device=self._execution_device))
        return [{name: next(made) for name in branches} for branches in calls]

    @property
    def has_default_scheduler(self) -> bool:
        """Whether our own samplers are used, see `is_default_scheduler`."""
        return is_default_scheduler(self.scheduler)

    def _check_first_step(
        self, first_step: int, sampler: Sampler, latents: Tensor | None, previous: Tensor | None
    ) -> None:
        steps = len(sampler.timesteps)
        if not 0 <= first_step < steps:
            raise ValueError(f"first_step must be 0 to {steps - 1}, got {first_step}")
        if first_step and latents is None:
            raise ValueError(f"first_step {first_step} needs the latents after {first_step} steps")
        if previous is not None and not first_step:
            raise ValueError("previous_velocity needs first_step")
        if first_step and not self.has_default_scheduler:
            name = type(self.scheduler).__name__
            raise ValueError(f"a {name} may depend on earlier steps: it cannot start at step {first_step}")

    def _latent_grid(self, latents: Tensor) -> tuple[int, int, int]:
        channels, patch = self.transformer.config["out_channels"], self.transformer.config["patch_size"]
        if (
            latents.ndim != 5
            or latents.shape[1] != channels
            or any(side % patch for side in latents.shape[3:])
        ):
            raise ValueError(
                f"latents must be [B, {channels}, T, H, W] with H and W multiples of {patch}, "
                f"got {list(latents.shape)}"
            )
        frames, height, width = latents.shape[2:]
        return frames, height, width

    def _prompts(self, prompt: str | Sequence[str] | None, embeds: PromptEmbeds | None) -> list[str]:
        """The prompts, one string each (empty ones for `embeds`)."""
        if (prompt is None) == (embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        if embeds is not None:
            self._check_embeds(embeds, "prompt_embeds")
            return [""] * embeds.batch_size
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if not prompts:
            raise ValueError("the list of prompts is empty")
        check_texts(prompts, name="prompt")
        return prompts

    def _negative_prompts(
        self, prompt: str | Sequence[str] | None, embeds: PromptEmbeds | None, *, count: int
    ) -> list[str]:
        """One negative prompt for each of `count` prompts (empty ones for `embeds`)."""
        if prompt is not None and embeds is not None:
            raise ValueError("give either negative_prompt or negative_prompt_embeds")
        if embeds is not None:
            self._check_embeds(embeds, "negative_prompt_embeds")
            if embeds.batch_size not in (1, count):
                raise ValueError(
                    f"{embeds.batch_size} negative_prompt_embeds for {count} prompts: "
                    "give one, or one for each"
                )
            return [""] * count
        negatives = repeat_texts(prompt, count)
        check_texts(negatives, name="negative_prompt")
        return negatives

    def _check_embeds(self, embeds: PromptEmbeds, name: str) -> None:
        if wrong := wrong_features(self.transformer.config, embeds.shapes, have=f"{name} have"):
            raise ValueError("; ".join(wrong))
