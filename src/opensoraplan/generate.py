"""The job behind `osp generate`: prompts in, one mp4 (or png) and one json for each video out; resumable.

The sampling itself is in pipeline.py, reading and writing video in data/video.py, the command line in cli.py.
"""

import csv
import json
import logging
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from opensoraplan import shapes
from opensoraplan.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from opensoraplan.models.text import PromptEmbeds
    from opensoraplan.pipeline import OpenSoraPlanPipeline

logger = logging.getLogger(__name__)

PROMPT_FILES = (".txt", ".jsonl", ".csv")
STEM_LENGTH = 60


class Request(Settings):
    """One video to make. A prompt file's row may set any of these; a run's settings are the defaults for its
    rows.
    """

    prompt: str = Field(min_length=1)
    negative_prompt: str = ""
    frames: int = 121
    height: int = 576
    width: int = 1024
    fps: float = Field(24, gt=0, le=1000)
    steps: int = Field(50, ge=1)
    guidance: float = 8.0
    guidance_rescale: float = Field(0.7, ge=0, le=1)
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    batched_guidance: bool = False
    shift: float | None = Field(None, gt=0)
    dynamic_shift: bool | None = None
    linear_quadratic: bool = False
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        shapes.check_frames(self.frames)
        shapes.check_sides(self.height, self.width)
        start, end = self.guidance_interval
        if not 0 <= start <= end <= 1:
            raise ValueError(f"guidance_interval must be 0 <= start <= end <= 1, got {start}, {end}")
        if self.linear_quadratic and self.steps % 2:
            raise ValueError(f"the linear-quadratic schedule needs an even number of steps, got {self.steps}")
        return self


def read_requests(prompt: str, settings: dict[str, Any], *, copies: int = 1) -> list[Request]:
    """Requests from a prompt, or from a .txt (a prompt a line), .jsonl or .csv file (a column `prompt`, and
    any other field of `Request`). Each prompt gives `copies` requests. Seeds count on from the run's, or from
    a row's own.

    Raises FileNotFoundError, and ValueError that names file and line, for a file without prompts or a bad
    row.
    """
    if copies < 1:
        raise ValueError(f"videos_per_prompt must be at least 1, got {copies}")
    path = Path(prompt)
    if path.suffix.lower() in PROMPT_FILES:
        if not path.is_file():
            raise FileNotFoundError(f"the prompt file {path} does not exist")
        rows = [(f"{path}, line {line}", row) for line, row in _rows(path)]
    else:
        rows = [("the settings", {"prompt": prompt})]
    if not rows:
        raise ValueError(f"{path} has no prompts")
    requests = []
    for where, row in rows:
        values = {**settings, "seed": settings.get("seed", 0) + len(requests), **row}
        first = Request.read(values, where=where)
        requests += [first.model_copy(update={"seed": first.seed + copy}) for copy in range(copies)]
    return requests


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a prompt file; blank lines are passed over."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(file)
            for row in reader:
                if None in row:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: more cells than the header has columns"
                    )
                yield reader.line_num, {key: value for key, value in row.items() if value not in (None, "")}
            return
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            if path.suffix.lower() == ".txt":
                yield number, {"prompt": text.strip()}
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be a JSON object with a prompt")
            yield number, row


class Targets:
    """Where videos go: the file of one request, or a folder with one name for each. Makes the folder, or
    raises ValueError if it cannot be written to.
    """

    def __init__(self, out: Path, *, count: int) -> None:
        self.single = out if out.suffix.lower() in (".mp4", ".png") else None
        if self.single is not None and count > 1:
            raise ValueError(f"{out} is one file, but there are {count} videos to make: give a folder")
        self.folder = out.parent if self.single else out
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / ".osp-write-test"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"cannot write to {self.folder}: {error.strerror}") from error
        self.count = count

    def path(self, index: int, request: Request) -> Path:
        """The name wanted for the index-th video. One frame is a png, more are an mp4."""
        suffix = ".png" if request.frames == 1 else ".mp4"
        if self.single is not None:
            if self.single.suffix.lower() != suffix:
                raise ValueError(f"{request.frames} frames are written as {suffix}, got {self.single}")
            return self.single
        words = re.sub(r"[^\w]+", "-", request.prompt.lower()).strip("-")[:STEM_LENGTH].strip("-") or "video"
        number = f"{index:04d}_" if self.count > 1 else ""
        return self.folder / f"{number}{words}_seed{request.seed}{suffix}"


def check_targets(requests: list[Request], out: Path) -> list[Path]:
    """The wanted path of each request's video; raises ValueError if `out` cannot take them."""
    targets = Targets(out, count=len(requests))
    return [targets.path(index, request) for index, request in enumerate(requests)]


def run(
    pipeline: "OpenSoraPlanPipeline", requests: list[Request], paths: list[Path], *, model: str, resume: bool
) -> list[Path]:
    """Make the videos one after the other and return their files.

    No file is overwritten: a name that is taken gets a number. With `resume`, a request whose video is
    already among those is passed over, so that the same command continues where it was stopped. `model` goes
    into the metadata. Raises NonFiniteLatentsError if latents become NaN, after writing the last good ones
    beside the video.
    """
    written = []
    embeds = PromptCache(pipeline)
    for index, (request, wanted) in enumerate(zip(requests, paths, strict=True)):
        record = {
            "model": model,
            **request.model_dump(mode="json"),
            "prompt_settings": vars(pipeline.prompt_settings),
            "opensoraplan": version("opensoraplan"),
        }
        if resume and (done := find_done(wanted, record)) is not None:
            logger.info("%d of %d is done: %s", index + 1, len(requests), done)
            written.append(done)
            continue
        logger.info("%d of %d: %r, seed %d", index + 1, len(requests), request.prompt, request.seed)
        written.append(make_video(pipeline, request, embeds, wanted, record))
        logger.info("wrote %s", written[-1])
    return written


