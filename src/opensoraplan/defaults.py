"""What a model's folder says of how to generate with it: generate.json beside model_index.json."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from opensoraplan.settings import Settings

FILE = "generate.json"

Solver = Literal["euler", "adams"]
# Frames a second, as files of video can have them (data/reading.py).
Fps = Annotated[float, Field(ge=0.001, le=1000)]
# How a denoiser that is trained from nothing starts: models/initial_weights.py.
Initialisation = Literal["adaln_zero", "original"]
# How the denoiser's matrices are kept: models/weights.py.
Weights = Literal["whole", "int8", "fp8"]


class GenerateDefaults(Settings):
    """Options of `osp generate` that suit a model; None leaves one as it is."""

    frames: Annotated[int, Field(ge=1)] | None = None
    height: Annotated[int, Field(ge=1)] | None = None
    width: Annotated[int, Field(ge=1)] | None = None
    fps: Fps | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    solver: Solver | None = None
    guidance: float | None = None
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] | None = None
    dtype: Literal["bf16", "fp16", "fp32"] | None = None

    @classmethod
    def of(cls, model: Path) -> "GenerateDefaults":
        """Those of a model's folder; none if it has no such file. Raises ValueError for a damaged one."""
        path = model / FILE
        return cls.read_file(path) if path.is_file() else cls()

    def write(self, model: Path) -> None:
        (model / FILE).write_text(self.model_dump_json(indent=1, exclude_none=True) + "\n")
