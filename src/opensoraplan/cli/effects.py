"""Refuses options of `osp generate` that would have no effect, and says why."""

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opensoraplan.defaults import ModelIndex
from opensoraplan.requests import Request
from opensoraplan.shapes import TILE_SIZE

if TYPE_CHECKING:
    from opensoraplan.cli.generating import Generate

# Options that need guidance, with the values that have no effect.
OF_GUIDANCE = {
    "guidance_rescale": 0.0,
    "guidance_interval": (0.0, 1.0),
    "batched_guidance": False,
    "negative_prompt": "",
    "default_negative_prompt": "",
}


def given_options(words: Sequence[str]) -> frozenset[str]:
    """The options in a command line as names of fields: --no-tiling is tiling."""
    names = set()
    for word in itertools.takewhile(lambda word: word != "--", words):
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            names |= {name, name.removeprefix("no_")}
    return frozenset(names)


def check_effects(options: "Generate", given: Collection[str], requests: Sequence[Request]) -> None:
    """Raise ValueError for the first of the `given` options that changes none of the videos."""
    guided = any(request.guidance > 1 for request in requests)
    reasons = {
        name: "guidance is off; --guidance above 1 turns it on"
        for name, nothing in OF_GUIDANCE.items()
        if not guided and getattr(options, name) != nothing
    }
    if not guided and options.sharing.branch_ranks > 1:
        reasons["branch_ranks"] = (
            "it splits the branches of guidance, which is off; --guidance above 1 turns it on"
        )
    if all(request.frames == 1 for request in requests):
        reasons["fps"] = "pictures (--frames 1) have no frame rate"
    if options.save_every and all(request.step_cache for request in requests):
        reasons["save_every"] = "with --step-cache, latents are saved only after the last step"
    if options.keep_chinese and not options.clean_prompts:
        reasons["keep_chinese"] = "prompts are not cleaned, so nothing is removed from them"
    if options.tiling and all(max(request.height, request.width) <= TILE_SIZE for request in requests):
        reasons["tiling"] = f"frames up to {TILE_SIZE} x {TILE_SIZE} fit into one tile"
    if options.solver == "adams" and all(request.steps == 1 for request in requests):
        reasons["solver"] = "adams uses the velocity of the previous step: use --steps 2 or more"
    if not any(request.extend or request.video for request in requests):
        reasons["overlap"] = "it is the number of frames that --video or --extend goes on from"
    for name, reason in reasons.items():
        if name in given:
            raise ValueError(f"--{name.replace('_', '-')} has no effect: {reason}")


def check_scheduler(folder: Path, given: Collection[str], requests: Sequence[Request]) -> None:
    """Raise ValueError for options that the scheduler of the model in a folder does not have."""
    _, name = ModelIndex.of(folder).scheduler or (None, None)
    if name in (None, "FlowMatchEulerDiscreteScheduler"):
        return
    for request in requests:
        asked = {
            "shift": request.shift is not None,
            "dynamic-shift": request.dynamic_shift is not None,
            "linear-quadratic": request.linear_quadratic,
            "solver": request.solver != "euler",
        }
        if wrong := [f"--{option}" for option, is_asked in asked.items() if is_asked]:
            raise ValueError(
                f"{', '.join(wrong)} cannot be used with the {name} of {folder}: "
                "its config sets shift, schedule and solver"
            )
    if "save_every" in given:
        raise ValueError(f"--save-every has no effect: a {name} cannot resume a video between two steps")