class PromptCache:
    """Embeddings of prompts of a run; rows often share their negative prompt."""

    def __init__(self, pipeline: "OpenSoraPlanPipeline") -> None:
        self.pipeline = pipeline
        self.kept: dict[tuple[str, bool], PromptEmbeds] = {}

    def get(self, text: str, *, negative: bool = False) -> "PromptEmbeds":
        if (text, negative) not in self.kept:
            self.kept = {key: value for key, value in self.kept.items() if key[1] != negative}
            self.kept[text, negative] = self.pipeline.encode_prompts([text], negative=negative)
        return self.kept[text, negative]


def make_video(
    pipeline: "OpenSoraPlanPipeline",
    request: Request,
    embeds: PromptCache,
    wanted: Path,
    record: dict[str, Any],
) -> Path:
    """One video and its json. Frames go into the encoder as they are decoded."""
    from torch import Tensor

    from opensoraplan.pipeline import NonFiniteLatentsError, VideoOutput

    guided = request.guidance > 1
    try:
        output = pipeline(
            prompt_embeds=embeds.get(request.prompt),
            negative_prompt_embeds=embeds.get(request.negative_prompt, negative=True) if guided else None,
            num_frames=request.frames,
            height=request.height,
            width=request.width,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            guidance_rescale=request.guidance_rescale,
            guidance_interval=request.guidance_interval,
            batched_guidance=request.batched_guidance,
            shift=request.shift,
            use_dynamic_shifting=request.dynamic_shift,
            use_linear_quadratic_schedule=request.linear_quadratic,
            seed=request.seed,
            output_type="latent",
        )
    except NonFiniteLatentsError as error:
        saved = save_latents(error.last_good, wanted, {**record, "step": error.step - 1})
        logger.error("the latents of step %d are in %s", error.step - 1, saved)
        raise
    assert isinstance(output, VideoOutput)
    assert isinstance(output.frames, Tensor)
    return write_frames(pipeline, output.frames, wanted, record, fps=request.fps)


def write_frames(
    pipeline: "OpenSoraPlanPipeline", latents: "Tensor", wanted: Path, record: dict[str, Any], *, fps: float
) -> Path:
    """Decode latents [1, C, T, H, W] into an mp4, or a png of one frame, with `record` in its metadata and
    beside it as json. Returns the path of the video.
    """
    from PIL import Image, PngImagePlugin

    from opensoraplan.data.video import VideoWriter, publish, temporary_path, to_uint8

    comment = json.dumps(record, ensure_ascii=False)
    chunks = (to_uint8(frames[0] * 2 - 1) for frames in pipeline.iter_decode(latents))
    if wanted.suffix.lower() == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("comment", comment)
        temporary = temporary_path(wanted)
        Image.fromarray(next(chunks)[0].numpy()).save(temporary, pnginfo=info)
        path = publish(temporary, wanted)
    else:
        with VideoWriter(wanted, fps=fps, title=record["prompt"], comment=comment) as writer:
            for chunk in chunks:
                writer.write(chunk)
        path = writer.path
    write_record(path, record)
    return path


def write_record(video: Path, record: dict[str, Any]) -> None:
    """The json beside a video, for people and tools that do not read its metadata."""
    from opensoraplan.data.video import temporary_path

    path = video.with_suffix(".json")
    temporary = temporary_path(path)
    temporary.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def find_done(wanted: Path, record: dict[str, Any]) -> Path | None:
    """The video among `wanted` and its numbered siblings that was made from this very record, if there is
    one.
    """
    path, number = wanted, 0
    while path.exists():
        if stored_record(path) == record:
            if not path.with_suffix(".json").exists():
                write_record(path, record)
            return path
        number += 1
        path = wanted.with_name(f"{wanted.stem}_{number}{wanted.suffix}")
    return None


def stored_record(path: Path) -> dict[str, Any] | None:
    """The record in the metadata of a video or picture; None if it has none."""
    import av
    from av.error import FFmpegError
    from PIL import Image

    try:
        if path.suffix.lower() == ".png":
            with Image.open(path) as picture:
                comment = picture.info.get("comment")
        else:
            with av.open(str(path)) as container:
                comment = container.metadata.get("comment")
        return json.loads(comment) if comment else None
    except (OSError, ValueError, FFmpegError):
        return None


def save_latents(latents: "Tensor", wanted: Path, record: dict[str, Any]) -> Path:
    """Latents beside the video that they were to become. Returns their path."""
    from safetensors.torch import save_file

    from opensoraplan.data.video import publish, temporary_path

    path = wanted.with_suffix(".latents.safetensors")
    temporary = temporary_path(path)
    metadata = {"record": json.dumps(record, ensure_ascii=False)}
    save_file({"latents": latents.cpu().contiguous()}, temporary, metadata=metadata)
    return publish(temporary, path)
