"""The pipeline: the original's sampling runs, one seed one video, guidance, schedules, and its errors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from safetensors.torch import load_file
from tiny_models import DENOISER, VAE
from torch import Tensor

from opensoraplan import flow
from opensoraplan.models.prompts import PromptSettings
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.models.wfvae import WFVAE
from opensoraplan.pipeline import (
    NonFiniteLatentsError,
    OpenSoraPlanPipeline,
    VideoOutput,
)
from opensoraplan.pipeline_inputs import range_of_steps
from opensoraplan.samplers import make_scheduler

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parent / "golden"
SAMPLING: dict[str, Any] = json.loads((GOLDEN / "sampling/config.json").read_text())

# Videos that are to be the same are computed in batches of different sizes, so they differ by rounding.
SAME = 1e-5

SCALED_VAE = {**VAE, "shift": [0.1, -0.2, 0.3, 0.0], "scale": [1.5, 0.8, 1.0, 1.2]}

SMALL: dict[str, Any] = {
    "num_frames": 9,
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
    "output_type": "latent",
}


def distance(a: Tensor, b: Tensor) -> float:
    """Of `a` from `b`, relative to the size of `b`."""
    return float((a - b).norm() / b.norm())


def embeds(*lengths: int, seed: int = 0) -> PromptEmbeds:
    """Random embeddings of one prompt for each length, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        PromptEmbeds(
            torch.randn(1, length, 24, generator=generator),
            torch.ones(1, length, dtype=torch.bool),
            torch.randn(1, 20, generator=generator),
        )
        for length in lengths
    ]
    return PromptEmbeds.cat(parts)


POSITIVE, NEGATIVE = embeds(7), embeds(11, seed=1)


def build(
    scheduler: SchedulerMixin | None = None, *, changes: dict[str, Any] | None = None
) -> OpenSoraPlanPipeline:
    """A pipeline of random models, without text encoders."""
    torch.manual_seed(0)
    transformer = SparseUMMDiT(**DENOISER | (changes or {})).eval()
    vae = WFVAE(**SCALED_VAE).eval()
    made = OpenSoraPlanPipeline(transformer, vae, None, None, None, None, scheduler or make_scheduler())
    made.set_progress_bar_config(disable=True)
    return made


def run(pipeline: OpenSoraPlanPipeline, **options: Any) -> Any:  # noqa: ANN401
    """The frames of a small run; latents unless another type is asked for."""
    settings = dict(SMALL)
    if "generator" not in options:
        settings["seed"] = 0
    if "prompt" not in options:
        settings["prompt_embeds"] = POSITIVE
        if "negative_prompt" not in options:
            settings["negative_prompt_embeds"] = NEGATIVE
    output = pipeline(**settings | options)
    return output.frames if isinstance(output, VideoOutput) else output[0]


@pytest.fixture
def pipeline() -> OpenSoraPlanPipeline:
    return build()


@pytest.fixture(scope="module")
def texts(tiny_model: Path) -> OpenSoraPlanPipeline:
    """The tiny release with its text encoders. Read it only."""
    loaded = OpenSoraPlanPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


class Calls:
    """Counts the batches that a denoiser is called with."""

    def __init__(self, pipeline: OpenSoraPlanPipeline) -> None:
        self.batches: list[int] = []
        pipeline.transformer.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _module: torch.nn.Module, _args: tuple, options: dict[str, Any]) -> None:
        self.batches.append(len(options["hidden_states"]))


# --- The original -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original() -> OpenSoraPlanPipeline:
    def config(name: str) -> dict[str, Any]:
        return json.loads((GOLDEN / name / "config.json").read_text())

    transformer = SparseUMMDiT.from_original(
        config("suv_sparse"), load_file(GOLDEN / "suv_sparse/weights.safetensors")
    )
    statistics = {key: SAMPLING[key] for key in ("shift", "scale")}
    vae = WFVAE.from_original(config("wfvae") | statistics, load_file(GOLDEN / "wfvae/weights.safetensors"))
    made = OpenSoraPlanPipeline(transformer.eval(), vae.eval(), None, None, None, None, make_scheduler())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("batched", [False, True], ids=["sequential", "batched"])
