"""The job behind `osp generate`: prompt files, names of files, what is written, stopping and continuing."""

import json
import logging
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import av
import pytest
import torch
from av.video.stream import VideoStream
from PIL import Image, PngImagePlugin
from safetensors import safe_open

from opensoraplan.data.video import read_frames
from opensoraplan.generate import saved
from opensoraplan.generate.job import Progress, Targets, check_targets, read_stored_record, run, stem_of
from opensoraplan.generate.session import Session
from opensoraplan.pipeline import NonFiniteLatentsError, OpenSoraPlanPipeline, VideoOutput
from opensoraplan.requests import Request, is_prompt_file, read_requests

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"frames": 9, "height": 32, "width": 32, "steps": 1, "guidance": 1.0}
PROMPTS = ["a red ball", "waves"]
NAMES = ["0000_a-red-ball_seed0", "0001_waves_seed1"]


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> OpenSoraPlanPipeline:
    loaded = OpenSoraPlanPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def requests_of(*prompts: str, **changes: Any) -> list[Request]:  # noqa: ANN401
    settings = SMALL | changes
    return [Request(**settings | {"prompt": prompt, "seed": seed}) for seed, prompt in enumerate(prompts)]


def sample(pipeline: OpenSoraPlanPipeline, **options: Any) -> Any:  # noqa: ANN401
    """Frames straight from the pipeline, of the size of SMALL."""
    output = pipeline("a cat", height=32, width=32, seed=0, **options)
    assert isinstance(output, VideoOutput)
    return output.frames


def make(
    pipeline: OpenSoraPlanPipeline,
    out: Path,
    *prompts: str,
    resume: bool = True,
    save_every: int = 0,
    progress: Progress | None = None,
    model: str = "tiny",
    fingerprints: Mapping[str, str] = MappingProxyType({}),
    **changes: Any,  # noqa: ANN401
) -> list[Path]:
    requests = requests_of(*prompts, **changes)
    paths = check_targets(requests, out)
    paths[0].parent.mkdir(parents=True, exist_ok=True)  # as the command does
    ratios = [1.0] * requests[0].steps
    session = Session(pipeline, model, fingerprints=fingerprints, step_ratios=ratios)
    return run(session, requests, paths, resume=resume, progress=progress or Progress(save_every))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- Prompt files -------------------------------------------------------------------------------------------


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_a_prompt() -> None:
    (request,) = read_requests("a cat", {"frames": 9})
    assert (request.prompt, request.frames, request.seed, request.steps) == ("a cat", 9, 0, 50)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a cat\n\n  two dogs  \n"),
        ("windows.TXT", b"\xef\xbb\xbfa cat\r\n\r\n \r\ntwo dogs\r\n"),
        ("no newline.txt", "a cat\ntwo dogs"),
        ("p.jsonl", '{"prompt": "a cat"}\n\n{"prompt": "two dogs"}\n'),
        ("windows.jsonl", b'\xef\xbb\xbf{"prompt": "a cat"}\r\n{"prompt": "two dogs"}\r\n'),
        ("p.csv", "prompt\na cat\n\ntwo dogs\n"),
        ("excel.csv", b'\xef\xbb\xbfseed,prompt,,\r\n,a cat,,\r\n,,,\r\n,"two dogs",,\r\n'),
        ("by hand.csv", 'prompt, steps\na cat, \n"two dogs", 50\n'),
    ],
)
def test_prompt_files(tmp_path: Path, name: str, content: str | bytes) -> None:
    requests = read_requests(write(tmp_path, name, content), {"seed": 7})
    assert [(request.prompt, request.seed) for request in requests] == [("a cat", 7), ("two dogs", 8)]
    assert {request.steps for request in requests} == {50}


def test_rows_set_options(tmp_path: Path) -> None:
    rows = '{"prompt": "a", "seed": 40, "frames": 1}\n{"prompt": "b", "guidance_interval": [0.1, 0.9]}\n'
    first, second = read_requests(write(tmp_path, "p.jsonl", rows), {"frames": 17, "steps": 3})
    assert (first.seed, first.frames, first.steps) == (40, 1, 3)
    assert (second.seed, second.frames, second.guidance_interval) == (1, 17, (0.1, 0.9))

    table = (
        'prompt,guidance_interval,dynamic_shift,fps,negative_prompt\n"a, b",0.1 0.9,true,12,"no ""rain"""\n'
    )
    (request,) = read_requests(write(tmp_path, "p.csv", table), {})
    assert request.prompt == "a, b"
    assert request.guidance_interval == (0.1, 0.9)
    assert request.dynamic_shift is True
    assert request.fps == 12
    assert request.negative_prompt == 'no "rain"'


