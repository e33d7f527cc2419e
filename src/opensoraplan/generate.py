"""The job behind `osp generate`: prompts in, one mp4 (or png) and one json for each video out; resumable.

The sampling itself is in pipeline.py, reading and writing video in data/video.py, the command line in cli.py.
"""

import csv
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_validator, model_validator

from opensoraplan import shapes
from opensoraplan.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from opensoraplan.models.text import PromptEmbeds
    from opensoraplan.parallel.ranks import Ranks
    from opensoraplan.pipeline import OpenSoraPlanPipeline

logger = logging.getLogger(__name__)

PROMPT_FILES = (".txt", ".jsonl", ".csv")
OTHER_FORMATS = (".avi", ".gif", ".jpeg", ".jpg", ".m4v", ".mkv", ".mov", ".webm", ".webp")
# Of a name made of a prompt, in bytes: most file systems take 255 for a whole name.
STEM_BYTES = 120


class Request(Settings):
    """One video to make. A prompt file's row may set any of these; a run's settings are the defaults for its
    rows.
    """

    prompt: str
    negative_prompt: str = ""
    frames: int = 121
    height: int = 576
    width: int = 1024
    fps: float = Field(24, gt=0, le=1000)
    steps: int = Field(50, ge=1)
    guidance: float = Field(8.0, ge=0, allow_inf_nan=False)
    guidance_rescale: float = Field(0.7, ge=0, le=1)
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    batched_guidance: bool = False
    shift: float | None = Field(None, gt=0, allow_inf_nan=False)
    dynamic_shift: bool | None = None
    linear_quadratic: bool = False
    seed: int = Field(0, ge=0, lt=2**62)

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _check_text(cls, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"character {error.start + 1} is half of one: is the text UTF-8?") from None
        if "\0" in text:
            raise ValueError(f"character {text.index(chr(0)) + 1} is NUL, which no text has")
        return text

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return prompt

    @field_validator("guidance_interval", mode="before")
    @classmethod
    def _split_interval(cls, value: Any) -> Any:  # noqa: ANN401 (whatever a file holds)
        """A cell of a .csv holds both numbers."""
        return value.replace(",", " ").split() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        shapes.check_frames(self.frames)
        shapes.check_sides(self.height, self.width)
        start, end = self.guidance_interval
        if not 0 <= start <= end <= 1:
            raise ValueError(f"guidance_interval must be 0 <= start <= end <= 1, got {start:g} {end:g}")
        if self.shift is not None and (self.dynamic_shift or self.linear_quadratic):
            other = "dynamic_shift" if self.dynamic_shift else "linear_quadratic"
            raise ValueError(f"shift {self.shift:g} has no use with {other}: give one of them")
        if self.linear_quadratic and self.steps % 2:
            raise ValueError(
                "the linear-quadratic schedule needs an even number of steps, "
                f"got {self.steps}: use {self.steps + 1}"
            )
        return self


def is_prompt_file(prompt: str) -> bool:
    """Whether this is the name of a file of prompts, there or not, rather than a prompt."""
    return Path(prompt).suffix.lower() in PROMPT_FILES


def read_requests(prompt: str, settings: dict[str, Any], *, copies: int = 1) -> list[Request]:
    """Requests from a prompt, or from a .txt (a prompt a line), .jsonl or .csv file (a column `prompt`, and
    any other field of `Request`). Each prompt gives `copies` requests. Seeds count on from the run's, or from
    a row's own.

    Raises FileNotFoundError, and ValueError that names file and line, for a file without prompts or a bad
    row.
    """
    if copies < 1:
        raise ValueError(f"videos_per_prompt must be at least 1, got {copies}")
    # First, so that a mistake in the settings is not blamed on the first line of a file.
    Request.read({**settings, "prompt": "any"}, where="the options")
    if is_prompt_file(prompt):
        rows = [(f"{prompt}, line {line}", row) for line, row in _rows(_existing_file(prompt))]
        if not rows:
            raise ValueError(f"{prompt} has no prompts")
    elif _is_file(prompt):
        raise ValueError(f"{prompt} is a file, but not of prompts: those end in {', '.join(PROMPT_FILES)}")
    else:
        rows = [("the prompt", {"prompt": prompt})]
    requests = []
    for where, row in rows:
        values = {**settings, "seed": settings.get("seed", 0) + len(requests), **row}
        first = Request.read(values, where=where)
        requests += [first.model_copy(update={"seed": first.seed + copy}) for copy in range(copies)]
    return requests


