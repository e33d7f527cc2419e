"""Plans that fit a device's memory, and pipelines that follow them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_release import sources_of
from torch import Tensor, nn

from opensoraplan.data.reading import read_frames
from opensoraplan.defaults import WeightPrecision
from opensoraplan.formats.assemble import load_pipeline, open_pipeline
from opensoraplan.generate import job as generate
from opensoraplan.generate.planning import needs_of
from opensoraplan.generate.session import Session
from opensoraplan.models.sizes import BatchShape, decoding_memory
from opensoraplan.pipeline import OpenSoraPlanPipeline, VideoOutput
from opensoraplan.requests import Request
from opensoraplan.runtime.placement import (
    CHUNKS,
    PLACEMENTS,
    Arrangement,
    Needs,
    first_that_fits,
    fit_decoding,
    peak_on_host,
    plans_for,
)
from opensoraplan.runtime.quantisation import quantise_weights
from opensoraplan.runtime.step_cache import skip_steps
from opensoraplan.runtime.streaming import stream_blocks

GB = 10**9
CPU = torch.device("cpu")
SIZE = {"prompt": "a", "frames": 9, "height": 32, "width": 32}
SMALL = Request(**SIZE)
LARGE = Request(prompt="a")  # 121 x 576 x 1024
# About what the release needs for 121 x 576 x 1024.
RELEASE = Needs(
    encoders=4 * GB,
    denoiser=17 * GB,
    adaln=2 * GB,
    block=GB * 2 // 5,
    vae=GB // 2,
    vectors=GB * 3 // 10,
    denoising=4 * GB,
    decoding=(16 * GB, 8 * GB, 5 * GB, 3 * GB, 2 * GB),
)


def latents_of(pipeline: OpenSoraPlanPipeline, *, steps: int = 2) -> Tensor:
    output = pipeline(
        "a red ball",
        num_frames=9,
        height=32,
        width=32,
        num_inference_steps=steps,
        seed=0,
        output_type="latent",
    )
    assert isinstance(output, VideoOutput)
    assert isinstance(output.frames, Tensor)
    return output.frames


@pytest.mark.parametrize(
    ("free", "placement"), [(80, "resident"), (24, "in-turn"), (12, "streamed"), (6.6, "streamed")]
)
def test_the_fastest_plan_that_fits_is_chosen(free: float, placement: str) -> None:
    plans = plans_for([RELEASE])
    chosen = plans[first_that_fits(plans, free=int(free * GB))]
    assert chosen.placement == placement
    assert chosen.peak < free * GB


def test_plans_become_leaner_and_the_least_is_said_to_be_too_much() -> None:
    plans = plans_for([RELEASE])
    assert len(plans) == len(PLACEMENTS) * len(CHUNKS)
    for place, plan in enumerate(plans):
        assert all(plan.denoising < one.denoising or plan.decoding < one.decoding for one in plans[:place])
    with pytest.raises(
        MemoryError, match=r"needs the least memory \(streamed, .* 5\.6 GB\) .* the 5\.0 GB that are free"
    ):
        first_that_fits(plans, free=5 * GB)


def test_a_card_decodes_the_largest_chunk_that_fits(pipeline: OpenSoraPlanPipeline) -> None:
    vae, grid, card = pipeline.vae, (16, 72, 128), torch.device("cuda")
    needs = needs_of(pipeline, LARGE)
    room = [int(need / 0.92) + 1 for need in needs.decoding]
    for free, chunk in zip((*room, 0), (*CHUNKS, CHUNKS[-1]), strict=True):
        vae.enable_streaming(latent_frames=4)
        fit_decoding(vae, [(1, 8, 8), grid], card, more=False, free=free)
        assert vae.streaming_latent_frames == min(chunk, 4)
        fit_decoding(vae, [(1, 8, 8), grid], card, free=free)
        assert vae.streaming_latent_frames == chunk


def test_a_host_short_of_memory_decodes_less_at_a_time(pipeline: OpenSoraPlanPipeline) -> None:
    vae, grid = pipeline.vae, (16, 72, 128)
    needs = needs_of(pipeline, LARGE)
    for most, fits in ((4, 16), (4, 4), (4, 1), (2, 16), (8, 8)):
        free = int(needs.decoding[CHUNKS.index(fits)] / 0.92) + 1
        vae.enable_streaming(latent_frames=most)
        fit_decoding(vae, [(1, 8, 8), grid], CPU, free=free)
        assert vae.streaming_latent_frames == min(most, fits)
    vae.disable_streaming()
    fit_decoding(vae, [grid], CPU, free=0)
    assert vae.streaming_latent_frames is None


def test_the_peak_on_a_host_is_of_what_it_decodes_at_a_time(pipeline: OpenSoraPlanPipeline) -> None:
    vae, grid = pipeline.vae, (16, 72, 128)
    needs = needs_of(pipeline, LARGE)
    for frames, decoding in ((4, needs.decoding[CHUNKS.index(4)]), (1, needs.decoding[-1])):
        vae.enable_streaming(latent_frames=frames)
        expected = needs.weights + max(needs.denoising, decoding)
        assert peak_on_host(vae, [needs], [(1, 8, 8), grid]) == expected
    vae.disable_streaming()
    assert peak_on_host(vae, [needs], [grid]) == needs.weights + needs.decoding[0]


@pytest.mark.parametrize("kind", ["whole", "int8", "fp8"])
def test_plans_are_the_same_before_weights_are_read(tiny_release: Path, kind: WeightPrecision) -> None:
    opened = open_pipeline(sources_of(tiny_release))
    empty = opened.without_weights(torch.bfloat16)
    loaded = load_pipeline(opened, dtype=torch.bfloat16, device=CPU)
    weights = [weight for model in _models(loaded) for weight in model.parameters()]
    assert opened.weight_bytes(torch.bfloat16) == sum(weight.nbytes for weight in weights)
    for pipeline in (empty, loaded):
        quantise_weights(pipeline.transformer, kind)
    assert needs_of(empty, SMALL) == needs_of(loaded, SMALL)


def test_a_plan_for_several_videos_fits_the_largest(pipeline: OpenSoraPlanPipeline) -> None:
    small = needs_of(pipeline, SMALL)
    large = needs_of(pipeline, Request(prompt="a", frames=17, height=64, width=64))
    assert small.weights == large.weights == sum(map(_bytes, _models(pipeline)))
    assert [p.peak for p in plans_for([small, large])] == [p.peak for p in plans_for([large])]
    assert needs_of(pipeline, Request(**SIZE, batched_guidance=True)).denoising > small.denoising


def test_a_plan_knows_tiles_and_step_caches(pipeline: OpenSoraPlanPipeline) -> None:
    size = {"prompt": "a", "frames": 121, "height": 512, "width": 1024}
    request = Request(**size)
    whole = needs_of(pipeline, request)
    config = pipeline.transformer.config
    tokens, width = 16 * 32 * 64, config["num_attention_heads"] * config["attention_head_dim"]
    kept = needs_of(pipeline, Request(**size, step_cache=0.1)).denoising - whole.denoising
    assert kept == 4 * tokens * width * pipeline.transformer.dtype.itemsize
    pipeline.vae.enable_tiling()
    tiled = needs_of(pipeline, request)
    pipeline.vae.disable_tiling()
    base, shape = pipeline.vae.config["base_channels"], BatchShape((16, 64, 128), 0)
    for chunk, need in zip(CHUNKS, tiled.decoding, strict=True):
        assert need == decoding_memory(shape, "fp32", base=base, chunk=chunk, tiling=(256, 64))
    assert tiled.denoising == whole.denoising


def _models(pipeline: OpenSoraPlanPipeline) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_plan_gives_the_same_video(pipeline: OpenSoraPlanPipeline, placement: str) -> None:
    expected = latents_of(pipeline)
    frames = torch.cat(list(pipeline.iter_decode(expected)), dim=2)
    plans = plans_for([needs_of(pipeline, SMALL)], [placement])  # type: ignore[list-item]
    Arrangement(pipeline, plans, CPU)
    assert torch.equal(latents_of(pipeline), expected)
    assert torch.allclose(torch.cat(list(pipeline.iter_decode(expected)), dim=2), frames, atol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_every_plan_takes_smaller_weights(
    pipeline: OpenSoraPlanPipeline, placement: str, kind: WeightPrecision
) -> None:
    pipeline.transformer.to(torch.bfloat16)
    exact = latents_of(pipeline)
    quantise_weights(pipeline.transformer, kind)
    near = latents_of(pipeline)
    assert 0 < (near - exact).norm() < 0.1 * exact.norm()
    plans = plans_for([needs_of(pipeline, SMALL)], [placement])  # type: ignore[list-item]
    Arrangement(pipeline, plans, CPU)
    assert torch.equal(latents_of(pipeline), near)


def test_models_are_on_the_device_in_turn_and_never_come_back(pipeline: OpenSoraPlanPipeline) -> None:
    plans = plans_for([needs_of(pipeline, SMALL)], ["in-turn"])
    text, denoiser, vae = pipeline.text_encoder.encoder, pipeline.transformer, pipeline.vae
    watched = {
        "text": text.embed_tokens.weight,
        "denoiser": denoiser.proj_out.weight,
        "vae": vae.decoder.conv_in.conv.weight,
    }
    hosts = {name: weight.data_ptr() for name, weight in watched.items()}
    Arrangement(pipeline, plans, CPU)
    seen: list[set[str]] = []

    def note(*_: object) -> None:
        seen.append({name for name, weight in watched.items() if weight.data_ptr() != hosts[name]})

    for module in (text, denoiser.proj_out, vae.decoder.mid[0]):
        module.register_forward_pre_hook(note)
    for _ in range(2):
        for _frames in pipeline.iter_decode(latents_of(pipeline)):
            pass
    turns = [one for one, before in zip(seen, [None, *seen], strict=False) if one != before]
    assert turns == [{"text"}, {"denoiser"}, {"vae"}] * 2


def test_frames_that_were_to_be_decoded_at_once_are_said_not_to_be(
    pipeline: OpenSoraPlanPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    plans = plans_for([needs_of(pipeline, SMALL)])
    Arrangement(pipeline, plans, CPU)
    assert not caplog.records
    pipeline.vae.disable_streaming()
    Arrangement(pipeline, plans, CPU)
    assert "decoding in chunks instead of all frames at once" in caplog.text


def test_streamed_blocks_are_on_the_device_only_while_they_compute(pipeline: OpenSoraPlanPipeline) -> None:
    blocks = list(pipeline.transformer.transformer_blocks)
    expected = latents_of(pipeline)
    stream_blocks(pipeline.transformer, CPU)
    places: set[tuple[int, int]] = set()

    def note(index: int) -> Callable[..., None]:
        return lambda module, _args: places.add((index, module.weight.data_ptr()))

    for index, block in enumerate(blocks):
        block.ff.net[2].register_forward_pre_hook(note(index))
    hosts = [block.ff.net[2].weight.data_ptr() for block in blocks]
    assert torch.equal(latents_of(pipeline), expected)
    assert {index for index, _ in places} == set(range(len(blocks)))
    assert not {place for _, place in places} & set(hosts)
    assert [block.ff.net[2].weight.data_ptr() for block in blocks] == hosts


def test_a_step_cache_spares_streamed_blocks_their_way(pipeline: OpenSoraPlanPipeline) -> None:
    ratios = [1.0] * 8
    with skip_steps(pipeline.transformer, ratios, threshold=1.0, steps=8):
        expected = latents_of(pipeline, steps=8)
    stream_blocks(pipeline.transformer, CPU)
    calls: list[int] = []
    pipeline.transformer.transformer_blocks[2].ff.register_forward_hook(lambda *_: calls.append(1))
    with skip_steps(pipeline.transformer, ratios, threshold=1.0, steps=8):
        assert torch.equal(latents_of(pipeline, steps=8), expected)
    assert 2 <= len(calls) < 16  # of two branches


@pytest.mark.parametrize(
    ("decoding", "expected"),
    [
        (False, [(placement, 16) for placement in PLACEMENTS]),
        (True, [(placement, chunk) for placement in PLACEMENTS[:2] for chunk in CHUNKS]),
    ],
)
def test_full_memory_is_met_by_what_needs_less_there_until_there_is_nothing(
    pipeline: OpenSoraPlanPipeline, decoding: bool, expected: list[tuple[str, int]]
) -> None:
    arrangement = Arrangement(pipeline, plans_for([RELEASE]), CPU)
    followed: list[tuple[str, int]] = []
    asked: list[bool] = []

    def work(again: bool) -> None:
        asked.append(again)
        followed.append((arrangement.plan.placement, arrangement.plan.chunk))
        assert pipeline.vae.streaming_latent_frames == arrangement.plan.chunk
        if decoding:
            next(pipeline.iter_decode(torch.zeros(1, pipeline.vae.config["latent_channels"], 1, 4, 4)))
        raise torch.OutOfMemoryError("the device is full")

    with pytest.raises(torch.OutOfMemoryError):
        arrangement.run(work)
    assert followed == expected
    assert asked == [False] + [True] * (len(expected) - 1)


def test_a_video_goes_on_where_memory_was_full(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    request = Request(prompt="a red ball", frames=9, height=32, width=32, steps=4, seed=3)
    (whole,) = generate.run(Session(pipeline, "tiny"), [request], [tmp_path / "whole.mp4"], resume=False)
    arrangement = Arrangement(pipeline, plans_for([RELEASE]), CPU)
    first, calls = arrangement.plan, []

    def full(_model: nn.Module, _args: tuple[object, ...], _kwargs: dict[str, object]) -> None:
        calls.append(arrangement.plan)
        if len(calls) == 6:  # in the third of four guided steps
            raise torch.OutOfMemoryError("the device is full")

    pipeline.transformer.patch_embed.register_forward_pre_hook(full, with_kwargs=True)
    session = Session(pipeline, "tiny", arrangement=arrangement)
    (path,) = generate.run(
        session, [request], [tmp_path / "broken.mp4"], resume=False, progress=generate.Progress(save_every=1)
    )
    assert calls.count(first) == 6
    assert len(calls) == 6 + 2 * 2  # the first two steps were not done again
    assert torch.equal(read_frames(path), read_frames(whole))
