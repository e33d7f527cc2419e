"""The pipeline as one of diffusers: output, properties, callbacks, caches, schedulers; what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import callbacks
from diffusers.hooks.faster_cache import FasterCacheConfig
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig
from diffusers.hooks.sea_cache import SeaCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from diffusers.hooks.text_kv_cache import TextKVCacheConfig
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
from diffusers.schedulers.scheduling_ipndm import IPNDMScheduler
from diffusers.schedulers.scheduling_repaint import RePaintScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from tiny_models import align
from torch import Tensor

from opensoraplan.defaults import GenerateDefaults
from opensoraplan.models.sparse_ummdit import SparseUMMDiTBlock
from opensoraplan.pipeline import OpenSoraPlanPipeline, VideoOutput
from opensoraplan.runtime.step_cache import Calibration
from opensoraplan.samplers import make_scheduler

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
FLOW: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
PROMPTS = ["a red ball", "a drone view of waves crashing against the cliffs along the beach"]


def make(pipeline: OpenSoraPlanPipeline, prompt: Any = "a red ball", **options: Any) -> VideoOutput:  # noqa: ANN401
    """A small run that ends with latents."""
    settings: dict[str, Any] = {
        "num_frames": 9,
        "height": 32,
        "width": 32,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
    }
    if "generator" not in options:
        settings["seed"] = 0
    output = pipeline(prompt, **settings | options)
    assert isinstance(output, VideoOutput)
    return output


def run(pipeline: OpenSoraPlanPipeline, prompt: Any = "a red ball", **options: Any) -> Tensor:  # noqa: ANN401
    """The latents of a small run."""
    latents = make(pipeline, prompt, **options).frames
    assert isinstance(latents, Tensor)
    return latents


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture
def computed(pipeline: OpenSoraPlanPipeline) -> list[str]:
    """Grows with each forward pass: by the name of a model, and of the attention of the second block."""
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    block = pipeline.transformer.transformer_blocks[1]
    assert isinstance(block, SparseUMMDiTBlock)
    modules = {
        "transformer": pipeline.transformer,
        "text_encoder": pipeline.text_encoder,
        "attention": block.attn1.to_q,
    }
    for name, module in modules.items():
        module.register_forward_pre_hook(note(name))
    return calls


# --- Output, properties -------------------------------------------------------------------------------------


def test_the_output_is_one_of_diffusers(pipeline: OpenSoraPlanPipeline) -> None:
    output = make(pipeline, num_inference_steps=1)
    assert isinstance(output, BaseOutput)
    assert output[0] is output["frames"] is output.frames
    assert output.seeds == output["seeds"] == [0]
    assert len(output.to_tuple()) == 2
    assert make(pipeline, num_inference_steps=1, generator=torch.Generator()).seeds is None


def test_without_a_seed_torchs_own_generator_draws_one(pipeline: OpenSoraPlanPipeline) -> None:
    outputs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        outputs.append(make(pipeline, PROMPTS, num_inference_steps=1, seed=None))
    first, again, other = outputs
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert first.seeds is not None
    assert first.seeds[1] == first.seeds[0] + 1
    assert torch.equal(run(pipeline, PROMPTS, num_inference_steps=1, seed=first.seeds), first[0])


def test_properties_tell_of_the_call(pipeline: OpenSoraPlanPipeline) -> None:
    seen: list[tuple[Any, ...]] = []

    def look(pipe: OpenSoraPlanPipeline, step: int, timestep: Tensor, _tensors: dict) -> None:
        seen.append(
            (pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.interrupt)
        )
        assert pipe.current_timestep is timestep
        pipe._interrupt = step == 1

    make(pipeline, callback_on_step_end=look)
    assert seen == [(STEPS, 4.0, True, False)] * 2
    assert pipeline.interrupt
    assert pipeline.current_timestep is None


# --- Callbacks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True], ids=["sequential", "batched"])
@pytest.mark.parametrize(
    "callback",
    [
        callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.25),
        callbacks.SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1),
        callbacks.MultiPipelineCallbacks([callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.25)]),
    ],
    ids=["SD", "SD3", "several"],
)
def test_callbacks_of_diffusers_end_guidance(
    pipeline: OpenSoraPlanPipeline,
    callback: callbacks.PipelineCallback,
    batched: bool,
) -> None:
    half = run(pipeline, PROMPTS, guidance_interval=(0.0, 0.5), batched_guidance=batched)
    assert torch.equal(run(pipeline, PROMPTS, callback_on_step_end=callback, batched_guidance=batched), half)
    whole = run(pipeline, PROMPTS, batched_guidance=batched)
    assert distance(half, whole) > 1e-3


def test_a_callback_may_begin_guidance(pipeline: OpenSoraPlanPipeline) -> None:
    def begin(pipe: OpenSoraPlanPipeline, step: int, _timestep: Tensor, _tensors: dict) -> None:
        pipe._guidance_scale = 4.0 if step else 1.0

    later = run(pipeline, guidance_interval=(0.5, 1.0))
    assert torch.equal(run(pipeline, guidance_scale=1.0, callback_on_step_end=begin), later)


@pytest.mark.parametrize("batched", [False, True], ids=["sequential", "batched"])
def test_a_callback_may_change_the_prompt(pipeline: OpenSoraPlanPipeline, batched: bool) -> None:
    first, second = pipeline.encode_prompts(["a red ball"]), pipeline.encode_prompts(["a cat asleep"])
    second.sequence.resize_(first.sequence.shape)
    halves: list[Tensor] = []

    def change(_pipe: object, step: int, _timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        halves.append(tensors["latents"])
        return (
            {"prompt_embeds": second.sequence, "pooled_prompt_embeds": second.pooled}
            if step == 1
            else tensors
        )

    names = ("latents", "prompt_embeds", "pooled_prompt_embeds")
    options: dict[str, Any] = {"prompt": None, "batched_guidance": batched}
    changed = run(
        pipeline,
        **options,
        prompt_embeds=first,
        callback_on_step_end=change,
        callback_on_step_end_tensor_inputs=names,
    )
    mixed = type(first)(second.sequence, first.mask, second.pooled)
    assert torch.equal(
        changed, run(pipeline, **options, prompt_embeds=mixed, latents=halves[1], first_step=2)
    )


RETURNS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "velocity": (
        lambda given: {"velocity": given["velocity"] * 2},
        "cannot change velocity, whose step is done",
    ),
    "unknown": (
        lambda given: {"latent": given["latents"]},
        "returned 'latent'; it can return latents, ",
    ),
    "shape": (
        lambda given: {"latents": given["latents"][:, 0]},
        r"shape \[1, 4, 2, 4, 4\], got \[1, 2, 4",
    ),
    "no tensor": (lambda _: {"latents": 3}, r"latents of shape .*, got int"),
    "no dict": (lambda given: given["latents"], "returns a dict of tensors, or None, got Tensor"),
    "prompt": (
        lambda _: {"prompt_embeds": torch.zeros(1, 3, 24)},
        r"prompt_embeds of shape \[1, \d+, 24\]",
    ),
}


@pytest.mark.parametrize(("answer", "message"), RETURNS.values(), ids=RETURNS.keys())
def test_what_cannot_take_effect_is_refused(
    pipeline: OpenSoraPlanPipeline, answer: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(
            pipeline,
            callback_on_step_end=lambda _pipe, _step, _timestep, given: answer(given),
            callback_on_step_end_tensor_inputs=("latents", "velocity"),
        )


def test_a_guidance_scale_that_cannot_be_is_refused(pipeline: OpenSoraPlanPipeline) -> None:
    with pytest.raises(ValueError, match=r"guidance_scale must be at least 0 .*, got nan"):
        run(pipeline, callback_on_step_end=lambda pipe, *_: setattr(pipe, "_guidance_scale", float("nan")))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (callbacks.SDXLCFGCutoffCallback(), "not add_text_embeds, add_time_ids for SDXLCFGCutoffCallback"),
        (callbacks.SDXLControlnetCFGCutoffCallback(), "not add_text_embeds, add_time_ids, image for SDXL"),
        (callbacks.IPAdapterScaleCutoffCallback(), "IPAdapterScaleCutoffCallback .* no IP adapters"),
    ],
)
def test_callbacks_for_other_models_are_refused(
    pipeline: OpenSoraPlanPipeline,
    computed: list[str],
    callback: callbacks.PipelineCallback,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run(pipeline, callback_on_step_end=callback)
    assert computed == []


# --- Caches -------------------------------------------------------------------------------------------------


def broadcast(pipeline: OpenSoraPlanPipeline, **changes: Any) -> PyramidAttentionBroadcastConfig:  # noqa: ANN401
    return PyramidAttentionBroadcastConfig(
        **{
            "spatial_attention_block_skip_range": 2,
            "spatial_attention_timestep_skip_range": (0, 1000),
            "current_timestep_callback": lambda: pipeline.current_timestep,
            **changes,
        }
    )


CACHES: dict[str, Callable[[OpenSoraPlanPipeline], Any]] = {
    "first block": lambda _: FirstBlockCacheConfig(threshold=10.0),
    "mag": lambda _: MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS),
    "sea": lambda _: SeaCacheConfig(threshold=10.0),
    "taylor": lambda _: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "taylor lite": lambda _: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, use_lite_mode=True
    ),
    "broadcast": broadcast,
}


@pytest.mark.parametrize("batched", [False, True], ids=["sequential", "batched"])
@pytest.mark.parametrize("name", CACHES)
def test_caches_of_diffusers_leave_work_out(
    pipeline: OpenSoraPlanPipeline, computed: list[str], name: str, batched: bool
) -> None:
    options: dict[str, Any] = {"batched_guidance": batched, "negative_prompt": "rain on the beach"}
    if name == "broadcast" and not batched:
        options["guidance_scale"] = 1.0
    exact = run(pipeline, **options)
    every = computed.count("attention")
    pipeline.transformer.enable_cache(CACHES[name](pipeline))
    computed.clear()
    first = run(pipeline, **options)
    assert 0 < computed.count("attention") < every
    assert distance(first, exact) > 1e-6
    assert torch.equal(run(pipeline, **options), first)
    pipeline.transformer.disable_cache()
    assert torch.equal(run(pipeline, **options), exact)


def test_a_cache_follows_guidance_that_ends(pipeline: OpenSoraPlanPipeline) -> None:
    """Attention broadcast keeps one batch of outputs: at the end of guidance it is half as large."""
    pipeline.transformer.enable_cache(broadcast(pipeline))
    callback = callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.25)
    half = run(pipeline, batched_guidance=True, guidance_interval=(0.0, 0.5))
    assert torch.equal(run(pipeline, batched_guidance=True, callback_on_step_end=callback), half)


def test_after_an_error_in_a_callback_the_next_video_is_as_ever(pipeline: OpenSoraPlanPipeline) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no disk")

    pipeline.transformer.enable_cache(CACHES["first block"](pipeline))
    pipeline.enable_model_cpu_offload(device="cpu")
    before = run(pipeline, PROMPTS[1])
    with pytest.raises(RuntimeError, match="no disk"):
        run(pipeline, callback_on_step_end=fail)
    assert torch.equal(run(pipeline, PROMPTS[1]), before)


REFUSED: dict[str, tuple[Callable[[OpenSoraPlanPipeline], Any], str]] = {
    "faster": (
        lambda pipe: FasterCacheConfig(current_timestep_callback=lambda: pipe.current_timestep),
        "FasterCache does not work with this model: it splits a batch",
    ),
    "text": (lambda _: TextKVCacheConfig(), "TextKVCache does not work with this model"),
    "no module": (
        lambda _: TaylorSeerCacheConfig(cache_identifiers=["blocks.*attn"]),
        "TaylorSeerCache finds none of its modules",
    ),
    "temporal": (
        lambda pipe: broadcast(
            pipe, spatial_attention_block_skip_range=None, temporal_attention_block_skip_range=2
        ),
        "PyramidAttentionBroadcast finds none of its modules",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_caches_that_would_do_nothing_are_refused(
    pipeline: OpenSoraPlanPipeline, config: Callable[[OpenSoraPlanPipeline], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.transformer.enable_cache(config(pipeline))
    assert not pipeline.transformer.is_cache_enabled


@pytest.mark.parametrize("name", ["first block", "mag", "sea"])
def test_caches_across_all_blocks_need_dense_ends(pipeline: OpenSoraPlanPipeline, name: str) -> None:
    rates = pipeline.transformer.config["sparse_n"]
    pipeline.transformer.enable_cache(CACHES[name](pipeline))
    pipeline.transformer.set_sparsity([2] * len(rates))
    with pytest.raises(ValueError, match="dense first and last stages"):
        run(pipeline)
    pipeline.transformer.disable_cache()
    with pytest.raises(ValueError, match="dense first and last stages"):
        pipeline.transformer.enable_cache(CACHES[name](pipeline))


CACHED_CALLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "one state for two branches": ("broadcast", {}, "give batched_guidance=True, or no guidance"),
    "steps": ("mag", {"num_inference_steps": 5}, "counts 4 steps from the first, this call has 5"),
    "late guidance": ("mag", {"guidance_interval": (0.5, 1.0)}, "not steps 2 to 4 of 4"),
    "batched guidance that ends": (
        "mag",
        {"guidance_interval": (0.0, 0.5), "batched_guidance": True},
        "not steps 0 to 2 of 4",
    ),
}


@pytest.mark.parametrize(("name", "options", "message"), CACHED_CALLS.values(), ids=CACHED_CALLS.keys())
def test_calls_that_a_cache_cannot_follow_are_refused(
    pipeline: OpenSoraPlanPipeline, computed: list[str], name: str, options: dict[str, Any], message: str
) -> None:
    pipeline.transformer.enable_cache(CACHES[name](pipeline))
    with pytest.raises(ValueError, match=message):
        run(pipeline, **options)
    assert computed == []


# --- Parts and schedulers -----------------------------------------------------------------------------------


def test_without_a_vae_there_are_latents(pipeline: OpenSoraPlanPipeline, computed: list[str]) -> None:
    expected = run(pipeline)
    pipeline.register_modules(vae=None)
    computed.clear()
    with pytest.raises(ValueError, match="no VAE, so output_type must be 'latent', got 'pil'"):
        run(pipeline, output_type="pil")
    assert computed == []
    assert torch.equal(run(pipeline), expected)


def test_without_a_denoiser_there_is_an_error_at_once(
    pipeline: OpenSoraPlanPipeline, computed: list[str]
) -> None:
    pipeline.register_modules(transformer=None)
    with pytest.raises(ValueError, match=r"this pipeline has no transformer"):
        run(pipeline)
    assert computed == []


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (
            UniPCMultistepScheduler(**FLOW),
            {"shift": 3.0},
            "UniPCMultistepScheduler sets shift, schedule and solver",
        ),
        (
            UniPCMultistepScheduler(**FLOW),
            {"solver": "adams"},
            "UniPCMultistepScheduler sets shift, schedule and solver",
        ),
        (
            IPNDMScheduler(),
            {},
            "IPNDMScheduler, with these options, does not step along a flow from timestep 1000 to 0",
        ),
        (RePaintScheduler(), {}, "RePaintScheduler cannot step along a flow: TypeError: .*original_image"),
        (
            DPMSolverMultistepScheduler(**FLOW, use_karras_sigmas=True),
            {},
            "with these options, .*its first step is not finite",
        ),
    ],
    ids=["shift", "solver", "no flow", "no step", "not finite"],
)
def test_schedulers_that_cannot_are_refused_before_any_step(
    pipeline: OpenSoraPlanPipeline,
    computed: list[str],
    scheduler: SchedulerMixin,
    options: dict[str, Any],
    message: str,
) -> None:
    pipeline.register_modules(scheduler=scheduler)
    with pytest.raises(ValueError, match=message):
        run(pipeline, **options)
    assert computed == []
    pipeline.register_modules(scheduler=make_scheduler())
    run(pipeline, num_inference_steps=1)


def test_trying_a_scheduler_changes_no_video(pipeline: OpenSoraPlanPipeline) -> None:
    pipeline.register_modules(scheduler=FlowMatchLCMScheduler(shift=3.0))
    torch.manual_seed(5)
    first = run(pipeline)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(run(pipeline), first)


# --- Files --------------------------------------------------------------------------------------------------


def test_what_a_folder_says_of_generating_is_saved_with_the_rest(
    pipeline: OpenSoraPlanPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "first")
    assert not (tmp_path / "first/generate.json").exists()
    GenerateDefaults(frames=9, steps=3).write(tmp_path / "first")
    Calibration(ratios=(1.0, 0.9)).write(tmp_path / "first/step_cache.json")
    loaded = OpenSoraPlanPipeline.from_pretrained(tmp_path / "first", local_files_only=True)
    loaded.save_pretrained(tmp_path / "first")  # over itself
    loaded.save_pretrained(tmp_path / "second")
    assert GenerateDefaults.of(tmp_path / "second") == GenerateDefaults(frames=9, steps=3)
    assert Calibration.of(tmp_path / "second").ratios == (1.0, 0.9)


def test_a_pipeline_without_a_vae_is_saved_and_loaded(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    expected = run(pipeline)
    pipeline.register_modules(vae=None)
    pipeline.save_pretrained(tmp_path)
    loaded = OpenSoraPlanPipeline.from_pretrained(tmp_path, local_files_only=True)
    align(loaded)
    assert loaded.vae is None
    assert torch.equal(run(loaded), expected)
