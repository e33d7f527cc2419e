"""What is in the state.json of a run's checkpoints: all that the next step depends on beside tensors."""

from typing import Annotated, Any

from pydantic import Field

from opensoraplan.defaults import BasePrecision
from opensoraplan.settings import Settings

Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]
# None: not finite, which JSON has no number for.
Sum = float | None
# See `Averages.add_losses`.
Quarters = Annotated[list[Sum], Field(min_length=4, max_length=4)]


class ClipsState(Settings):
    """The clips that a run is trained on: how many, and a hash of what is known of them."""

    count: Count
    digest: str


class AveragesState(Settings):
    """What was summed up since it was last logged: see `Averages.state_dict`."""

    sums: dict[str, Sum]
    counts: dict[str, NotNegative]
    quarters: Annotated[list[Quarters], Field(min_length=2, max_length=2)] | None


class ClipStatistics(Settings):
    """Mean and variance of the gradient's norms: see `AdaptiveClip`."""

    mean: NotNegative | None
    variance: NotNegative


class RunState(Settings):
    """Of any run. The first runs of `osp train-vae` saved neither `clips` nor what is counted."""

    step: Count
    architecture: dict[str, Any] = Field(alias="model_config")
    clips: ClipsState | None = None
    averages: AveragesState | None = None
    bad_files: dict[str, str] = Field(default={})
    outliers_in_a_row: Count = 0
    global_batch: Annotated[int, Field(ge=1)] | None = None
    encoders: dict[str, str] = Field(default={})
    base: BasePrecision | None = None  # of the frozen weights


class DenoiserState(RunState):
    """Of a run whose gradients are clipped adaptively."""

    clip: ClipStatistics
