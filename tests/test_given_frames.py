"""Videos that begin with a picture, meet a last one, go on from a clip, or are extended."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import Command, mistake
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from PIL import Image
from torch import Tensor

from opensoraplan.data.video import VideoWriter, fit
from opensoraplan.generate import job, saved
from opensoraplan.generate.session import Session
from opensoraplan.generate.windows import Snapshot
from opensoraplan.given_frames import fit_frames, read_end, read_picture
from opensoraplan.pipeline import NonFiniteLatentsError, OpenSoraPlanPipeline
from opensoraplan.requests import Request
from opensoraplan.runtime.step_cache import measure_ratios, skip_steps

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = {"frames": 25, "height": 32, "width": 48}
CALL: dict[str, Any] = {"num_frames": 25, "height": 32, "width": 48, "num_inference_steps": 4, "seed": 3}


def picture(seed: int, *, height: int = 60, width: int = 100) -> np.ndarray:
    """A smooth one, as VAEs like them."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def clip(frames: int, *, height: int = 40, width: int = 60) -> np.ndarray:
    return np.stack(
        [np.roll(picture(9, height=height, width=width), frame, axis=1) for frame in range(frames)]
    )


def psnr(found: Tensor, wanted: Tensor) -> float:
    """In dB, of pixels in [-1, 1]."""
    return float(10 * (4 / (found.clamp(-1, 1) - wanted).square().mean()).log10())


def latents_of(pipeline: OpenSoraPlanPipeline, **call: Any) -> Tensor:  # noqa: ANN401
    return pipeline("a cat", output_type="latent", **{**CALL, **call}).frames


# --- Pipeline -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "adams"},
        {"guidance_scale": 1.0},
        {"guidance_interval": (0.25, 0.75)},
        {"batched_guidance": True},
        {"num_videos_per_prompt": 2},
    ],
    ids=["euler", "adams", "unguided", "interval", "batched", "two"],
)
def test_given_frames_are_in_every_video_as_they_were_encoded(
    pipeline: OpenSoraPlanPipeline, options: dict[str, Any]
) -> None:
    first, last = picture(1), picture(2)
    encoded = pipeline.encode_frames(fit_frames(image=first, height=32, width=48)).first
    assert encoded is not None
    found = latents_of(pipeline, image=first, last_image=last, **options)
    assert found.shape[2] == 4
    for video in found:
        assert torch.equal(video[:, :1], encoded[0])
    free = latents_of(pipeline, **options)
    assert not torch.equal(found[:, :, 1:], free[:, :, 1:])


def test_a_prefix_is_the_beginning(pipeline: OpenSoraPlanPipeline) -> None:
    frames = clip(17)
    encoded = pipeline.encode_frames(fit_frames(video=frames, height=32, width=48)).first
    assert encoded is not None
    found = latents_of(pipeline, video=frames)
    assert torch.equal(found[:, :, :3], encoded)
    assert torch.isfinite(found).all()


def test_the_first_frame_is_as_near_to_the_picture_as_the_vae_can(pipeline: OpenSoraPlanPipeline) -> None:
    wanted = fit(torch.as_tensor(picture(1))[None], height=32, width=48)
    alone = pipeline.vae.decode(pipeline.vae.encode(wanted[None]).latent_dist.mode()).sample
    made = pipeline("a cat", output_type="pt", image=picture(1), **CALL).frames[:, 0] * 2 - 1
    best, found = (
        10 * (4 / (x.clamp(-1, 1) - wanted).square().mean()).log10() for x in (alone[0], made[0][:, None])
    )
    assert float(found) >= float(best) - 0.1


def test_a_step_cache_leaves_given_frames_alone(pipeline: OpenSoraPlanPipeline) -> None:
    model = pipeline.transformer
    with measure_ratios(model) as ratios:
        latents_of(pipeline, guidance_scale=1.0, num_inference_steps=8)
    encoded = pipeline.encode_frames(fit_frames(image=picture(1), height=32, width=48)).first
    assert encoded is not None
    with skip_steps(model, [1.0, *ratios[1:]], threshold=10.0, steps=8):
        found = latents_of(pipeline, image=picture(1), guidance_scale=1.0, num_inference_steps=8)
    assert torch.equal(found[:, :, :1], encoded)