@pytest.mark.parametrize("number", range(3))
def test_runs_of_the_original(original: OpenSoraPlanPipeline, number: int, batched: bool) -> None:
    given = load_file(GOLDEN / "sampling/inputs.safetensors")
    wanted = load_file(GOLDEN / "sampling/outputs.safetensors")

    def prompt(prefix: str) -> PromptEmbeds:
        names = (f"{prefix}prompt_embeds", f"{prefix}prompt_mask", f"{prefix}pooled")
        sequence, mask, pooled = (given[name] for name in names)
        return PromptEmbeds(sequence, mask.bool(), pooled)

    latents = run(
        original,
        prompt_embeds=prompt(""),
        negative_prompt_embeds=prompt("negative_"),
        latents=given["latents"],
        batched_guidance=batched,
        **SAMPLING["runs"][number],
    )
    assert distance(latents, wanted[f"latents_{number}"]) < 1e-4
    if number == 0 and not batched:
        frames = (torch.cat(list(original.iter_decode(latents)), dim=2) * 255).round()
        frames = frames.permute(0, 2, 3, 4, 1)  # [B, T, H, W, 3]
        assert (frames - wanted["frames_0"].float()).abs().max() <= 1


# --- One seed, one video ------------------------------------------------------------------------------------


def test_a_batch_equals_single_runs(texts: OpenSoraPlanPipeline) -> None:
    prompts = ["a red ball", "a drone view of waves crashing against the cliffs along the beach"]
    negatives = ["rain", "the beach while rain is falling"]
    both = run(texts, prompt=prompts, negative_prompt=negatives, seed=[5, 9])
    for index, (prompt, negative, seed) in enumerate(zip(prompts, negatives, (5, 9), strict=True)):
        alone = run(texts, prompt=prompt, negative_prompt=negative, seed=seed)
        assert distance(both[index : index + 1], alone) < SAME
    assert distance(both[:1], both[1:]) > 0.1


def test_batched_guidance_equals_sequential() -> None:
    pipeline = build()
    prompts, negatives = embeds(3, 8), embeds(13, 2, seed=1)
    options = {"prompt_embeds": prompts, "negative_prompt_embeds": negatives}
    one_by_one = run(pipeline, **options)
    calls = Calls(pipeline)
    together = run(pipeline, **options, batched_guidance=True)
    assert distance(together, one_by_one) < SAME
    assert calls.batches == [4, 4]


def test_seeds_count_on_over_all_videos(pipeline: OpenSoraPlanPipeline) -> None:
    four = run(pipeline, prompt_embeds=embeds(3, 8), num_videos_per_prompt=2, seed=4)
    second_of_first = run(pipeline, prompt_embeds=embeds(3, 8).select([0]), seed=5)
    first_of_second = run(pipeline, prompt_embeds=embeds(3, 8).select([1]), seed=6)
    assert distance(four[1:2], second_of_first) < SAME
    assert distance(four[2:3], first_of_second) < SAME


def test_a_generator_is_a_seed(pipeline: OpenSoraPlanPipeline) -> None:
    by_seed = run(pipeline, prompt_embeds=embeds(3, 8), seed=4)
    generators = [torch.Generator().manual_seed(4), torch.Generator().manual_seed(5)]
    assert torch.equal(run(pipeline, prompt_embeds=embeds(3, 8), generator=generators), by_seed)
    one = torch.Generator().manual_seed(4)
    from_one = run(pipeline, prompt_embeds=embeds(3, 8), generator=one)
    assert torch.equal(from_one[0], by_seed[0])
    assert not torch.equal(from_one[1], by_seed[1])


def test_without_a_seed_videos_differ(pipeline: OpenSoraPlanPipeline) -> None:
    first, second = (run(pipeline, num_inference_steps=1, seed=None) for _ in range(2))
    assert not torch.equal(first, second)


