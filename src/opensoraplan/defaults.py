"""What a model's folder says of how to generate with it: generate.json beside model_index.json."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from opensoraplan.settings import Settings

FILE = "generate.json"

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
# How the denoiser's matrices are kept: models/weights.py.
Weights = Literal["whole", "int8", "fp8"]


class GenerateDefaults(Settings):
    """Options of `osp generate` that suit a model; None leaves one as it is."""

    frames: Frames | None = None
    height: Side | None = None
    width: Side | None = None
    fps: Fps | None = None
    steps: Steps | None = None
    solver: Solver | None = None
    guidance: Guidance | None = None
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] | None = None
    dtype: Literal["bf16", "fp16", "fp32"] | None = None

    @classmethod
    def of(cls, model: Path) -> "GenerateDefaults":
        """Those of a model's folder; none if it has no such file. Raises ValueError for a damaged one."""
        path = model / FILE
        return cls.read_file(path) if path.is_file() else cls()

    def write(self, model: Path) -> None:
        (model / FILE).write_text(self.model_dump_json(indent=1, exclude_none=True) + "\n")
