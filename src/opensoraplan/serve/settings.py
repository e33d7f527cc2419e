"""Settings of `osp serve` and `osp serve worker`. cli/serving.py makes their options of these."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from opensoraplan import builtin
from opensoraplan.defaults import (
    STEP_CACHE_FILE,
    Frames,
    GenerateDefaults,
    Memory,
    ModelIndex,
    Side,
    WeightPrecision,
)
from opensoraplan.models.prompts import PromptSettings
from opensoraplan.requests import Request
from opensoraplan.settings import Settings

_Seconds = Annotated[float, Field(gt=0)]
# Where the API can be reached without a key: from this machine only.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class WorkerSettings(Settings):
    """The model, where jobs are, and how workers make them."""

    model: Path | None = None
    """Model folder, as written by `osp convert` or `osp export`."""
    name: str = Field("", pattern=r"^[\w.-]*$")
    """Name of the model in the API."""
    data: Path = Path("osp-data")
    """Folder for jobs and their files. All machines of one store share it."""
    store: str | None = Field(None, validate_default=True)
    """Database of the jobs, for example postgresql://USER:PASSWORD@HOST/NAME for several machines."""
    devices: tuple[str, ...] = ()
    """Devices to run on, each with a worker process of its own: cuda:0 cuda:1, cpu, ..., or none."""
    largest: tuple[Frames, Side, Side] | None = None
    """Largest video: frames, height and width. Larger requests are refused."""
    loras: Path | None = None
    """Folder of LoRAs. Requests use them by name."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Precision of the denoiser and the text encoders."""
    vae_dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Precision of the VAE."""
    memory: Memory = "auto"
    """Where the weights are kept, as in `osp generate`."""
    weights: WeightPrecision = "whole"
    """Precision in which the denoiser's weights are stored, as in `osp generate`."""
    attention: str | None = None
    """Attention backend of diffusers: _native_cudnn, flash, sage, ..."""
    compile: bool = False
    """Compile the denoiser's blocks. The first step takes minutes, later ones less time."""
    tiling: bool = False
    """Decode in blended tiles. Needs less memory for large frames, not exact."""
    save_every: int = Field(5, ge=1)
    """Save resumable latents every N steps."""
    max_tries: int = Field(3, ge=1)
    """A job fails after N workers in a row died of it without saving a further step."""
    lease: _Seconds = 30
    """Seconds without a sign of life after which a worker is replaced and its job goes to another one."""
    hang: _Seconds = 900
    """Seconds that a step, the text encoders or a chunk of frames may take. After that, the worker hangs."""
    drain: float = Field(60, ge=0)
    """Seconds that workers have to finish their step and save its latents when the server is stopped."""
    keep_hours: float = Field(168, ge=0)
    """Hours after which finished jobs are removed with their files; 0 to keep them."""

    @field_validator("model", "data", "loras", "keys", check_fields=False)
    @classmethod
    def _make_absolute(cls, path: Path | None) -> Path | None:
        """Workers change their folder."""
        return None if path is None else path.absolute()

    @field_validator("store")
    @classmethod
    def _spell_out_store(cls, store: str | None) -> str | None:
        """SQLAlchemy's URL, with an absolute path."""
        given = store or os.environ.get("OSP_STORE")
        if given is None:
            return None
        for short in ("postgresql://", "postgres://"):
            if given.startswith(short):
                return f"postgresql+psycopg://{given.removeprefix(short)}"
        file = given.removeprefix("sqlite:///")
        return given if file == given else f"sqlite:///{Path(file).absolute()}"

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return self.model or builtin.folder()

    @property
    def model_id(self) -> str:
        """The name of the model in the API."""
        return self.name or (self.folder.name if self.model is not None else "builtin")

    @property
    def store_url(self) -> str:
        """SQLAlchemy's URL of the database: by default a file in the data folder."""
        return self.store or f"sqlite:///{self.data}/jobs.sqlite"

    @property
    def keep_seconds(self) -> float:
        """Seconds after which finished jobs are removed; 0 for never."""
        return self.keep_hours * 3600

    def defaults(self) -> dict[str, object]:
        """Values of a request that the client leaves out: the model's own, where it has some."""
        options = GenerateDefaults.of(self.folder).options()
        return {name: value for name, value in options.items() if name != "dtype"}

    def prompt_settings(self) -> PromptSettings:
        """How the model prepares prompts."""
        return PromptSettings.of_config(ModelIndex.of(self.folder).prompt_config())

    def largest_request(self) -> Request:
        """The largest request that workers make videos of, as their sessions are opened for it."""
        size = (
            {}
            if self.largest is None
            else dict(zip(("frames", "height", "width"), self.largest, strict=True))
        )
        cache = 0.01 if (self.folder / STEP_CACHE_FILE).is_file() else 0.0
        values = {"prompt": "any", **self.defaults(), **size, "step_cache": cache}
        return Request.read(values, where="the largest video")


class ServeSettings(WorkerSettings):
    """What the HTTP server needs beside the settings of its workers."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs keys."""
    port: int = Field(8000, ge=0, le=65_535)
    """Port to listen on; 0 for any free one."""
    keys: Path | None = None
    """File of API keys, one a line. The environment variable OSP_API_KEY may have one, too."""
    queue: int = Field(100, ge=1)
    """Most jobs that may wait. Requests beyond it are answered with 429."""
    max_steps: int = Field(100, ge=1)
    """Most denoising steps of a request."""
    max_upload: float = Field(32, gt=0)
    """Most megabytes of a request."""

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.host not in LOOPBACK and not self.keys and not os.environ.get("OSP_API_KEY"):
            raise ValueError(
                f"host {self.host} can be reached from other machines: set OSP_API_KEY, or give a file of "
                "keys with --keys"
            )
        return self