def test_latents_are_the_noise_and_the_size(pipeline: OpenSoraPlanPipeline) -> None:
    noise = torch.randn((4, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    sizes = {"num_frames": 121, "height": 576, "width": 1024}
    assert torch.equal(run(pipeline, latents=noise[None], **sizes), run(pipeline, seed=0))


# --- Guidance -----------------------------------------------------------------------------------------------


def test_guidance_of_one_is_the_conditional_branch_alone(pipeline: OpenSoraPlanPipeline) -> None:
    calls = Calls(pipeline)
    alone = run(pipeline, guidance_scale=1.0, negative_prompt_embeds=None)
    assert calls.batches == [1, 1]
    assert torch.equal(alone, run(pipeline, guidance_scale=1.0))
    assert distance(alone, run(pipeline, guidance_scale=1.5)) > 1e-3


def test_guidance_interval(pipeline: OpenSoraPlanPipeline) -> None:
    steps = {"num_inference_steps": 4}
    calls = Calls(pipeline)
    half = run(pipeline, guidance_interval=(0.25, 0.75), **steps)
    assert len(calls.batches) == 6
    whole = run(pipeline, **steps)
    none = run(pipeline, guidance_scale=1.0, **steps)
    assert min(distance(half, whole), distance(half, none)) > 1e-3
    assert torch.equal(run(pipeline, guidance_interval=(0.5, 0.5), **steps), none)


@pytest.mark.parametrize(
    ("interval", "steps"),
    [
        ((0, 1), [0, 1, 2, 3, 4]),
        ((0.2, 0.8), [1, 2, 3]),
        ((0.4, 0.4), []),
        ((0.3, 1), [2, 3, 4]),
        ((0, 0.05), []),
    ],
)
def test_range_of_steps(interval: tuple[float, float], steps: list[int]) -> None:
    assert list(range_of_steps(interval, 5)) == steps


def test_rescale_keeps_the_spread(pipeline: OpenSoraPlanPipeline) -> None:
    """With rescale 1 the first step moves the latents as far as the conditional velocity does."""
    noise = run(pipeline, num_inference_steps=1, guidance_scale=1.0)
    moves: dict[float, Tensor] = {}
    for rescale in (0.0, 1.0):
        seen: dict[str, Tensor] = {}

        def keep(_pipe: Any, _step: int, _timestep: Tensor, tensors: dict, into: dict = seen) -> dict:  # noqa: ANN401
            into.update(tensors)
            return {}

        run(
            pipeline,
            num_inference_steps=1,
            guidance_rescale=rescale,
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=("velocity",),
        )
        moves[rescale] = seen["velocity"]
    start = torch.randn((4, 2, 4, 4), generator=torch.Generator().manual_seed(0))[None]
    conditional = start - noise  # the only step goes from sigma 1 to 0
    assert torch.isclose(moves[1.0].std(), conditional.std(), rtol=1e-4)
    assert moves[0.0].std() > 1.05 * conditional.std()


def test_one_negative_prompt_serves_all(pipeline: OpenSoraPlanPipeline) -> None:
    for_each = PromptEmbeds.cat([NEGATIVE, NEGATIVE])
    shared = run(pipeline, prompt_embeds=embeds(3, 8), negative_prompt_embeds=NEGATIVE)
    assert torch.equal(shared, run(pipeline, prompt_embeds=embeds(3, 8), negative_prompt_embeds=for_each))


def test_prompts_follow_the_settings(texts: OpenSoraPlanPipeline) -> None:
    plain = OpenSoraPlanPipeline(
        **texts.components, prompt_template=None, default_negative_prompt="", clean_prompts=False
    )
    default = PromptSettings()
    prompt, wrapped = (
        texts.encode_prompts(["Two  cats"]),
        plain.encode_prompts([default.positive("Two  cats")]),
    )
    assert torch.equal(prompt.sequence, wrapped.sequence)
    assert not torch.equal(prompt.pooled, plain.encode_prompts(["Two  cats"]).pooled)
    negative = texts.encode_prompts(["rain"], negative=True)
    assert torch.equal(negative.sequence, plain.encode_prompts([default.negative("rain")]).sequence)
    assert torch.equal(
        plain.encode_prompts(["rain"], negative=True).pooled, plain.encode_prompts(["rain"]).pooled
    )


def test_words_that_cleaning_removes_are_said_once_before_any_model_runs(
    texts: OpenSoraPlanPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = ["a cat 1920x1080", "a cat 1920x1080", "a dog"]
    texts.encode_prompts(prompts)
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "cleaning removes 1920x1080 from the prompt 'a cat 1920x1080'"
    ]
    caplog.clear()
    texts.register_to_config(keep_chinese=True)
    texts.encode_prompts(["一只猫 a cat 🎉 🎉"])
    assert caplog.messages == ["T5 has no tokens for 一只猫, 🎉: it only sees that they are unknown"]
    texts.register_to_config(keep_chinese=False)
    calls: list[object] = []
    handle = texts.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        for given in ({"prompt": "一只猫"}, {"prompt": "a cat", "negative_prompt": "低质量"}):
            with pytest.raises(ValueError, match="cleaning leaves nothing of the"):
                texts(**given, height=32, width=32, num_frames=9)
    finally:
        handle.remove()
    assert not calls


# --- Schedules ----------------------------------------------------------------------------------------------


def sigmas_of(pipeline: OpenSoraPlanPipeline, **options: Any) -> Tensor:  # noqa: ANN401
    """Sigmas at the start of each step, as the denoiser is told."""
    timesteps: list[float] = []

    def see(_module: torch.nn.Module, _args: tuple, given: dict[str, Any]) -> None:
        timesteps.append(float(given["timestep"][0]))

    handle = pipeline.transformer.register_forward_pre_hook(see, with_kwargs=True)
    run(pipeline, guidance_scale=1.0, **options)
    handle.remove()
    return torch.tensor(timesteps) / 1000


def test_schedules(pipeline: OpenSoraPlanPipeline) -> None:
    steps = {"num_inference_steps": 4}
    wanted = {
        "default": flow.sampling_sigmas(4, 7.0),
        "shift": flow.sampling_sigmas(4, 3.0),
        "dynamic": flow.sampling_sigmas(4, flow.dynamic_shift(4, 4)),
        "quadratic": flow.linear_quadratic_sigmas(4),
    }
    got = {
        "default": sigmas_of(pipeline, **steps),
        "shift": sigmas_of(pipeline, shift=3.0, **steps),
        "dynamic": sigmas_of(pipeline, use_dynamic_shifting=True, **steps),
        "quadratic": sigmas_of(pipeline, use_linear_quadratic_schedule=True, **steps),
    }
    for name, sigmas in wanted.items():
        assert torch.allclose(got[name], sigmas[:-1]), name


def test_a_call_overrides_a_dynamic_scheduler() -> None:
    pipeline = build(make_scheduler(shift=5.0, use_dynamic_shifting=True))
    steps = {"num_inference_steps": 3}
    dynamic = flow.sampling_sigmas(3, flow.dynamic_shift(4, 4))[:-1]
    assert torch.allclose(sigmas_of(pipeline, **steps), dynamic)
    assert torch.allclose(sigmas_of(pipeline, shift=2.0, **steps), flow.sampling_sigmas(3, 2.0)[:-1])
    static = sigmas_of(pipeline, use_dynamic_shifting=False, **steps)
    assert torch.allclose(static, flow.sampling_sigmas(3, 5.0)[:-1])


class SteppingEuler(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler, given the original's sigmas before their shift."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:  # noqa: ANN401
        sigmas = np.linspace(1, 0, num_inference_steps + 1)[:-1]
        super().set_timesteps(sigmas=sigmas.tolist(), device=device)


def test_diffusers_euler_steps_as_ours_does() -> None:
    ours = run(build(), num_inference_steps=4)
    theirs = run(build(SteppingEuler(shift=7.0)), num_inference_steps=4)
    assert distance(theirs, ours) < SAME


def test_adams_steps_from_two_velocities() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(_pipeline: object, _step: int, _timestep: object, tensors: dict[str, Tensor]) -> None:
        seen.append((tensors["latents"], tensors["velocity"]))

    last = run(
        build(),
        num_inference_steps=5,
        solver="adams",
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=("latents", "velocity"),
    )
    sigmas = flow.sampling_sigmas(5, 7.0)
    for step in range(1, 5):
        (latents, previous), (after, velocity) = seen[step - 1], seen[step]
        before, now, following = sigmas[step - 1 : step + 2]
        expected = flow.adams_step(
            latents, velocity, now, following, previous=previous, previous_sigma=before
        )
        assert torch.equal(after, expected)
    assert torch.equal(last, seen[-1][0])


FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


# diffusers' DPM makes an array of a tensor in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
@pytest.mark.parametrize(
    ("scheduler", "apart"),
    [
        (FlowMatchHeunDiscreteScheduler(shift=3.0), 0.2),
        (UniPCMultistepScheduler(**FLOW), 0.05),
        (DPMSolverMultistepScheduler(**FLOW), 0.05),
    ],
    ids=["heun", "unipc", "dpm"],
)
def test_another_flow_scheduler(scheduler: SchedulerMixin, apart: float) -> None:
    """Each solves the same equation, so that all end near where Euler does, and none exactly there."""
    pipeline = build(scheduler)
    unguided = {"num_inference_steps": 6, "guidance_scale": 1.0}
    theirs = run(pipeline, **unguided)
    euler = run(build(make_scheduler(shift=3.0)), **unguided)
    assert 1e-5 < distance(theirs, euler) < apart
    assert torch.equal(run(pipeline, **unguided), theirs)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_a_scheduler_that_draws_noise_follows_the_seed() -> None:
    pipeline = build(DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"))
    prompts = embeds(3, 8)
    both = run(pipeline, prompt_embeds=prompts, num_inference_steps=3, guidance_scale=1.0, seed=2)
    torch.manual_seed(123)
    second = run(
        pipeline, prompt_embeds=prompts.select([1]), num_inference_steps=3, guidance_scale=1.0, seed=3
    )
    assert distance(both[1:], second) < SAME


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (DDIMScheduler(), {}, "DDIMScheduler has prediction_type 'epsilon'"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), {}, "use_flow_sigmas=True"),
        (
            FlowMatchHeunDiscreteScheduler(),
            {"shift": 3.0},
            "FlowMatchHeunDiscreteScheduler sets shift, schedule and solver",
        ),
        (FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), {}, "leave out use_karras_sigmas=True"),
    ],
    ids=["not flow", "no flow sigmas", "shift", "unread option"],
)
def test_schedulers_that_would_be_misread(scheduler: SchedulerMixin, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(build(scheduler), **options)


# --- Callbacks, outputs -------------------------------------------------------------------------------------


def test_a_callback_reads_replaces_and_stops(pipeline: OpenSoraPlanPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def stop_at_zero(pipe: OpenSoraPlanPipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        assert list(tensors) == ["latents"]
        seen.append((step, float(timestep)))
        if step == 1:
            pipe._interrupt = True
            return {"latents": torch.zeros_like(tensors["latents"], dtype=torch.bfloat16)}
        return {}

    latents = run(pipeline, num_inference_steps=4, callback_on_step_end=stop_at_zero)
    assert seen == [(0, 1000.0), (1, pytest.approx(1000 * float(flow.sampling_sigmas(4, 7.0)[1])))]
    assert torch.equal(latents, torch.zeros(1, 4, 2, 4, 4))
    # The next run starts afresh.
    assert run(pipeline, num_inference_steps=1).norm() > 1


def test_a_callback_may_return_nothing(pipeline: OpenSoraPlanPipeline) -> None:
    watched = run(pipeline, callback_on_step_end=lambda *_: None)
    assert torch.equal(watched, run(pipeline))


def test_output_types(pipeline: OpenSoraPlanPipeline) -> None:
    latents = run(pipeline)
    assert latents.shape == (1, 4, 2, 4, 4)
    tensor = run(pipeline, output_type="pt")
    assert tensor.shape == (1, 9, 3, 32, 32)
    assert tensor.dtype == torch.float32
    assert 0 <= tensor.min() < tensor.max() <= 1
    assert torch.equal(torch.cat(list(pipeline.iter_decode(latents)), dim=2).transpose(1, 2), tensor)
    array = run(pipeline, output_type="np")
    assert isinstance(array, np.ndarray)
    assert np.array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    ((first, *_),) = pictures = run(pipeline, output_type="pil", return_dict=False)
    assert [len(video) for video in pictures] == [9]
    assert isinstance(first, Image.Image)
    assert np.array_equal(np.asarray(first), (array[0, 0] * 255).round())


def test_images(pipeline: OpenSoraPlanPipeline) -> None:
    pictures = run(pipeline, num_frames=1, height=32, width=48, output_type="pil", num_videos_per_prompt=2)
    assert [[picture.size for picture in video] for video in pictures] == [[(48, 32)], [(48, 32)]]


# --- Precision, NaN -----------------------------------------------------------------------------------------


def test_bf16(pipeline: OpenSoraPlanPipeline) -> None:
    exact = run(pipeline)
    frames = run(pipeline.to(torch.bfloat16), output_type="pt")
    assert frames.dtype == torch.float32
    assert torch.isfinite(frames).all()
    rounded = run(pipeline)
    assert rounded.dtype == torch.float32
    assert 0 < distance(rounded, exact) < 0.05


def test_nan_latents_stop_the_run(pipeline: OpenSoraPlanPipeline) -> None:
    after_two = run(
        pipeline,
        num_inference_steps=4,
        guidance_scale=1.0,
        callback_on_step_end=lambda pipe, step, _timestep, _tensors: setattr(pipe, "_interrupt", step == 1),
    )

    def poison(pipe: OpenSoraPlanPipeline, step: int, _timestep: Tensor, _tensors: dict) -> None:
        if step == 1:
            torch.nn.init.constant_(pipe.transformer.proj_out.bias, float("nan"))

    with pytest.raises(NonFiniteLatentsError, match="after step 3 of 4: try dtype") as caught:
        run(pipeline, num_inference_steps=4, guidance_scale=1.0, callback_on_step_end=poison)
    assert caught.value.step == 3
    assert torch.equal(caught.value.last_good, after_two)


def test_an_overflow_in_fp16_is_told_once(
    pipeline: OpenSoraPlanPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.transformer.half()
    run(pipeline, num_inference_steps=2)
    assert not caplog.messages

    def overflow(pipe: OpenSoraPlanPipeline, _step: int, _timestep: Tensor, _tensors: dict) -> None:
        torch.nn.init.constant_(pipe.transformer.transformer_blocks[4].skip.linear.bias, 65504)
        torch.nn.init.constant_(pipe.transformer.transformer_blocks[4].attn1.to_out[0].bias, 65504)
        torch.nn.init.constant_(pipe.transformer.transformer_blocks[4].norm1.linear.bias, 2)

    run(pipeline, num_inference_steps=4, callback_on_step_end=overflow)
    (message,) = caplog.messages
    assert "in block 4" in message
    assert "in step 2 of 4" in message


def test_nan_frames_are_an_error(pipeline: OpenSoraPlanPipeline) -> None:
    torch.nn.init.constant_(next(iter(pipeline.vae.decoder.parameters())), float("nan"))
    with pytest.raises(FloatingPointError, match=r"decoded frames are not finite in torch\.float32"):
        run(pipeline, num_inference_steps=1, guidance_scale=1.0, output_type="pt")


# --- Files, offloading --------------------------------------------------------------------------------------


def test_round_trip(texts: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    settings = {
        "prompt_template": "a film of {}",
        "default_negative_prompt": "blurry",
        "clean_prompts": False,
        "keep_chinese": True,
        "max_text_tokens": 32,
    }
    parts = texts.components | {"scheduler": make_scheduler(shift=3.0)}
    saved = OpenSoraPlanPipeline(**parts, **settings)
    saved.save_pretrained(tmp_path)
    loaded = OpenSoraPlanPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        before, after = (getattr(made, name).state_dict() for made in (saved, loaded))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    assert {key: loaded.config[key] for key in settings} == settings
    assert loaded.prompt_settings == saved.prompt_settings
    assert loaded.scheduler.config["shift"] == 3.0
    options = {"prompt": "a red ball", "num_inference_steps": 1}
    assert torch.equal(run(loaded, **options), run(saved, **options))


def test_a_swapped_scheduler_is_saved(texts: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    models = {"transformer": texts.transformer, "vae": texts.vae}
    swapped = OpenSoraPlanPipeline(**models, **parts, scheduler=UniPCMultistepScheduler(**FLOW))
    swapped.save_pretrained(tmp_path)
    loaded = OpenSoraPlanPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, UniPCMultistepScheduler)
    assert loaded.text_encoder is None
    with pytest.raises(
        ValueError, match="no text encoder that gives sequence and pooled: give prompt_embeds"
    ):
        run(loaded, prompt="a red ball")


def test_models_are_offloaded_in_the_order_of_use(texts: OpenSoraPlanPipeline) -> None:
    order = OpenSoraPlanPipeline.model_cpu_offload_seq.split("->")
    models = {name for name, part in texts.components.items() if isinstance(part, torch.nn.Module)}
    assert order == ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert set(order) == models


def test_cpu_offload_runs(pipeline: OpenSoraPlanPipeline) -> None:
    before = run(pipeline, output_type="pt")
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(run(pipeline, output_type="pt"), before)


def test_a_vae_whose_layers_are_offloaded_decodes(pipeline: OpenSoraPlanPipeline) -> None:
    """As sequential offloading leaves it: weights are on the device only while a layer computes."""
    before = run(pipeline, num_inference_steps=1, output_type="pt")
    cpu_offload(pipeline.vae, execution_device="cpu")
    try:
        assert pipeline.vae.decoder.conv_in.conv.weight.is_meta
        close = torch.isclose(run(pipeline, num_inference_steps=1, output_type="pt"), before, atol=1e-5)
        assert close.all()
    finally:
        remove_hook_from_module(pipeline.vae, recurse=True)


def test_decoding_wakes_an_offloaded_vae(pipeline: OpenSoraPlanPipeline) -> None:
    """Offloading moves a model to the accelerator when its hook's `pre_forward` is called."""

    class Waking(ModelHook):
        woken = 0

        def pre_forward(self, module: torch.nn.Module) -> tuple[tuple, dict]:
            assert module is pipeline.vae
            self.woken += 1
            return (), {}

    hook = Waking()
    add_hook_to_module(pipeline.vae, hook)
    run(pipeline, num_inference_steps=1, output_type="pt")
    remove_hook_from_module(pipeline.vae)
    assert hook.woken == 1


# --- Mistakes -----------------------------------------------------------------------------------------------

BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "frames": ({"num_frames": 10}, "got 10: use 9 or 17"),
    "height": ({"height": 100}, "got height 100: the nearest valid size is 96 x 32"),
    "no prompt": ({"prompt_embeds": None, "negative_prompt_embeds": None}, "either prompt or prompt_embeds"),
    "two prompts": ({"prompt": "a", "prompt_embeds": POSITIVE}, "either prompt or prompt_embeds"),
    "empty list": ({"prompt": []}, "list of prompts is empty"),
    "no text": ({"prompt": ["a", 3]}, "prompt must be a string or a list of strings, got 3"),
    "negative count": ({"prompt": "a", "negative_prompt": ["b", "c"]}, "2 negative prompts for 1 prompts"),
    "both negatives": (
        {"negative_prompt": "b", "negative_prompt_embeds": NEGATIVE},
        "either negative_prompt or negative_prompt_embeds",
    ),
    "negative embeds": ({"negative_prompt_embeds": embeds(2, 3)}, "2 negative_prompt_embeds for 1 prompts"),
    "width of embeds": (
        {"prompt_embeds": PromptEmbeds(torch.ones(1, 2, 8), torch.ones(1, 2).bool(), torch.ones(1, 20))},
        r"prompt_embeds have sequence \[tokens, 8\], .* needs \[tokens, 24\] \(caption_channels\)$",
    ),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
    "odd quadratic": (
        {"num_inference_steps": 3, "use_linear_quadratic_schedule": True},
        "even number of steps, got 3: use 4",
    ),
    "quadratic shift": (
        {"use_linear_quadratic_schedule": True, "shift": 3.0},
        "linear-quadratic schedule has no shift",
    ),
    "two shifts": ({"use_dynamic_shifting": True, "shift": 3.0}, "either shift 3.0 or the dynamic shift"),
    "shift": ({"shift": 0.0}, "shift must be greater than 0, got 0.0"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale must be at least 0 .*, got nan"),
    "rescale": ({"guidance_rescale": 7.0}, "guidance_rescale must be from 0 to 1, got 7.0"),
    "interval": ({"guidance_interval": (0.8, 0.2)}, r"0 <= start <= end <= 1, got \(0.8, 0.2\)"),
    "output": ({"output_type": "mp4"}, "output_type must be one of pil, np, pt, latent, got 'mp4'"),
    "videos": ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be at least 1, got 0"),
    "seeds": ({"seed": [1, 2, 3]}, "3 seeds for 1 videos"),
    "negative seed": ({"seed": -1}, "a seed must be from 0 to 9223372036854775807, got -1"),
    "generators": ({"generator": [torch.Generator()] * 2}, "2 generators for 1 videos"),
    "seed and generator": ({"seed": 1, "generator": torch.Generator()}, "either seed or generator"),
    "latents": ({"latents": torch.zeros(1, 5, 2, 4, 4)}, r"latents must be \[B, 4, T, H, W\]"),
    "odd latents": ({"latents": torch.zeros(1, 4, 2, 3, 4)}, "H and W multiples of 2"),
    "number of latents": (
        {"latents": torch.zeros(2, 4, 2, 4, 4)},
        "for 2 videos, the prompts for 1",
    ),
    "callback": (
        {"callback_on_step_end_tensor_inputs": ("noise",)},
        "can have latents, .*; not noise",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls(options: dict[str, Any], message: str, texts: OpenSoraPlanPipeline) -> None:
    called: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    models = {"transformer": texts.transformer, "text_encoder": texts.text_encoder, "vae": texts.vae.decoder}
    handles = [module.register_forward_pre_hook(note(name)) for name, module in models.items()]
    try:
        with pytest.raises(ValueError, match=message):
            run(texts, **options)
    finally:
        for handle in handles:
            handle.remove()
    assert called == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 6}, r"needs 6 channels \(in_channels\), but the VAE's latents have 4"),
        ({"out_channels": 8}, r"needs 8 channels \(out_channels\), but the VAE's latents have 4"),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(changes=changes)


def test_a_denoiser_of_more_than_latents_is_refused_without_a_vae() -> None:
    pipeline = build(changes={})
    parts: dict[str, Any] = {**pipeline.components, "vae": None}
    OpenSoraPlanPipeline(**parts)
    wider = SparseUMMDiT(**DENOISER | {"in_channels": 9})
    with pytest.raises(ValueError, match=r"needs 9 channels \(in_channels\), but its velocity has 4"):
        OpenSoraPlanPipeline(**parts | {"transformer": wider})


@pytest.mark.parametrize(
    ("key", "gives"),
    [("caption_channels", r"sequence \[tokens, 24\]"), ("pooled_projection_dim", r"pooled \[20\]")],
)
def test_text_encoders_that_do_not_fit(texts: OpenSoraPlanPipeline, key: str, gives: str) -> None:
    changes: dict[str, Any] = {key: 32}
    wider = SparseUMMDiT(**DENOISER | changes)
    parts: dict[str, Any] = texts.components | {"transformer": wider}
    with pytest.raises(ValueError, match=rf"give {gives}, .* needs .*32\] \({key}\)$"):
        OpenSoraPlanPipeline(**parts)


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("model_index.json", '{"_class_name": "OpenSoraPlanPipeline", "vae": 3}', "vae: "),
        ("scheduler/scheduler_config.json", '{"shift": -1}', "shift: .*greater than 0"),
        ("text_encoder_2/config.json", '{"a": NaN', "not valid JSON"),
        ("vae/config.json", "[]", "must hold one JSON object"),
    ],
)
def test_damaged_files_of_a_folder_are_named_in_python(
    tiny_model: Path, tmp_path: Path, file: str, text: str, fault: str
) -> None:
    """As by the command."""
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / file).write_text(text)
    with pytest.raises(ValueError, match=fault) as error:
        OpenSoraPlanPipeline.from_pretrained(tmp_path / "model")
    assert str(tmp_path / "model" / file) in str(error.value)