def _existing_file(prompt: str) -> Path:
    if not _is_file(prompt):
        raise FileNotFoundError(
            f"the prompt file {prompt} does not exist (if it is a prompt, put a full stop behind it)"
        )
    return Path(prompt)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long for a name
        return False


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a prompt file; blank lines are passed over."""
    kind = path.suffix.lower()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if kind == ".csv":
                yield from _csv_rows(path, csv.DictReader(file, strict=True, skipinitialspace=True))
                return
            for number, text in enumerate(file, start=1):
                if text := text.strip():
                    where = f"{path}, line {number}"
                    yield number, {"prompt": text} if kind == ".txt" else _json_row(text, where=where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def _json_row(text: str, *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error.msg} at character {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f'{where} must be an object as {{"prompt": "..."}}, got {text[:40]}')
    return row


def _csv_rows(path: Path, reader: "csv.DictReader[str]") -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows without their empty cells; empty rows are passed over. A row's line is its last."""
    try:
        columns = [name.strip() for name in reader.fieldnames or ["prompt"]]
        if "prompt" not in columns:
            raise ValueError(f"{path} has no column prompt: its first line has {', '.join(columns)}")
        reader.fieldnames = columns
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num}: more cells than the header has columns")
            if filled := {key: value.strip() for key, value in row.items() if value and value.strip()}:
                yield reader.line_num, filled
    except csv.Error as error:
        raise ValueError(f"{path}, after line {reader.line_num}: {error}") from None


class Targets:
    """Where videos go: the file of one request, or a folder with one name for each. Makes the folder, or
    raises ValueError if it cannot be written to.
    """

    def __init__(self, out: Path, *, count: int) -> None:
        if out.suffix.lower() in OTHER_FORMATS:
            raise ValueError(
                f"videos are written as .mp4, pictures as .png, got {out}: use {out.with_suffix('.mp4')}"
            )
        self.single = out if out.suffix.lower() in (".mp4", ".png") else None
        if self.single is not None and count > 1:
            raise ValueError(
                f"{out} is one file, but there are {count} videos to make: "
                f"give a folder, {out.with_suffix('')}"
            )
        self.folder = out.parent if self.single else out
        self.count = count
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"cannot write to {self.folder}: it is a file, not a folder")
        # As long as the longest name there may be, which is that of latents.
        probe = self.folder / f"{self.single.stem if self.single else ''}.osp-write-test-0001"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write to {out}: {error.strerror}") from error

    def path(self, index: int, request: Request) -> Path:
        """The name wanted for the index-th video. One frame is a png, more are an mp4."""
        suffix = ".png" if request.frames == 1 else ".mp4"
        if self.single is not None:
            if self.single.suffix.lower() != suffix:
                what = "1 frame is" if request.frames == 1 else f"{request.frames} frames are"
                other = "9 frames or more" if request.frames == 1 else "1 frame"
                raise ValueError(
                    f"{what} written as {suffix}, got {self.single}: "
                    f"use {self.single.with_suffix(suffix)}, or {other}"
                )
            return self.single
        number = f"{index:04d}_" if self.count > 1 else ""
        return self.folder / f"{number}{stem_of(request.prompt)}_seed{request.seed}{suffix}"


def stem_of(prompt: str) -> str:
    """The words of a prompt as a part of a file name, cut to STEM_BYTES."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).encode()[:STEM_BYTES].decode(errors="ignore")
    return words.strip("-") or "video"


def check_targets(requests: list[Request], out: Path) -> list[Path]:
    """The wanted path of each request's video; raises ValueError if `out` cannot take them."""
    targets = Targets(out, count=len(requests))
    return [targets.path(index, request) for index, request in enumerate(requests)]


