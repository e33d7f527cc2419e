"""What a model's folder says of how to generate with it: generate.json, model_index.json, and the scheduler's
config; and the bounds of a video.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from opensoraplan.documents import read_json_object
from opensoraplan.settings import Settings

FILE, INDEX, SCHEDULER = "generate.json", "model_index.json", "scheduler/scheduler_config.json"
STEP_CACHE_FILE = "step_cache.json"

Solver = Literal["euler", "adams"]
# Bounds of a video, far beyond what anybody makes: an hour, the longest side of a codec, ...
Frames = Annotated[int, Field(ge=1, le=100_001)]
Side = Annotated[int, Field(ge=1, le=16_384)]
Steps = Annotated[int, Field(ge=1, le=10_000)]
Guidance = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
# Frames a second, as files of video can have them (data/reading.py).
Fps = Annotated[float, Field(ge=0.001, le=1000)]
# How a denoiser that is trained from nothing starts: models/initial_weights.py.
Initialisation = Literal["adaln_zero", "original"]
# What a denoiser may be given of a video: its first frame, the 9 or more that it begins with, first and last.
Task = Literal["first", "prefix", "first_last"]
# How the denoiser's matrices are kept: runtime/quantisation.py.
WeightPrecision = Literal["whole", "int8", "fp8"]
# The same of the frozen weights under a LoRA, for which there is one kind more: runtime/nf4.py.
BasePrecision = Literal[WeightPrecision, "nf4"]
# Where weights are kept: runtime/placement.py; "auto": the fastest placement that fits.
Memory = Literal["auto", "resident", "in-turn", "streamed"]


class GenerateDefaults(Settings):
    """Options of `osp generate` that suit a model; None leaves one as it is. `tasks`, which is no option:
    what the model was trained for besides text to video.
    """

    frames: Frames | None = None
    height: Side | None = None
    width: Side | None = None
    fps: Fps | None = None
    steps: Steps | None = None
    solver: Solver | None = None
    guidance: Guidance | None = None
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] | None = None
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    tasks: tuple[Task, ...] | None = None

    @classmethod
    def of(cls, model: Path) -> "GenerateDefaults":
        """Those of a model's folder; none if it has no such file. Raises ValueError for a damaged one."""
        path = model / FILE
        return cls.read_file(path) if path.is_file() else cls()

    def options(self) -> dict[str, Any]:
        """The options that are given, by their names."""
        return self.model_dump(exclude={"tasks"}, exclude_none=True)

    def write(self, model: Path) -> None:
        (model / FILE).write_text(self.model_dump_json(indent=1, exclude_none=True) + "\n")


# Library and class of a part, as diffusers writes them; nulls for one that is not there.
_Part = Annotated[list[str] | list[None], Field(min_length=2, max_length=2)]
_Shift = Annotated[float, Field(gt=0, le=1000)]


class ModelIndex(Settings):
    """What we read of model_index.json, of which diffusers reads the rest: the parts, and what is done to
    prompts, None where it does not say. See `OpenSoraPlanPipeline`.
    """

    model_config = ConfigDict(extra="ignore")

    transformer: _Part
    vae: _Part
    text_encoder: _Part | None = None
    text_encoder_2: _Part | None = None
    tokenizer: _Part | None = None
    tokenizer_2: _Part | None = None
    scheduler: _Part | None = None
    prompt_template: str | None = None
    default_negative_prompt: str = ""
    clean_prompts: bool = True
    keep_chinese: bool = False
    max_text_tokens: int = Field(default=512, ge=1, le=65_536)

    @classmethod
    def of(cls, model: Path) -> "ModelIndex":
        """That of a model's folder. Raises ValueError for one that is damaged or of another pipeline."""
        path = model / INDEX
        content = read_json_object(path)
        kind = content.get("_class_name")
        if not isinstance(kind, str):
            raise ValueError(f"{path} is damaged: it does not say which pipeline it is of (_class_name)")
        if kind != "OpenSoraPlanPipeline":
            raise ValueError(f"{model} is a {kind}, not an OpenSoraPlanPipeline")
        return cls.read(content, where=str(path), strict=True)

    def prompt_config(self) -> dict[str, str | bool | None]:
        """What it says of prompts, as arguments of the pipeline."""
        names = {"prompt_template", "default_negative_prompt", "clean_prompts", "keep_chinese"}
        return {name: getattr(self, name) for name in names & self.model_fields_set}


class SchedulerConfig(Settings):
    """What we read of the scheduler's config, and what diffusers computes with before we can look."""

    model_config = ConfigDict(extra="ignore")

    shift: _Shift | None = None
    flow_shift: _Shift | None = None
    use_dynamic_shifting: bool | None = None
    num_train_timesteps: int = Field(default=1000, ge=1, le=100_000)
    base_shift: float | None = None
    max_shift: float | None = None
    shift_terminal: float | None = None
    stochastic_sampling: bool | None = None
    invert_sigmas: bool | None = None
    use_karras_sigmas: bool | None = None
    use_exponential_sigmas: bool | None = None
    use_beta_sigmas: bool | None = None
    base_image_seq_len: int = Field(default=256, ge=1)
    max_image_seq_len: int = Field(default=4096, ge=1)

    @classmethod
    def of(cls, model: Path) -> "SchedulerConfig":
        """That of a model's folder; nothing if it has none. Raises ValueError for a damaged one."""
        path = model / SCHEDULER
        return cls.read(read_json_object(path), where=str(path), strict=True) if path.is_file() else cls()


def check_model_files(model: Path) -> None:
    """Raise ValueError, which names file and key, if any of these files in a model's folder is damaged."""
    ModelIndex.of(model)
    SchedulerConfig.of(model)
    GenerateDefaults.of(model)