def test_each_copy_has_its_own_seed(tmp_path: Path) -> None:
    rows = '{"prompt": "a"}\n{"prompt": "b", "seed": 50}\n{"prompt": "c"}\n'
    requests = read_requests(write(tmp_path, "p.jsonl", rows), {"seed": 3}, copies=2)
    assert [(r.prompt, r.seed) for r in requests] == [
        ("a", 3), ("a", 4), ("b", 50), ("b", 51), ("c", 7), ("c", 8),
    ]  # fmt: skip


BAD_FILES = {
    "empty.txt": ("", "empty.txt has no prompts"),
    "blank.txt": ("\n \r\n", "blank.txt has no prompts"),
    "empty.jsonl": ("", "empty.jsonl has no prompts"),
    "empty.csv": ("", "empty.csv has no prompts"),
    "header.csv": ("prompt,seed\n", "header.csv has no prompts"),
    "utf16.txt": ("a cat".encode("utf-16"), r"utf16.txt is not UTF-8 text \(byte 0\)"),
    "latin.csv": (b"prompt\ncaf\xe9\n", "latin.csv is not UTF-8 text"),
    "bad.jsonl": (
        '{"prompt": "a"}\n{"prompt": }\n',
        "is not valid JSON: Expecting value in line 2, column 12",
    ),
    "list.jsonl": ('["a"]\n', r'line 1 must be an object as \{"prompt": "..."\}, got \["a"\]'),
    "text.jsonl": ("a cat\n", "is not valid JSON: .* in line 1"),
    "key.jsonl": (
        '{"prompt": "a", "frame": 9}\n',
        r"line 1: unknown key 'frame' \(did you mean 'frames'\?\)",
    ),
    "missing.jsonl": ('{"seed": 1}\n', "line 1: prompt: Field required"),
    "space.jsonl": ('\n\n{"prompt": " "}\n', "line 3: prompt: the prompt is empty, got ' '"),
    "number.jsonl": ('{"prompt": 3}\n', "line 1: prompt: .*string, got 3"),
    "nan.jsonl": ('{"prompt": "a", "guidance": NaN}\n', "NaN is not a number of JSON in line 1"),
    "half.jsonl": (r'{"prompt": "a \ud83d"}', "line 1: prompt: character 3 is half of one"),
    "nul.jsonl": (r'{"prompt": "a\u0000"}', "line 1: prompt: character 2 is NUL"),
    "frames.jsonl": ('{"prompt": "a"}\n{"prompt": "b", "frames": 10}', "line 2: .*got 10: use 9 or 17"),
    "seed.jsonl": ('{"prompt": "a", "seed": -1}', "line 1: seed: .*greater than or equal to 0, got -1"),
    "seed.csv": ("prompt,seed\na,\nb,x\n", "seed.csv, line 3: seed: .*integer.*, got 'x'"),
    "column.csv": ("Prompt,seed\na,1\n", "column.csv has no column prompt: its first line has Prompt, seed"),
    "semicolon.csv": ("prompt;seed\na;1\n", "no column prompt: its first line has prompt;seed"),
    "extra.csv": ("prompt,mood\na,calm\n", "extra.csv, line 2: unknown key 'mood'"),
    "cells.csv": ("prompt\na, b\n", "cells.csv, line 2: more cells than the header has columns"),
    "quote.csv": ('prompt\n"a\nb\n', "quote.csv, after line 1: unexpected end of data"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    with pytest.raises(ValueError, match=message):
        read_requests(write(tmp_path, name, content), {})


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"prompts\.txt does not exist .* full stop behind it"):
        read_requests(str(tmp_path / "prompts.txt"), {})
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder\.txt does not exist"):
        read_requests(str(tmp_path / "folder.txt"), {})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_requests("a very long prompt " * 300 + "about notes.txt", {})
    with pytest.raises(
        ValueError, match=r"config\.json is a file, but not of prompts: .* \.txt, \.jsonl, \.csv"
    ):
        read_requests(write(tmp_path, "config.json", "{}"), {})


def test_a_full_stop_makes_a_prompt() -> None:
    assert is_prompt_file("a scan of notes.txt")
    assert not is_prompt_file("a scan of notes.txt.")
    (request,) = read_requests("a scan of notes.txt.", {})
    assert request.prompt == "a scan of notes.txt."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 10}, "the options: frames must be 8k .*got 10: use 9 or 17"),
        ({"height": 100}, "the options: .*height 100: the nearest valid size is 96 x 1024"),
        ({"steps": 0}, "the options: steps: .*got 0"),
        ({"guidance": -1.0}, "the options: guidance: .*got -1.0"),
        ({"guidance_rescale": 2.0}, "the options: guidance_rescale: .*got 2.0"),
        ({"guidance_interval": (0.9, 0.1)}, "0 <= start <= end <= 1, got 0.9 0.1"),
        ({"fps": 0.0005}, r"the options: fps: .*greater than or equal to 0\.001, got 0\.0005"),
        ({"fps": 1001.0}, "the options: fps: .*less than or equal to 1000, got 1001"),
        ({"shift": float("inf")}, "the options: shift: .*got inf"),
        ({"shift": 3.0, "dynamic_shift": True}, "shift 3 has no use with dynamic_shift"),
        ({"shift": 3.0, "linear_quadratic": True}, "shift 3 has no use with linear_quadratic"),
        ({"linear_quadratic": True, "dynamic_shift": True}, "has no shift: leave dynamic_shift out"),
        ({"linear_quadratic": True, "steps": 7}, "even number of steps, got 7: use 8"),
        ({"step_cache": 0.1, "guidance_interval": (0.1, 1.0)}, "that begins at 0 .*got 0.1 1"),
        (
            {"step_cache": 0.1, "guidance_interval": (0.0, 0.5), "batched_guidance": True},
            "one batch, ends",
        ),
        ({"seed": 2**64}, "the options: seed: .*less than"),
    ],
)
def test_bad_settings_are_not_blamed_on_a_file(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_requests(write(tmp_path, "p.txt", "a cat\n"), settings)


def test_no_copies() -> None:
    with pytest.raises(ValueError, match="videos_per_prompt must be from 1 to 10,000, got 0"):
        read_requests("a cat", {}, copies=0)


# --- Names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A red ball, rolling!", "a-red-ball-rolling"),
        ("../../etc/passwd", "etc-passwd"),
        (r"C:\videos\cat", "c-videos-cat"),
        ("ein Kätzchen läuft", "ein-kätzchen-läuft"),
        ("一只猫 🐈 在海滩上", "一只猫-在海滩上"),
        ("🎉🎉", "video"),
        ("first line\nsecond", "first-line-second"),
    ],
)
def test_stems(prompt: str, stem: str) -> None:
    assert stem_of(prompt) == stem


