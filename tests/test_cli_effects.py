"""Every option of `osp generate` acts, or is refused before the model is loaded."""

from pathlib import Path

import pytest

from opensoraplan.cli.effects import check_effects, check_scheduler, given_options
from opensoraplan.cli.generating import Generate, Sharing
from opensoraplan.defaults import INDEX
from opensoraplan.requests import Request

SMALL = {"prompt": "a cat", "frames": 9, "height": 32, "width": 272, "steps": 4}


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("generate", set()),
        ("p.txt --guidance-rescale 0.5 --no-clean-prompts", {"guidance_rescale", "clean_prompts"}),
        ("--save_every=3 --guidance 1 -- --fps 3", {"save_every", "guidance"}),
        ("a --shift -1 --out=--x", {"shift", "out"}),
    ],
)
def test_names_of_the_options_given(line: str, names: set[str]) -> None:
    found = given_options(line.split())
    assert {name for name in found if not name.startswith("no_")} == names


CASES: dict[str, tuple[Generate, dict[str, object], str]] = {
    "guidance_rescale": (Generate(guidance_rescale=0.5), {"guidance": 1.0}, "guidance is off"),
    "guidance_interval": (Generate(guidance_interval=(0.0, 0.5)), {"guidance": 1.0}, "guidance is off"),
    "batched_guidance": (Generate(batched_guidance=True), {"guidance": 0.5}, "guidance is off"),
    "negative_prompt": (Generate(negative_prompt="rain"), {"guidance": 1.0}, "guidance is off"),
    "default_negative_prompt": (
        Generate(default_negative_prompt="rain"),
        {"guidance": 1.0},
        "guidance is off",
    ),
    "branch_ranks": (
        Generate(sharing=Sharing(branch_ranks=2)),
        {"guidance": 1.0},
        "the branches of guidance",
    ),
    "fps": (Generate(fps=12), {"frames": 1}, "have no frame rate"),
    "save_every": (Generate(save_every=2), {"step_cache": 0.1}, "only after the last step"),
    "keep_chinese": (Generate(keep_chinese=True, clean_prompts=False), {}, "prompts are not cleaned"),
    "tiling": (Generate(tiling=True), {"width": 256}, "up to 256 x 256 fit into one tile"),
    "solver": (Generate(solver="adams"), {"steps": 1}, "use --steps 2 or more"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_option_without_effect_is_refused_where_it_is_given(name: str) -> None:
    options, values, reason = CASES[name]
    useless = Request.read({**SMALL, **values}, where="the test")
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{option} has no effect: .*{reason}"):
        check_effects(options, {name}, [useless])
    check_effects(options, set(), [useless])
    if values:  # one video for which it acts is enough
        check_effects(options, {name}, [useless, Request.read(SMALL, where="the test")])


def test_nothing_is_refused_that_asks_for_nothing() -> None:
    plain = Request.read({**SMALL, "guidance": 1.0, "step_cache": 0.1}, where="the test")
    quiet = Generate(negative_prompt="", default_negative_prompt="", guidance_rescale=0, save_every=0)
    check_effects(quiet, {*CASES} - {"keep_chinese"}, [plain])


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"shift": 3.0}, "--shift"),
        ({"dynamic_shift": False}, "--dynamic-shift"),
        ({"linear_quadratic": True}, "--linear-quadratic"),
        ({"solver": "adams"}, "--solver"),
    ],
)
def test_schedules_that_the_models_scheduler_does_not_take(
    tiny_model: Path, tmp_path: Path, values: dict[str, object], option: str
) -> None:
    own = Request.read(SMALL, where="the test")
    asked = Request.read({**SMALL, **values}, where="the test")
    check_scheduler(tiny_model, {"save_every"}, [asked])
    index = (tiny_model / INDEX).read_text()
    (tmp_path / INDEX).write_text(index.replace("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"))
    check_scheduler(tmp_path, set(), [own])
    with pytest.raises(ValueError, match=f"{option} cannot be used with the FlowMatchHeunDiscreteScheduler"):
        check_scheduler(tmp_path, set(), [own, asked])
    with pytest.raises(ValueError, match=r"--save-every has no effect: .* FlowMatchHeunDiscreteScheduler"):
        check_scheduler(tmp_path, {"save_every"}, [own])
