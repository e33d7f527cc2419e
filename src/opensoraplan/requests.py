"""What `osp generate` is asked for: a prompt, or a file of prompts, with the settings of each video."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from opensoraplan.defaults import Fps, Frames, Guidance, Side, Solver, Steps, Task
from opensoraplan.documents import parse_json
from opensoraplan.settings import Settings
from opensoraplan.shapes import RELEASE, Strides, check_given, latent_shape

# Videos of one prompt; more are more commands.
MOST_COPIES = 10_000
MOST_STRENGTH = 100
PROMPT_FILES = (".txt", ".jsonl", ".csv")


class Request(Settings):
    """One video to make. Each field but `prompt` is an option of `osp generate`, and a row of a prompt file
    may set any of them; a run's settings are the defaults for its rows. The size must be one of the release's
    VAE, or of one whose strides are the `context` of `read`.
    """

    prompt: str
    frames: Frames = 121
    """Number of frames: 8k + 1, or 1 for a picture."""
    height: Side = 576
    """Height in pixels, a multiple of 16."""
    width: Side = 1024
    """Width in pixels, a multiple of 16."""
    fps: Fps = 24
    """Frames per second of the video file."""
    steps: Steps = 50
    """Number of denoising steps."""
    guidance: Guidance = 8.0
    """Classifier-free guidance scale. 1 switches guidance off and halves the time."""
    guidance_rescale: float = Field(0.7, ge=0, le=1)
    """Guidance rescale, 0 to 1. Higher values give less saturated pictures."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the steps that use guidance; 0 0.5 is the first half."""
    batched_guidance: bool = False
    """Compute both branches of guidance in one batch. Needs more memory."""
    shift: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    """Timestep shift. Higher values spend more steps at high noise."""
    dynamic_shift: bool | None = None
    """Compute the timestep shift from the frame size."""
    linear_quadratic: bool = False
    """Use the linear-quadratic schedule, which has no timestep shift."""
    solver: Solver = "euler"
    """ODE solver. adams needs about half the steps of euler for the same quality; euler is the original's."""
    step_cache: float = Field(0.0, ge=0, le=1000, allow_inf_nan=False)
    """Reuse the previous step while the predicted error stays below this value, for example 0.06. 0 is off.
    Faster, not exact. Run `osp calibrate` first.
    """
    image: str | None = None
    """Picture that the video begins with, cropped and resized to fit."""
    last_image: str | None = None
    """Picture that the video ends with, after the last extension if there are any."""
    video: str | None = None
    """Clip whose last frames the video begins with, to go on from them."""
    overlap: Frames = 9
    """Number of frames to go on from, 8k + 1, with --video and --extend."""
    extend: int = Field(0, ge=0, le=100_000)
    """Number of further frames, a multiple of 8. They go on from the last ones, again and again, in memory
    that does not grow.
    """
    lora: tuple[str, ...] = ()
    """LoRA or DoRA files of the denoiser, or folders of PEFT, each with its strength (default: 1)."""
    negative_prompt: str = ""
    """What to avoid. Added to the default negative prompt."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Random seed of the first video. Each further video adds 1."""

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
        """A cell of a .csv has both numbers. JSON has no tuples."""
        values = value.replace(",", " ").split() if isinstance(value, str) else value
        return tuple(values) if isinstance(values, list) else values

    @field_validator("lora", mode="before")
    @classmethod
    def _split_loras(cls, value: Any) -> Any:  # noqa: ANN401 (whatever a file holds)
        values = value.split() if isinstance(value, str) else value
        return tuple(values) if isinstance(values, list) else values

    @field_validator("lora")
    @classmethod
    def _check_loras(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        files = [split_strength(text)[0] for text in value]
        if twice := [file for file in files if files.count(file) > 1]:
            raise ValueError(f"{twice[0]} is named twice: give it once, with one strength")
        return value

    def frame_files(self) -> list[Path]:
        """The files of the frames that the video is given."""
        return [Path(file) for file in (self.image, self.last_image, self.video) if file is not None]

    def tasks(self) -> set[Task]:
        """What a denoiser has to be trained for to make the video, besides text to video."""
        found: set[Task] = set()
        if self.last_image is not None:
            found.add("first_last")
        elif self.image is not None:
            found.add("first")
        if self.video is not None or self.extend:
            found.add("prefix")
        return found

    def lora_strengths(self) -> dict[Path, float]:
        """The strength of each LoRA, by its file."""
        return dict(split_strength(text) for text in self.lora)

    @property
    def windows(self) -> int:
        """How often frames are generated: once, and again for every part of `extend`."""
        return 1 + math.ceil(self.extend / (self.frames - self.overlap)) if self.extend else 1

    @property
    def total_steps(self) -> int:
        """Denoising steps of all windows."""
        return self.windows * self.steps

    def frames_of(self, window: int) -> int:
        """Frames of a window, counted from 0, with those that it goes on from."""
        if window == 0:
            return self.frames
        before = (window - 1) * (self.frames - self.overlap)
        return self.overlap + min(self.frames - self.overlap, self.extend - before)

    def frames_after(self, step: int) -> int:
        """Frames of the video as far as it is begun after so many of all steps."""
        window = max(0, math.ceil(step / self.steps) - 1)
        return self.frames + min(self.extend, window * (self.frames - self.overlap))

    def grid(self, strides: Strides = RELEASE) -> tuple[int, int, int]:
        """Latent (T, H, W) of the video, of a VAE with these strides. Raises ValueError if there is none."""
        return latent_shape(self.frames, self.height, self.width, strides=strides)

    def denoised_grid(self, strides: Strides = RELEASE) -> tuple[int, int, int]:
        """`grid`, with the latent frame behind it that a last image is."""
        frames, rows, columns = self.grid(strides)
        return frames + (self.last_image is not None), rows, columns

    def positions(self, strides: Strides = RELEASE) -> tuple[int, int]:
        """Number of latent positions in a frame, and in all that is denoised at once."""
        frames, rows, columns = self.denoised_grid(strides)
        return rows * columns, frames * rows * columns * (2 if self.batched_guidance else 1)

    def describe_size(self) -> str:
        return f"{self.frames} frames of {self.width} x {self.height}"

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        self.grid(info.context or RELEASE)
        start, end = self.guidance_interval
        if not 0 <= start <= end <= 1:
            raise ValueError(f"guidance_interval must be 0 <= start <= end <= 1, got {start:g} {end:g}")
        if self.shift is not None and (self.dynamic_shift or self.linear_quadratic):
            other = "dynamic_shift" if self.dynamic_shift else "linear_quadratic"
            raise ValueError(f"shift {self.shift:g} has no use with {other}: give one of them")
        if self.linear_quadratic and self.dynamic_shift:
            raise ValueError("the linear-quadratic schedule has no shift: leave dynamic_shift out")
        if self.linear_quadratic and self.steps % 2:
            raise ValueError(
                "the linear-quadratic schedule needs an even number of steps, "
                f"got {self.steps}: use {self.steps + 1}"
            )
        self.check_step_cache()
        self._check_given(info.context or RELEASE)
        return self

    def _check_given(self, strides: Strides) -> None:
        """Raise ValueError unless the frames that are given leave something to generate."""
        if self.image is not None and self.video is not None:
            raise ValueError("a video begins with an image or goes on from a clip: give image or video")
        first, last = int(self.image is not None), self.last_image is not None
        check_given(first, self.frames, last=last, strides=strides)
        if self.video is not None or self.extend:
            try:
                check_given(self.overlap, self.frames, strides=strides)
            except ValueError as error:
                raise ValueError(f"overlap: {error}") from None
        if self.extend % strides.temporal:
            nearest = max(1, round(self.extend / strides.temporal)) * strides.temporal
            raise ValueError(
                f"extend must be a multiple of {strides.temporal}, got {self.extend}: use {nearest}"
            )

    def check_step_cache(self) -> None:
        """Raise ValueError if guidance begins or ends in a way that a step cache cannot follow: it counts the
        steps of each branch, and of both together, by itself.
        """
        start, end = self.guidance_interval
        if self.step_cache and (start > 0 or (self.batched_guidance and end < 1)):
            raise ValueError(
                f"step_cache {self.step_cache:g} goes with a guidance_interval that begins at 0 and, where "
                f"both branches are one batch, ends at 1, got {start:g} {end:g}"
            )


def split_strength(text: str) -> tuple[Path, float]:
    """The file and the strength, 1 if none is written, of a LoRA written FILE or FILE:STRENGTH. Raises
    ValueError for a strength that is out of bounds or no number.
    """
    file, colon, written = text.rpartition(":")
    if not colon or "/" in written or "\\" in written:
        return Path(text), 1.0
    try:
        strength = float(written)
    except ValueError:
        strength = math.nan
    if not (file and abs(strength) <= MOST_STRENGTH):
        raise ValueError(
            f"the strength of a LoRA is a number from -{MOST_STRENGTH} to {MOST_STRENGTH}, as in "
            f"style.safetensors:0.8, got {text!r}"
        )
    return Path(file), strength


def is_prompt_file(prompt: str) -> bool:
    """Whether this is the name of a file of prompts, there or not, rather than a prompt."""
    return Path(prompt).suffix.lower() in PROMPT_FILES


def read_requests(
    prompt: str, settings: dict[str, Any], *, copies: int = 1, strides: Strides = RELEASE
) -> list[Request]:
    """Requests from a prompt, or from a .txt (a prompt a line), .jsonl or .csv file (a column `prompt`, and
    any other field of `Request`), for a VAE with these `strides`. Each prompt gives `copies` requests. Seeds
    count on from the run's, or from a row's own.

    Raises FileNotFoundError, and ValueError that names file and line, for a file without prompts or
    a bad row.
    """
    if not 1 <= copies <= MOST_COPIES:
        raise ValueError(f"videos_per_prompt must be from 1 to {MOST_COPIES:,}, got {copies:,}")
    # First, so that a mistake in the settings is not blamed on the first line of a file.
    Request.read({**settings, "prompt": "any"}, where="the options", context=strides)
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
        first = Request.read(values, where=where, context=strides)
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
                    yield number, {"prompt": text} if kind == ".txt" else _json_row(text, path, number)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def _json_row(text: str, path: Path, line: int) -> dict[str, Any]:
    row = parse_json(text, where=str(path), line=line)
    if not isinstance(row, dict):
        raise ValueError(f'{path}, line {line} must be an object as {{"prompt": "..."}}, got {text[:40]}')
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