@pytest.mark.parametrize("letter", ["a", "é", "猫", "𐍈"])
def test_long_prompts_make_names_that_fit(tmp_path: Path, letter: str) -> None:
    requests = requests_of(letter * 5000, "b", seed=2**61)
    first, _ = check_targets(requests, tmp_path)
    assert len(first.name.encode()) < 160
    assert first.name.startswith(f"0000_{letter}")
    first.with_suffix(".latents.safetensors").touch()


def test_the_longest_name_that_is_taken_has_room_for_latents(tmp_path: Path) -> None:
    lengths = []
    for length in range(200, 240):
        out = tmp_path / ("a" * length + ".mp4")
        try:
            check_targets(requests_of("a"), out)
        except ValueError:
            break
        lengths.append(length)
        # Of another video that has latents there.
        place = saved.latents_path(out.with_stem(f"{out.stem}_99"))
        saved.write(place, saved.SavedLatents(torch.zeros(1), 1, {}, {}))
    assert lengths[-1] < 239
    assert names(tmp_path) == [f"{'a' * length}_99.latents.safetensors" for length in lengths]


def test_a_folder_may_be_new_and_is_not_made_by_a_check(tmp_path: Path) -> None:
    assert check_targets(requests_of("a"), tmp_path / "new/deep") == [tmp_path / "new/deep/a_seed0.mp4"]
    assert check_targets(requests_of("a"), tmp_path / "other/b.mp4") == [tmp_path / "other/b.mp4"]
    assert check_targets(requests_of("a", frames=1), tmp_path / "b.PNG") == [tmp_path / "b.PNG"]
    assert names(tmp_path) == []