def run(
    pipeline: "OpenSoraPlanPipeline",
    requests: list[Request],
    paths: list[Path],
    *,
    model: str | dict[str, Any],
    resume: bool,
    ranks: "Ranks | None" = None,
    all_decode: bool = False,
) -> list[Path]:
    """Make the videos one after the other and return their files.

    No file is overwritten: a name that is taken gets a number. With `resume`, a request whose video is
    already among those is passed over, so that the same command continues where it was stopped. `model`, a
    folder or the files of its parts, goes into the metadata. Of several `ranks`, which all call this, the
    first writes; `all_decode`: the others have a share in decoding.

    Raises NonFiniteLatentsError if latents become NaN, after writing the last good ones beside the video, and
    MemoryError for a size that does not fit.
    """
    from opensoraplan.parallel.ranks import ALONE

    ranks = ranks or ALONE
    written: list[Path] = []
    embeds = PromptCache(pipeline)
    total = len(requests)
    try:
        for number, (request, wanted) in enumerate(zip(requests, paths, strict=True), start=1):
            record = make_record(pipeline, request, model)
            done = ranks.agree(partial(find_done, wanted, record)) if resume else None
            if done is not None:
                logger.info("%d of %d is done: %s", number, total, done)
                written.append(done)
                continue
            logger.info("%d of %d: %r, seed %d", number, total, request.prompt, request.seed)
            with explained_memory(request):
                if ranks.first:
                    written.append(make_video(pipeline, request, embeds, wanted, record))
                    logger.info("wrote %s", written[-1])
                else:
                    help_make_video(pipeline, request, embeds, decode=all_decode)
    except KeyboardInterrupt:
        hint = ": the same command continues with the next" if resume else ""
        logger.info("stopped, %d of %d done%s", len(written), total, hint)
        raise
    return written


@contextmanager
def explained_memory(request: Request) -> Iterator[None]:
    """Turn torch's errors for full memory, which on a CPU have no type of their own, into a MemoryError."""
    from torch import OutOfMemoryError

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        size = f"{request.frames} frames of {request.width} x {request.height}"
        raise MemoryError(f"{size} do not fit into memory: ask for fewer or smaller ones") from error


def make_record(
    pipeline: "OpenSoraPlanPipeline", request: Request, model: str | dict[str, Any]
) -> dict[str, Any]:
    """All that decides how a video looks, to be stored with it. Values are those of JSON."""
    scheduler = pipeline.scheduler.config
    shifts = ("shift", "flow_shift", "use_dynamic_shifting")
    record = {
        "model": model,
        **request.model_dump(mode="json"),
        "prompt_settings": vars(pipeline.prompt_settings),
        "max_text_tokens": pipeline.config["max_text_tokens"],
        "scheduler": {
            "name": type(pipeline.scheduler).__name__,
            **{key: scheduler[key] for key in shifts if key in scheduler},
        },
        "sparse_n": pipeline.transformer.config["sparse_n"],
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "vae_dtype": str(pipeline.vae.dtype).removeprefix("torch."),
        "vae_tiling": pipeline.vae.tiling,
        "opensoraplan": version("opensoraplan"),
    }
    return json.loads(json.dumps(record))


class PromptCache:
    """The last prompt and the last negative prompt of a run, encoded: requests in a row often share one."""

    def __init__(self, pipeline: "OpenSoraPlanPipeline") -> None:
        self.pipeline = pipeline
        self.kept: dict[tuple[str, bool], PromptEmbeds] = {}

    def get(self, text: str, *, negative: bool = False) -> "PromptEmbeds":
        """Embeddings of a prompt, or of a negative one."""
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
    """One video and its json. Frames go into the encoder as they are decoded. Returns the path of the video.

    If sampling or decoding fails, the last latents that were good are kept beside it.
    """
    from opensoraplan.pipeline import NonFiniteLatentsError

    try:
        latents = denoise(pipeline, request, embeds)
    except NonFiniteLatentsError as error:
        saved = save_latents(error.last_good, wanted, {**record, "step": error.step - 1})
        logger.error("the last good latents, of step %d, are in %s", error.step - 1, saved)
        raise
    try:
        return write_frames(pipeline, latents, wanted, record, fps=request.fps)
    except Exception:
        saved = save_latents(latents, wanted, {**record, "step": request.steps})
        logger.error("the latents, which are finished, are in %s", saved)
        raise


