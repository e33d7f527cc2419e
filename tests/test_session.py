"""Sessions: a model that is loaded once makes many videos, each as its own process would."""

import functools
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from command import Command
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from opensoraplan.data.video import read_frames
from opensoraplan.generate import job
from opensoraplan.generate.session import Session, SessionOptions
from opensoraplan.models.sparse_ummdit import SparseUMMDiT
from opensoraplan.pipeline import NonFiniteLatentsError, OpenSoraPlanPipeline
from opensoraplan.requests import Request

SMALL: dict[str, Any] = {"frames": 9, "height": 32, "width": 32, "steps": 3}
LARGEST = Request(prompt="any", **SMALL | {"frames": 17, "width": 48, "batched_guidance": True})
# Each differs from the one before it in something that a session might keep.
REQUESTS = [
    Request(prompt="a red ball", **SMALL, seed=3),
    Request(prompt="waves", **SMALL, negative_prompt="sand", seed=4),
    Request(prompt="waves", **SMALL | {"frames": 17, "width": 48}, guidance=1.0, seed=5),
    Request(prompt="a red ball", **SMALL, solver="adams", batched_guidance=True, seed=3),
    Request(prompt="a picture", **SMALL | {"frames": 1}, shift=3.0, seed=7),
]


def options_of(model: Path, **changes: Any) -> SessionOptions:  # noqa: ANN401
    return SessionOptions(model, device="cpu", dtype="fp32", progress=False, **changes)


@pytest.fixture
def session(tiny_model: Path) -> Iterator[Session]:
    with Session.open(options_of(tiny_model), LARGEST) as opened:
        yield opened


def alone(model: Path, request: Request) -> torch.Tensor:
    """The frames of a request, by a session of its own."""
    with Session.open(options_of(model), request) as opened:
        frames = opened.run(request).frames
    assert frames is not None
    return frames