def test_out_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*file: it is a file, not a folder"):
        Targets(tmp_path / "file", count=1)
    with pytest.raises(ValueError, match=r"cannot write to .*file/below: Not a directory"):
        Targets(tmp_path / "file/below", count=1)
    with pytest.raises(ValueError, match=r"cannot write to .*a\.mp4: File name too long"):
        Targets(tmp_path / ("a" * 300 + "a.mp4"), count=1)
    with pytest.raises(
        ValueError, match=r"one file, but there are 2 videos to make: give a folder, .*/clip$"
    ):
        Targets(tmp_path / "clip.mp4", count=2)
    with pytest.raises(ValueError, match=r"as \.mp4, pictures as \.png, got .*clip\.avi: use .*clip\.mp4"):
        Targets(tmp_path / "clip.avi", count=1)
    with pytest.raises(
        ValueError, match=r"9 frames are written as \.mp4, got .*c\.png: use .*c\.mp4, or 1 frame"
    ):
        check_targets(requests_of("a"), tmp_path / "c.png")
    with pytest.raises(
        ValueError, match=r"1 frame is written as \.png, got .*c\.mp4: use .*c\.png, or 9 frames"
    ):
        check_targets(requests_of("a", frames=1), tmp_path / "c.mp4")
    assert names(tmp_path) == ["file"]


# --- Videos and pictures ------------------------------------------------------------------------------------


def test_a_video_and_its_record(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    prompt = 'Ein "Kätzchen" 🐈, läuft\nweg'
    (path,) = make(pipeline, tmp_path, prompt, fps=12.5, frames=17, height=48, guidance=2.0)
    with av.open(str(path)) as container:
        stream = cast(VideoStream, container.streams.video[0])
        assert stream.codec_context.codec.canonical_name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height) == (32, 48)
        assert stream.average_rate == Fraction(25, 2)
        assert len(list(container.decode(stream))) == 17
        assert container.metadata["title"] == prompt
        metadata = json.loads(container.metadata["comment"])
    assert names(tmp_path) == ["ein-kätzchen-läuft-weg_seed0.json", "ein-kätzchen-läuft-weg_seed0.mp4"]
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert record == metadata == read_stored_record(path)
    wanted = {
        "model": "tiny",
        "prompt": prompt,
        "seed": 0,
        "frames": 17,
        "fps": 12.5,
        "guidance": 2.0,
        "dtype": "float32",
        "sparse_n": [1, 2, 1],
        "max_text_tokens": 512,
    }
    assert {key: record[key] for key in wanted} == wanted
    assert record["prompt_settings"]["template"] == "high quality, {}"
    assert record["scheduler"] == {
        "name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0, "use_dynamic_shifting": False,
    }  # fmt: skip


def test_a_picture_and_its_record(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    (path,) = make(pipeline, tmp_path / "cat.png", "a cat 🐈", frames=1, width=48)
    with Image.open(path) as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (48, 32), "RGB")
        metadata = json.loads(picture.info["comment"])
    assert metadata["prompt"] == "a cat 🐈"
    assert (
        metadata
        == json.loads((tmp_path / "cat.json").read_text(encoding="utf-8"))
        == read_stored_record(path)
    )
    assert names(tmp_path) == ["cat.json", "cat.png"]