def help_make_video(
    pipeline: "OpenSoraPlanPipeline", request: Request, embeds: PromptCache, *, decode: bool
) -> None:
    """What the other processes of a job do while the first makes a video."""
    latents = denoise(pipeline, request, embeds)
    if decode:
        for _ in pipeline.iter_decode(latents):
            pass


def denoise(pipeline: "OpenSoraPlanPipeline", request: Request, embeds: PromptCache) -> "Tensor":
    """Normalised latents [1, C, T, H, W] of a request."""
    from torch import Tensor

    from opensoraplan.pipeline import VideoOutput

    guided = request.guidance > 1
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
    assert isinstance(output, VideoOutput)
    assert isinstance(output.frames, Tensor)
    return output.frames


def write_frames(
    pipeline: "OpenSoraPlanPipeline", latents: "Tensor", wanted: Path, record: dict[str, Any], *, fps: float
) -> Path:
    """Decode latents [1, C, T, H, W] into an mp4, or a png of one frame, with `record` in its metadata and
    beside it as json. Returns the path of the video, which is `wanted` or has a number more.
    """
    from PIL import Image, PngImagePlugin
    from tqdm import tqdm

    from opensoraplan.data.video import VideoWriter, to_uint8

    comment = json.dumps(record, ensure_ascii=False)
    chunks = (to_uint8(frames[0] * 2 - 1) for frames in pipeline.iter_decode(latents))
    free = next(path for path in numbered(wanted) if not is_taken(path))
    if wanted.suffix.lower() == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("comment", comment)
        picture = Image.fromarray(next(chunks)[0].numpy())
        path = write_new(free, lambda file: picture.save(file, pnginfo=info))
    else:
        total = shapes.pixel_frames(latents.shape[2])
        with (
            tqdm(total=total, desc="decoding", unit="frame") as progress,
            VideoWriter(free, fps=fps, title=record["prompt"], comment=comment) as writer,
        ):
            for chunk in chunks:
                writer.write(chunk)
                progress.update(len(chunk))
        path = writer.path
    write_record(path, record)
    return path


def write_record(video: Path, record: dict[str, Any]) -> None:
    """The json beside a video, for people and tools that do not read its metadata."""
    text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
    write_new(video.with_suffix(".json"), lambda file: file.write_text(text, encoding="utf-8"))


def write_new(wanted: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` make a file, and give it the name `wanted` or, if that is taken, one with a number. Returns
    the name; nothing is left of an attempt that fails.
    """
    from opensoraplan.data.video import publish, temporary_path

    temporary = temporary_path(wanted)
    try:
        write(temporary)
        return publish(temporary, wanted)
    finally:
        temporary.unlink(missing_ok=True)


def numbered(path: Path) -> Iterator[Path]:
    """clip.mp4, clip_1.mp4, clip_2.mp4, ..."""
    yield path
    for number in itertools.count(1):
        yield path.with_name(f"{path.stem}_{number}{path.suffix}")


def is_taken(video: Path) -> bool:
    """Whether there is a video of this name, or a json, be it another video's or none's."""
    return video.exists() or video.with_suffix(".json").exists()


def find_done(wanted: Path, record: dict[str, Any]) -> Path | None:
    """The video among `wanted` and its numbered siblings that was made from this very record, by whatever
    version of ours, if there is one.
    """
    for path in itertools.takewhile(is_taken, numbered(wanted)):
        stored = stored_record(path)
        if stored is not None and {**stored, "opensoraplan": record["opensoraplan"]} == record:
            if not path.with_suffix(".json").exists():
                write_record(path, stored)
            return path
    return None


def stored_record(path: Path) -> dict[str, Any] | None:
    """The record in the metadata of a video or picture; None if there is none."""
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
        record = json.loads(comment) if comment else None
    except (OSError, ValueError, FFmpegError):
        return None
    return record if isinstance(record, dict) else None


def save_latents(latents: "Tensor", wanted: Path, record: dict[str, Any]) -> Path:
    """Latents beside the video that they were to become. Returns their path."""
    from safetensors.torch import save

    metadata = {"record": json.dumps(record, ensure_ascii=False)}
    content = save({"latents": latents.cpu().contiguous()}, metadata=metadata)
    path = wanted.with_suffix(".latents.safetensors")
    return write_new(path, lambda file: file.write_bytes(content))
