"""Samplers: Euler's and Adams' methods over `flow`'s sigmas, or any flow-matching scheduler of diffusers. No
model runs here.
"""

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, get_args

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from opensoraplan import flow
from opensoraplan.defaults import Solver

SOLVERS: tuple[Solver, ...] = get_args(Solver)

# Options of the default scheduler that we do not use, with the values that have no effect.
UNREAD_OPTIONS = {
    "stochastic_sampling": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


class Sampler(Protocol):
    """A schedule and its update rule. `timesteps` are 1000 * sigma, one for each call of `step`."""

    timesteps: Tensor

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor: ...


class EulerSampler:
    """Euler's method over `flow`'s sigmas [steps + 1]."""

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas
        self.timesteps = sigmas[:-1] * flow.TIMESTEP_SCALE

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        return flow.euler_step(latents, velocity, self.sigmas[index], self.sigmas[index + 1])


class AdamsSampler(EulerSampler):
    """`flow.adams_step` over the same sigmas. The first step is Euler's, unless the velocity of the step
    before it is given as `previous`.
    """

    def __init__(self, sigmas: Tensor, previous: Tensor | None = None) -> None:
        super().__init__(sigmas)
        self.previous = previous

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        previous, self.previous = self.previous, velocity
        if previous is None:
            return super().step(velocity, index, latents)
        before, sigma, after = self.sigmas[index - 1 : index + 2]
        previous = previous.to(latents.device)
        return flow.adams_step(latents, velocity, sigma, after, previous=previous, previous_sigma=before)


class SchedulerSampler:
    """A flow-matching scheduler of diffusers, after its `set_timesteps`. `sources`: one generator per video,
    for schedulers that draw noise in every step.
    """

    def __init__(self, scheduler: Any, sources: list[torch.Generator]) -> None:  # noqa: ANN401 (no shared interface)
        self.scheduler = scheduler
        self.timesteps: Tensor = scheduler.timesteps
        draws = "generator" in inspect.signature(scheduler.step).parameters
        self.options = {"generator": sources} if draws else {}

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        timestep = self.timesteps[index]
        return self.scheduler.step(velocity, timestep, latents, **self.options, return_dict=False)[0]


@dataclass(frozen=True)
class Schedule:
    """Number of steps, schedule and solver of a call. None: as in the default scheduler's config."""

    steps: int
    shift: float | None = None
    use_dynamic_shifting: bool | None = None
    linear_quadratic: bool = False
    solver: Solver = "euler"


def make_scheduler(
    *, shift: float = 7.0, use_dynamic_shifting: bool = False
) -> FlowMatchEulerDiscreteScheduler:
    """The default scheduler, whose config has the defaults for `shift` and `use_dynamic_shifting`."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=use_dynamic_shifting)


def is_default_scheduler(scheduler: Any) -> bool:  # noqa: ANN401
    """Whether our own samplers are used, which can start at any step, from the latents and, for Adams, the
    previous velocity. A subclass may step differently, so it is used as it is.
    """
    return type(scheduler) is FlowMatchEulerDiscreteScheduler


def make_sampler(
    scheduler: Any,  # noqa: ANN401
    schedule: Schedule,
    grid: tuple[int, int, int],
    *,
    previous: Tensor | None = None,
    sources: list[torch.Generator] | None = None,
) -> Sampler:
    """The sampler of one call for latents [B, C, *grid]. `previous`: velocity of the step before, for Adams.
    `sources`: as in `SchedulerSampler`.

    Raises ValueError for an impossible schedule, one that the scheduler does not support, and schedulers that
    do not step along a flow.
    """
    if schedule.steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {schedule.steps}")
    if schedule.solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {schedule.solver!r}")
    if not is_default_scheduler(scheduler):
        return _scheduler_sampler(scheduler, schedule, grid, sources)
    check_default_scheduler(scheduler.config)
    make = EulerSampler if schedule.solver == "euler" else partial(AdamsSampler, previous=previous)
    return make(_sigmas(scheduler.config, schedule, grid))


def _sigmas(config: Mapping[str, Any], schedule: Schedule, grid: tuple[int, int, int]) -> Tensor:
    """Our own sigmas [steps + 1]."""
    shift, dynamic = schedule.shift, schedule.use_dynamic_shifting
    if schedule.linear_quadratic:
        if shift is not None or dynamic:
            raise ValueError("the linear-quadratic schedule has no shift: leave shift out")
        return flow.linear_quadratic_sigmas(schedule.steps)
    if shift is not None and dynamic:
        raise ValueError(f"give either shift {shift} or the dynamic shift")
    if dynamic is None:
        dynamic = shift is None and config["use_dynamic_shifting"]
    if dynamic:
        shift = flow.dynamic_shift(*grid[1:])
    elif shift is None:
        shift = float(config["shift"])
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be greater than 0, got {shift}")
    return flow.sampling_sigmas(schedule.steps, shift)


def _scheduler_sampler(
    scheduler: Any,  # noqa: ANN401
    schedule: Schedule,
    grid: tuple[int, int, int],
    sources: list[torch.Generator] | None,
) -> SchedulerSampler:
    """Set the timesteps of a scheduler of diffusers. A trial step of a copy, on
    noise, checks that it works.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if schedule != Schedule(schedule.steps):
        raise ValueError(
            f"a {name} sets shift, schedule and solver in its config: leave them out of the call"
        )
    check_flow_scheduler(scheduler)
    mu = {"mu": flow.dynamic_mu(*grid[1:])} if config.get("use_dynamic_shifting") else {}
    trial = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 4, 1, 2, 2), generator=trial)
    try:
        scheduler.set_timesteps(schedule.steps, device="cpu", **mu)
        stepped = SchedulerSampler(copy.deepcopy(scheduler), [trial]).step(noise, 0, noise)
        finite = stepped.shape == noise.shape and bool(torch.isfinite(stepped).all())
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the {name} cannot step along a flow: {type(error).__name__}: {error}") from error
    timesteps = scheduler.timesteps
    descends = bool((timesteps.diff() <= 0).all())
    if not (finite and descends and 1 < timesteps[0] <= flow.TIMESTEP_SCALE and timesteps[-1] >= 0):
        raise ValueError(
            f"the {name}, with these options, does not step along a flow from timestep 1000 to 0: its "
            f"timesteps are {timesteps[0]:g} to {timesteps[-1]:g}, its first step is "
            f"{'finite' if finite else 'not finite'}"
        )
    return SchedulerSampler(scheduler, sources or [])


def check_flow_scheduler(scheduler: Any) -> None:  # noqa: ANN401
    """Raise ValueError for a scheduler of diffusers that does not step along a predicted flow."""
    name, config = type(scheduler).__name__, scheduler.config
    prediction = config.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction":
        raise ValueError(
            f"the {name} has prediction_type {prediction!r}, but this model predicts the flow: "
            "use prediction_type='flow_prediction' and use_flow_sigmas=True, if it has them"
        )
    if not config.get("use_flow_sigmas", True):
        raise ValueError(f"the {name} needs use_flow_sigmas=True for this model")


def check_default_scheduler(config: Mapping[str, Any]) -> None:
    """Raise ValueError for options of the default scheduler that would have no effect."""
    unread = [f"{key}={config[key]!r}" for key, value in UNREAD_OPTIONS.items() if config[key] != value]
    if unread:
        raise ValueError(
            "only shift and use_dynamic_shifting of the default scheduler have an effect: "
            f"leave out {', '.join(unread)}"
        )