def test_the_pixels_are_those_of_the_pipeline(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    (path,) = make(pipeline, tmp_path, "a cat", frames=1, guidance=3.0, steps=2)
    ((wanted,),) = sample(pipeline, num_frames=1, num_inference_steps=2, guidance_scale=3.0)
    with Image.open(path) as picture:
        assert picture.tobytes() == wanted.tobytes()


def test_nothing_is_overwritten(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    (tmp_path / "cat.json").write_text("mine")
    out = tmp_path / "cat.mp4"
    assert make(pipeline, out, "a cat", resume=False) == [tmp_path / "cat_1.mp4"]
    assert make(pipeline, out, "a cat", resume=False) == [tmp_path / "cat_2.mp4"]
    picture = make(pipeline, tmp_path / "cat_1.png", "a cat", frames=1, resume=False)
    assert picture == [tmp_path / "cat_1_1.png"]
    assert (tmp_path / "cat.json").read_text() == "mine"
    assert json.loads((tmp_path / "cat_1.json").read_text())["frames"] == 9
    assert names(tmp_path) == [
        "cat.json", "cat_1.json", "cat_1.mp4", "cat_1_1.json", "cat_1_1.png", "cat_2.json", "cat_2.mp4",
    ]  # fmt: skip


# --- Stopping and continuing --------------------------------------------------------------------------------


class Denoiser:
    """Counts the steps of a pipeline, and breaks one of them if asked to."""

    def __init__(self, pipeline: OpenSoraPlanPipeline) -> None:
        self.steps = 0
        self.broken: dict[int, BaseException] = {}
        self.handle = pipeline.transformer.register_forward_pre_hook(self._see)

    def _see(self, *_: object) -> None:
        self.steps += 1
        if error := self.broken.get(self.steps):
            raise error


@pytest.fixture
def denoiser(pipeline: OpenSoraPlanPipeline) -> Iterator[Denoiser]:
    watched = Denoiser(pipeline)
    yield watched
    watched.handle.remove()


def test_what_is_done_is_passed_over(
    pipeline: OpenSoraPlanPipeline, denoiser: Denoiser, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = make(pipeline, tmp_path, *PROMPTS)
    assert [path.stem for path in made] == NAMES
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert make(pipeline, tmp_path, *PROMPTS) == made
    assert denoiser.steps == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert f"2 of 2 is done: {made[1]}" in caplog.messages

    # One more prompt at the end of the file, and a json that was lost.
    record = made[0].with_suffix(".json").read_bytes()
    made[0].with_suffix(".json").unlink()
    assert make(pipeline, tmp_path, *PROMPTS, "rain")[:2] == made
    assert denoiser.steps == 3
    assert made[0].with_suffix(".json").read_bytes() == record


def test_other_settings_make_other_videos(
    pipeline: OpenSoraPlanPipeline, denoiser: Denoiser, tmp_path: Path
) -> None:
    made = make(pipeline, tmp_path, *PROMPTS)
    again = make(pipeline, tmp_path, *PROMPTS, steps=2)
    assert [path.stem for path in again] == [f"{name}_1" for name in NAMES]
    assert make(pipeline, tmp_path, *PROMPTS, steps=2) == again
    assert make(pipeline, tmp_path, *PROMPTS) == made
    assert denoiser.steps == 6


def test_settings_of_the_model_count_too(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    first = make(pipeline, tmp_path, "a cat")
    pipeline.vae.enable_tiling()
    try:
        tiled = make(pipeline, tmp_path, "a cat")
    finally:
        pipeline.vae.disable_tiling()
    assert tiled != first
    assert read_stored_record(tiled[0])["vae_tiling"] == [256, 64]  # type: ignore[index]
    assert make(pipeline, tmp_path, "a cat") == first


def test_another_version_of_ours_continues(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    made = make(pipeline, tmp_path, "a cat", frames=1)
    record = read_stored_record(made[0])
    assert record is not None
    info = PngImagePlugin.PngInfo()
    info.add_itxt("comment", json.dumps(record | {"opensoraplan": "0.0.1"}))
    with Image.open(made[0]) as picture:
        picture.save(made[0], pnginfo=info)
    assert make(pipeline, tmp_path, "a cat", frames=1) == made


OLD, NEW = {"transformer": "a" * 32, "vae": "c" * 32}, {"transformer": "b" * 32, "vae": "c" * 32}


def test_the_model_of_a_video_is_its_weights_not_their_path(
    pipeline: OpenSoraPlanPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made = make(pipeline, tmp_path, *PROMPTS, model="tiny", fingerprints=OLD)
    assert make(pipeline, tmp_path, *PROMPTS, model="/elsewhere/tiny/", fingerprints=OLD) == made
    again = make(pipeline, tmp_path, *PROMPTS, model="tiny", fingerprints=NEW)
    assert [path.stem for path in again] == [f"{name}_1" for name in NAMES]
    assert f"{made[0]} was made by another model (transformer): making a new video" in caplog.messages
    assert make(pipeline, tmp_path, *PROMPTS, model="tiny", fingerprints=NEW) == again


def test_a_video_from_before_fingerprints_is_told_by_the_path(
    pipeline: OpenSoraPlanPipeline, tmp_path: Path
) -> None:
    made = make(pipeline, tmp_path, "a cat", model="tiny")
    assert "fingerprint" not in (read_stored_record(made[0]) or {})
    assert make(pipeline, tmp_path, "a cat", model="tiny", fingerprints=OLD) == made
    assert make(pipeline, tmp_path, "a cat", model="other", fingerprints=OLD) != made


def test_another_config_and_other_ratios_are_another_model(pipeline: OpenSoraPlanPipeline) -> None:
    request = requests_of("a cat", step_cache=0.1)[0]
    first, other = (
        Session(pipeline, "tiny", fingerprints=OLD, step_ratios=ratios).record(request)
        for ratios in ([1.0, 0.9], [1.0, 0.8])
    )
    assert saved.differing_parts(first, other) == ["step_cache"]
    shift = pipeline.vae.config["shift"]
    pipeline.vae.register_to_config(shift=[0.5] * 32)
    try:
        moved = Session(pipeline, "tiny", fingerprints=OLD, step_ratios=[1.0, 0.9]).record(request)
    finally:
        pipeline.vae.register_to_config(shift=shift)
    assert saved.differing_parts(first, moved) == ["configs"]


@pytest.mark.parametrize("content", [b"", b"no video", b"\0\0\0\x18ftypmp42"])
def test_a_stranger_of_the_same_name_is_left_alone(
    pipeline: OpenSoraPlanPipeline, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "a-cat_seed0.mp4").write_bytes(content)
    assert make(pipeline, tmp_path, "a cat") == [tmp_path / "a-cat_seed0_1.mp4"]
    assert make(pipeline, tmp_path, "a cat") == [tmp_path / "a-cat_seed0_1.mp4"]
    assert (tmp_path / "a-cat_seed0.mp4").read_bytes() == content


def test_a_stopped_run_continues(
    pipeline: OpenSoraPlanPipeline, denoiser: Denoiser, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    denoiser.broken = {2: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        make(pipeline, tmp_path, *PROMPTS)
    assert caplog.messages[-2:] == [
        "nothing of this video is saved: it will start from the first step",
        "stopped after 1 of 2 videos: continue with the same command",
    ]
    assert names(tmp_path) == [f"{NAMES[0]}.json", f"{NAMES[0]}.mp4"]
    made = make(pipeline, tmp_path, *PROMPTS)
    assert [path.stem for path in made] == NAMES
    assert denoiser.steps == 3


def test_stopping_while_decoding_leaves_the_latents(
    pipeline: OpenSoraPlanPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    caplog.set_level(logging.INFO)
    handle = pipeline.vae.decoder.register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            make(pipeline, tmp_path, "a cat", resume=False)
    finally:
        handle.remove()
    assert caplog.messages[-1] == "stopped after 0 of 1 videos: continue with the same command and --resume"
    assert names(tmp_path) == ["a-cat_seed0.latents.safetensors"]


# --- Failures -----------------------------------------------------------------------------------------------


def test_nan_keeps_the_last_good_latents(
    pipeline: OpenSoraPlanPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def poison(_module: torch.nn.Module, _inputs: tuple, output: tuple) -> tuple:
        calls.append(output)
        return tuple(part * (float("nan") if len(calls) == 3 else 1.0) for part in output)

    handle = pipeline.transformer.register_forward_hook(poison)
    try:
        with pytest.raises(NonFiniteLatentsError, match="after step 3 of 4") as caught:
            make(pipeline, tmp_path, "a cat", steps=4)
    finally:
        handle.remove()
    assert names(tmp_path) == ["a-cat_seed0.latents.safetensors"]
    path = tmp_path / "a-cat_seed0.latents.safetensors"
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("latents"), caught.value.last_good)
        record = json.loads(file.metadata()["record"])
    assert (record["prompt"], record["step"], record["steps"]) == ("a cat", 2, 4)
    assert f"the latents after step 2 of 4 are saved in {path}" in caplog.messages


def test_a_step_cache_does_not_go_on_from_the_middle(
    pipeline: OpenSoraPlanPipeline, denoiser: Denoiser, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def poison(_module: torch.nn.Module, _inputs: tuple, output: tuple) -> tuple:
        return tuple(part * (float("nan") if denoiser.steps == 3 else 1.0) for part in output)

    handle = pipeline.transformer.register_forward_hook(poison)
    try:
        with pytest.raises(NonFiniteLatentsError):
            make(pipeline, tmp_path, "a cat", steps=4, step_cache=0.1)
    finally:
        handle.remove()
    assert names(tmp_path) == ["a-cat_seed0.latents.safetensors"]
    assert "with a step cache, latents are saved only after the last step" in caplog.messages
    make(pipeline, tmp_path, "a cat", steps=4, step_cache=0.1)
    assert denoiser.steps == 3 + 4
    assert names(tmp_path) == [
        "a-cat_seed0.json", "a-cat_seed0.mp4", "a-cat_seed0_1.latents.safetensors",
    ]  # fmt: skip


def test_latents_outlive_a_failure_to_write(
    pipeline: OpenSoraPlanPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    handle = pipeline.vae.decoder.register_forward_hook(full)
    try:
        with pytest.raises(OSError, match="No space left"):
            make(pipeline, tmp_path, "a cat")
    finally:
        handle.remove()
    assert names(tmp_path) == ["a-cat_seed0.latents.safetensors"]
    with safe_open(tmp_path / "a-cat_seed0.latents.safetensors", framework="pt") as file:
        latents = file.get_tensor("latents")
    wanted = sample(pipeline, num_frames=9, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    assert torch.equal(latents, wanted)
    assert "the latents after the last step are saved in" in caplog.text


def test_starting_again_keeps_the_saved_latents(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    for part, calls in ((pipeline.vae.decoder, 0), (pipeline.transformer, 2)):
        before_it_stops = iter(range(calls))

        def stop(*_: object, left: Iterator[int] = before_it_stops) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        handle = part.register_forward_pre_hook(stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                make(pipeline, tmp_path, "a cat", steps=4, save_every=1, resume=False)
        finally:
            handle.remove()
    first, second = (tmp_path / f"a-cat_seed0{number}.latents.safetensors" for number in ("_1", ""))
    assert (saved.read_record(first)[1], saved.read_record(second)[1]) == (4, 2)


def test_a_folder_that_went_away(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    requests = requests_of("a cat")
    paths = check_targets(requests, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        run(Session(pipeline, "tiny"), requests, paths, resume=False)


def test_a_size_beyond_memory(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    with pytest.raises(MemoryError, match="100001 frames of 16384 x 16384 do not fit into memory"):
        make(pipeline, tmp_path, "a cat", frames=100_001, height=16_384, width=16_384)
    assert names(tmp_path) == []


def test_other_failures_are_not_hidden(
    pipeline: OpenSoraPlanPipeline, denoiser: Denoiser, tmp_path: Path
) -> None:
    denoiser.broken = {1: RuntimeError("a bug")}
    with pytest.raises(RuntimeError, match="a bug"):
        make(pipeline, tmp_path, "a cat")


# --- Latents that are kept ----------------------------------------------------------------------------------


def make_until(
    pipeline: OpenSoraPlanPipeline,
    denoiser: Denoiser,
    folder: Path,
    *,
    step: int,
    steps: int,
    **changes: Any,  # noqa: ANN401
) -> None:
    """A run that is stopped in the step behind `step`; latents are saved after every step."""
    denoiser.broken = {denoiser.steps + step + 1: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        make(pipeline, folder, "a cat", steps=steps, save_every=1, **changes)


@pytest.mark.parametrize("solver", ["euler", "adams"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_stopped_video_goes_on_bit_for_bit(
    pipeline: OpenSoraPlanPipeline, denoiser: Denoiser, tmp_path: Path, step: int, solver: str
) -> None:
    (whole,) = make(pipeline, tmp_path / "whole", "a cat", steps=4, solver=solver)
    make_until(pipeline, denoiser, tmp_path / "stopped", step=step, steps=4, solver=solver)
    assert names(tmp_path / "stopped") == ["a-cat_seed0.latents.safetensors"]
    before = denoiser.steps
    (resumed,) = make(pipeline, tmp_path / "stopped", "a cat", steps=4, solver=solver)
    assert denoiser.steps - before == 4 - step
    assert torch.equal(read_frames(resumed), read_frames(whole))
    assert names(tmp_path / "stopped") == ["a-cat_seed0.json", "a-cat_seed0.mp4"]


def test_progress_is_told_and_may_stop_the_video(pipeline: OpenSoraPlanPipeline, tmp_path: Path) -> None:
    steps: list[int] = []
    frames: list[int] = []

    def stop_after(step: int) -> None:
        steps.append(step)
        if step == 3:
            raise KeyboardInterrupt

    def stop_decoding(count: int) -> None:
        frames.append(count)
        raise KeyboardInterrupt

    (whole,) = make(pipeline, tmp_path / "whole", "a cat", steps=4, frames=17)
    for progress in (Progress(10, stop_after), Progress(10, steps.append, stop_decoding)):
        with pytest.raises(KeyboardInterrupt):
            make(pipeline, tmp_path, "a cat", steps=4, frames=17, progress=progress)
    (resumed,) = make(
        pipeline, tmp_path, "a cat", steps=4, frames=17, progress=Progress(1, None, frames.append)
    )
    assert steps == [1, 2, 3, 4]
    assert (frames[0], frames[-1]) == (frames[1], 17)
    assert torch.equal(read_frames(resumed), read_frames(whole))


def test_latents_of_another_video_are_neither_used_nor_lost(
    pipeline: OpenSoraPlanPipeline, denoiser: Denoiser, tmp_path: Path
) -> None:
    make_until(pipeline, denoiser, tmp_path, step=1, steps=4)
    make_until(pipeline, denoiser, tmp_path, step=2, steps=5)
    assert names(tmp_path) == ["a-cat_seed0.latents.safetensors", "a-cat_seed0_1.latents.safetensors"]
    make(pipeline, tmp_path, "a cat", steps=5)
    record, step = saved.read_record(tmp_path / "a-cat_seed0.latents.safetensors")
    assert (record["steps"], step) == (4, 1)
    assert "a-cat_seed0_1.latents.safetensors" not in names(tmp_path)


def test_latents_of_other_weights_are_neither_used_nor_lost(
    pipeline: OpenSoraPlanPipeline, denoiser: Denoiser, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_until(pipeline, denoiser, tmp_path, step=2, steps=4, fingerprints=OLD)
    before = denoiser.steps
    make(pipeline, tmp_path, "a cat", steps=4, fingerprints=NEW)
    assert denoiser.steps - before == 4
    kept = tmp_path / "a-cat_seed0.latents.safetensors"
    assert saved.read_record(kept)[1] == 2
    said = f"{kept} was saved with another model (transformer): starting from the first step"
    assert said in caplog.messages
    make(pipeline, tmp_path, "a cat", steps=4, model="elsewhere", fingerprints=OLD)
    assert denoiser.steps - before == 4 + 2
    assert not kept.exists()


def test_finished_latents_are_only_decoded(
    pipeline: OpenSoraPlanPipeline, denoiser: Denoiser, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    handle = pipeline.vae.decoder.register_forward_hook(full)
    with pytest.raises(OSError, match="No space left"):
        make(pipeline, tmp_path, "a cat")
    handle.remove()
    before = denoiser.steps
    (path,) = make(pipeline, tmp_path, "a cat")
    assert denoiser.steps == before
    assert names(tmp_path) == ["a-cat_seed0.json", path.name]


def test_a_first_step_that_cannot_be(pipeline: OpenSoraPlanPipeline) -> None:
    with pytest.raises(ValueError, match="first_step must be 0 to 1, got 2"):
        sample(pipeline, num_inference_steps=2, first_step=2)
    with pytest.raises(ValueError, match="first_step 1 needs the latents after 1 steps"):
        sample(pipeline, num_inference_steps=2, first_step=1)
    with pytest.raises(ValueError, match="previous_velocity needs first_step"):
        sample(pipeline, num_inference_steps=2, previous_velocity=torch.zeros(1))