def test_a_command_builds_each_model_once(
    osp: Command, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One denoiser and one pipeline with weights; and a skeleton of each, of meta tensors, to plan by."""
    built: list[nn.Module] = []
    pipelines: list[OpenSoraPlanPipeline] = []
    build, build_pipeline = SparseUMMDiT.__init__, OpenSoraPlanPipeline.__init__

    @functools.wraps(build)  # diffusers reads its signature
    def count(model: SparseUMMDiT, *args: Any, **options: Any) -> None:  # noqa: ANN401
        built.append(model)
        build(model, *args, **options)

    @functools.wraps(build_pipeline)
    def count_pipeline(pipeline: OpenSoraPlanPipeline, *args: Any, **options: Any) -> None:  # noqa: ANN401
        pipelines.append(pipeline)
        build_pipeline(pipeline, *args, **options)

    monkeypatch.setattr(SparseUMMDiT, "__init__", count)
    monkeypatch.setattr(OpenSoraPlanPipeline, "__init__", count_pipeline)
    size = [f"--{name}={value}" for name, value in SMALL.items()]
    assert (
        osp("generate", "a cat", "--model", tiny_model, "--device", "cpu", "--out", "a.mp4", *size).code == 0
    )
    assert (tmp_path / "a.mp4").exists()
    assert len(built) == 1
    on = [next(pipeline.transformer.parameters()).device.type for pipeline in pipelines]
    assert on == ["meta", "cpu"]
    assert pipelines[1].transformer is built[0]


def test_each_video_is_that_of_its_own_session(session: Session, tiny_model: Path, tmp_path: Path) -> None:
    for request in REQUESTS:
        result = session.run(request)
        assert (result.step, result.record["seed"]) == (request.steps, request.seed)
        assert result.frames is not None
        assert result.frames.shape == (request.frames, request.height, request.width, 3)
        assert torch.equal(result.frames, alone(tiny_model, request))
    again = session.run(REQUESTS[0], output="latents")
    assert again.frames is None
    assert torch.equal(again.latents, session.run(REQUESTS[0]).latents)
    # And what a command writes.
    path = tmp_path / "a.mp4"
    job.run(session, REQUESTS[:1], [path], resume=False)
    with Session.open(options_of(tiny_model), REQUESTS) as other:
        job.run(other, REQUESTS[:1], [tmp_path / "b.mp4"], resume=False)
    assert torch.equal(read_frames(path), read_frames(tmp_path / "b.mp4"))


def test_a_request_can_be_stopped(session: Session, tiny_model: Path) -> None:
    request, steps = REQUESTS[0], []
    stopped = session.run(
        request, on_step=lambda step, _latents: steps.append(step), should_stop=lambda: len(steps) == 2
    )
    assert (steps, stopped.step, stopped.frames) == ([1, 2], 2, None)
    whole = session.run(request, should_stop=lambda: False)
    assert not torch.equal(stopped.latents, whole.latents)
    assert whole.frames is not None
    assert torch.equal(whole.frames, alone(tiny_model, request))


def test_decoding_can_be_stopped(session: Session, tiny_model: Path) -> None:
    request = REQUESTS[2]
    answers = iter([False] * request.steps + [True])
    stopped = session.run(request, should_stop=lambda: next(answers))
    assert (stopped.step, stopped.frames) == (request.steps, None)
    whole = session.run(request)
    assert torch.equal(stopped.latents, whole.latents)
    assert whole.frames is not None
    assert torch.equal(whole.frames, alone(tiny_model, request))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bug"), torch.OutOfMemoryError("full")])
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_failed_request_leaves_a_session_usable(
    session: Session, tiny_model: Path, part: str, error: BaseException
) -> None:
    broken = session.pipeline.components[part]
    broken = broken.decoder if part == "vae" else broken

    def fail(module: nn.Module, _arguments: object) -> None:
        if module is broken:
            raise error

    wanted = MemoryError if isinstance(error, torch.OutOfMemoryError) else type(error)
    with register_module_forward_pre_hook(fail), pytest.raises(wanted):
        session.run(REQUESTS[0])
    frames = session.run(REQUESTS[0]).frames
    assert frames is not None
    assert torch.equal(frames, alone(tiny_model, REQUESTS[0]))


def test_nan_ends_a_request_not_the_session(session: Session) -> None:
    before = session.run(REQUESTS[0]).latents
    weight = session.pipeline.transformer.proj_out.bias
    whole = weight.data.clone()
    weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteLatentsError):
        session.run(REQUESTS[0])
    weight.data.copy_(whole)
    assert torch.equal(session.run(REQUESTS[0]).latents, before)


def test_requests_that_a_session_was_not_opened_for(session: Session) -> None:
    for change in ({"frames": 49, "width": 48}, {"height": 64}, {"batched_guidance": True, "frames": 33}):
        with pytest.raises(ValueError, match="more than this session was opened for, 17 frames of 48 x 32"):
            session.run(Request(prompt="a cat", **SMALL | change))
    with pytest.raises(ValueError, match=r"step_cache 0\.1 needs a model calibrated with"):
        session.run(Request(prompt="a cat", **SMALL, step_cache=0.1))
    with pytest.raises(ValueError, match="cleaning leaves nothing of the prompt"):
        session.run(Request(prompt="你好", **SMALL))


def test_a_model_that_is_none_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="transformer"):
        Session.open(options_of(tmp_path / "none"), LARGEST)
    with pytest.raises(FileNotFoundError, match=r"`osp calibrate --model .*` writes it"):
        Session.open(options_of(tiny_model), Request(prompt="a cat", **SMALL, step_cache=0.1))
    with pytest.raises(ValueError, match="--memory streamed is for a card"):
        Session.open(options_of(tiny_model, memory="streamed"), LARGEST)


def test_memory_does_not_grow_with_requests(session: Session) -> None:
    process, used = psutil.Process(), []
    for number in range(10):
        request = Request(prompt=f"a ball number {number}", **SMALL | {"width": 32 + 16 * (number % 2)})
        session.run(request)
        gc.collect()
        used.append(process.memory_info().rss)
    assert used[9] - used[1] < 20e6