def test_pictures_of_every_kind_are_the_same_video(pipeline: OpenSoraPlanPipeline) -> None:
    pixels = picture(1)
    wanted = latents_of(pipeline, image=pixels)
    for same in (
        Image.fromarray(pixels),
        torch.as_tensor(pixels.copy()),
        Image.fromarray(pixels).convert("RGBA"),
    ):
        assert torch.equal(latents_of(pipeline, image=same), wanted)


def test_a_callback_sees_the_frames_of_the_video_alone(pipeline: OpenSoraPlanPipeline) -> None:
    shapes = []

    def see(_pipeline: object, _index: int, _time: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes.extend(list(tensor.shape) for tensor in tensors.values())
        return {"latents": tensors["latents"] * 2}

    found = latents_of(
        pipeline,
        last_image=picture(2),
        image=picture(1),
        callback_on_step_end=see,
        callback_on_step_end_tensor_inputs=("latents", "velocity"),
    )
    assert {tuple(shape) for shape in shapes} == {(1, 4, 4, 4, 6)}
    encoded = pipeline.encode_frames(fit_frames(image=picture(1), height=32, width=48)).first
    assert encoded is not None
    assert torch.equal(found[:, :, :1], encoded)


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ({"image": picture(1), "video": clip(9)}, "give one of image and video"),
        ({"video": clip(25)}, "25 given frames leave nothing to generate of a video of 25: give at most 17"),
        ({"video": clip(10)}, "frames must be 8k .* got 10: use 9 or 17"),
        ({"image": picture(1), "num_frames": 1}, "a picture of 1 frame cannot begin with another picture"),
        ({"last_image": picture(1), "num_frames": 1}, "a picture of 1 frame has no last frame"),
        ({"image": picture(1, width=1)}, "image has 1 x 60 pixels: a side needs 16 at least"),
        ({"image": picture(1).astype(np.float32)}, "a picture is of PIL, or uint8"),
        ({"image": "a.png"}, "a picture is of PIL, or uint8 .* got str"),
    ],
)
def test_frames_that_cannot_be_given(
    pipeline: OpenSoraPlanPipeline, call: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        latents_of(pipeline, **call)


# --- Files --------------------------------------------------------------------------------------------------


def test_the_end_of_a_clip_is_read_at_the_videos_rate(tmp_path: Path) -> None:
    frames = torch.as_tensor(clip(30))
    with VideoWriter(tmp_path / "clip.mp4", fps=24, crf=1) as writer:
        writer.write(frames)
    end = read_end(tmp_path / "clip.mp4", frames=9, fps=24)
    assert (end.float() - frames[-9:].float()).abs().mean() < 8
    half = read_end(tmp_path / "clip.mp4", frames=9, fps=12)
    assert (half.float() - frames[12:29:2].float()).abs().mean() < 8
    with pytest.raises(ValueError, match=r"has 15 frames at 12 frames a second, and 17 .* set overlap to 9"):
        read_end(tmp_path / "clip.mp4", frames=17, fps=12)


def test_pictures_of_every_format_are_read_upright(tmp_path: Path) -> None:
    pixels = picture(3)
    wanted, image = torch.as_tensor(pixels.copy()), Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(tmp_path / "palette.png")
    clear = image.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    grey = np.asarray(image.convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    image.convert("CMYK").save(tmp_path / "cmyk.tiff")
    assert torch.equal(read_picture(tmp_path / "turned.png"), wanted)
    assert (read_picture(tmp_path / "palette.png").float() - wanted.float()).abs().mean() < 12
    assert read_picture(tmp_path / "clear.png").min() == 255
    assert torch.equal(read_picture(tmp_path / "deep.png")[..., 0], torch.as_tensor(grey.copy()))
    assert (read_picture(tmp_path / "cmyk.tiff").float() - wanted.float()).abs().mean() < 3


# --- Windows ------------------------------------------------------------------------------------------------


def test_windows_of_an_extended_video() -> None:
    request = Request(prompt="a cat", **SIZE, steps=4, extend=40)
    assert (request.windows, request.total_steps) == (4, 16)
    assert [request.frames_of(window) for window in range(4)] == [25, 25, 25, 17]
    assert [request.frames_after(step) for step in (0, 4, 5, 8, 9, 13, 16)] == [25, 25, 41, 41, 57, 65, 65]


@pytest.fixture
def extended(tmp_path: Path) -> Request:
    Image.fromarray(picture(1)).save(tmp_path / "first.png")
    Image.fromarray(picture(2)).save(tmp_path / "last.png")
    return Request(
        prompt="a cat",
        **SIZE,
        steps=2,
        guidance=2,
        solver="adams",
        extend=24,
        image=str(tmp_path / "first.png"),
        last_image=str(tmp_path / "last.png"),
    )


def test_an_extended_video_is_one_whose_windows_go_on_from_each_other(
    pipeline: OpenSoraPlanPipeline, extended: Request
) -> None:
    session, shown = Session(pipeline, "tiny"), list[Snapshot]()
    latents = session.denoise(extended, after_step=shown.append)
    assert latents.shape[2] == 7
    assert [snapshot.step for snapshot in shown] == [1, 2, 3, 4, 5, 6]
    assert [snapshot.latents.shape[2] for snapshot in shown] == [4, 4, 6, 6, 7, 7]
    # What was finished stays as it is.
    assert torch.equal(latents[:, :, :4], shown[1].latents)
    # A window goes on from the end of the one before, encoded anew.
    frames = torch.cat(list(pipeline.iter_decode(shown[1].latents)), dim=2)
    prefix = shown[2].prefix
    assert prefix is not None
    assert torch.equal(prefix, pipeline.encode_pixels(frames[:, :, -9:] * 2 - 1))
    plain = Request(**{**extended.model_dump(), "extend": 0, "last_image": None})
    assert torch.equal(session.denoise(plain), latents[:, :, :4])


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop", range(1, 6))
def test_an_extended_video_that_was_stopped_goes_on_bit_for_bit(
    pipeline: OpenSoraPlanPipeline, extended: Request, tmp_path: Path, stop: int
) -> None:
    session, made = Session(pipeline, "tiny"), tmp_path / "made"
    wanted = session.denoise(extended)

    def stopped(step: int) -> None:
        if step == stop:
            raise StopError

    made.mkdir()
    target, record = made / "video.mp4", session.record(extended)
    with pytest.raises(StopError):
        job.run(
            session, [extended], [target], resume=True, progress=job.Progress(save_every=1, on_step=stopped)
        )
    seen: list[int] = []
    found = job.find_latents(session, extended, target, record)
    assert found is not None
    assert found.step == stop
    again = Session(pipeline, "tiny")
    assert torch.equal(
        again.denoise(extended, start=found, after_step=lambda now: seen.append(now.step)), wanted
    )
    assert seen == list(range(stop + 1, 7))
    (video,) = job.run(again, [extended], [target], resume=True)
    assert json.loads(video.with_suffix(".json").read_text())["extend"] == 24
    assert read_end(video, frames=49, fps=24).shape[0] == 49


@pytest.mark.parametrize("call", [3, 4, 6], ids=["first of a window", "second", "last"])
def test_nan_in_a_later_window_keeps_what_the_video_resumes_from(
    pipeline: OpenSoraPlanPipeline, extended: Request, tmp_path: Path, call: int
) -> None:
    request = extended.model_copy(update={"guidance": 1})
    session, calls = Session(pipeline, "tiny"), count(1)
    wanted = session.denoise(request)

    def spoil(_model: object, _args: object, output: tuple[Tensor]) -> tuple[Tensor]:
        return (output[0] * torch.nan,) if next(calls) == call else output

    handle = pipeline.transformer.register_forward_hook(spoil)
    target, record = tmp_path / "video.mp4", session.record(request)
    with pytest.raises(NonFiniteLatentsError, match=f"after step {call} of 6"):
        job.run(session, [request], [target], resume=True)
    handle.remove()
    found = job.find_latents(session, request, target, record)
    assert found is not None
    assert found.step == call - 1
    assert torch.equal(session.denoise(request, start=found), wanted)


def test_a_scheduler_with_more_calls_than_steps_extends_a_video(
    pipeline: OpenSoraPlanPipeline, extended: Request
) -> None:
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    request = extended.model_copy(update={"solver": "euler", "steps": 3, "guidance": 1})
    steps: list[int] = []
    latents = Session(pipeline, "tiny").denoise(request, after_step=lambda now: steps.append(now.step))
    assert latents.shape[2] == 7
    assert steps == sorted(steps)
    assert steps[-1] == request.total_steps == 9


def test_a_record_tells_pictures_by_their_pixels(
    pipeline: OpenSoraPlanPipeline, extended: Request, tmp_path: Path
) -> None:
    session = Session(pipeline, "tiny")
    (tmp_path / "copy.png").write_bytes((tmp_path / "first.png").read_bytes())
    renamed = extended.model_copy(update={"image": str(tmp_path / "copy.png")})
    swapped = extended.model_copy(update={"image": str(tmp_path / "last.png")})
    one, same, other = (session.record(request) for request in (extended, renamed, swapped))
    assert saved.is_same_video(one, same)
    assert not saved.is_same_video(one, other)
    plain = session.record(Request(prompt="a cat", **SIZE))
    assert not {"image", "last_image", "video", "overlap", "extend", "given_frames"} & plain.keys()


def test_a_picture_that_is_replaced_is_read_again(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    session, path = Session(pipeline, "tiny"), tmp_path / "picture.png"
    request = Request(prompt="a cat", **SIZE, steps=1, guidance=1, image=str(path))
    made = []
    for seed in (1, 2):
        Image.fromarray(picture(seed)).save(path)
        made.append(session.denoise(request))
    assert not torch.equal(made[0][:, :, :1], made[1][:, :, :1])


# --- Command ------------------------------------------------------------------------------------------------


FAST = ("--frames", 17, "--height", 32, "--width", 48, "--steps", 2, "--guidance", 1, "--dtype", "fp32")


def test_the_command_takes_pictures_and_clips(osp: Command, tiny_model: Path, tmp_path: Path) -> None:
    Image.fromarray(picture(1)).save(tmp_path / "a.png")
    with VideoWriter(tmp_path / "clip.mp4", fps=24) as writer:
        writer.write(torch.as_tensor(clip(20)))
    out = tmp_path / "out"
    model = ("--model", tiny_model, *FAST, "--out", out)
    given = osp("generate", "a cat", *model, "--image", tmp_path / "a.png")
    assert given.code == 0, given.err
    assert "this model was not trained for first" in given.log
    rows = [
        {"prompt": "on", "video": str(tmp_path / "clip.mp4")},
        {"prompt": "both", "image": str(tmp_path / "a.png"), "last_image": str(tmp_path / "a.png")},
        {"prompt": "longer", "extend": 16},
    ]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    many = osp("generate", tmp_path / "many.jsonl", *model)
    assert many.code == 0, many.err
    lengths = [len(read_end(path, frames=17, fps=24)) for path in sorted(out.glob("*.mp4"))]
    assert lengths == [17] * 4
    assert len(list(out.glob("0002_longer*.mp4"))) == 1
    again = osp("generate", tmp_path / "many.jsonl", *model)
    assert "3 of 3 is done" in again.log


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--image", "none.png"), "none.png does not exist"),
        (("--image", "text.png"), "text.png cannot be read as a picture"),
        (("--image", "thin.png"), "thin.png has 1 x 500 pixels: a side needs 16 at least"),
        (("--image", "a.png", "--video", "a.png"), "give image or video"),
        (("--last-image", "a.png", "--frames", "1"), "a picture of 1 frame has no last frame"),
        (("--video", "text.mp4"), "text.mp4"),
        (("--video", "a.png"), "a.png has 1 frames at 24 frames a second"),
        (("--extend", "20"), "extend must be a multiple of 8, got 20: use 16"),
        (("--extend", "16", "--overlap", "10"), "overlap: frames must be 8k"),
        (
            ("--extend", "16", "--overlap", "17"),
            "overlap: 17 given frames leave nothing to generate of a video of 17",
        ),
        (("--overlap", "9"), "--overlap has no effect"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    osp: Command,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    fault: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no picture")
    Path("text.mp4").write_text("no video")
    Image.fromarray(picture(1)).save("a.png")
    Image.new("RGB", (1, 500)).save("thin.png")
    found = osp("generate", "a cat", "--model", tiny_model, *FAST, "--out", "out", *options)
    assert fault in mistake(found)
    assert "loading" not in found.log
    assert not Path("out").exists()
