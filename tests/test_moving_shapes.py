"""Clips of moving shapes: what is drawn, what is said of it, what is kept from training, what is written."""

import itertools
import json
from pathlib import Path

import prompt_judge as judge
import pytest
import torch
from moving_shapes.captions import caption
from moving_shapes.drawing import render, signed_distance
from moving_shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    NEW_SHAPES,
    ROUND,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    is_held_out,
    scene_for,
    scene_of,
)
from moving_shapes.writing import write_dataset
from torch import Tensor

from opensoraplan.data.manifest import read_manifest
from opensoraplan.data.video import probe, read_frames

pytestmark = pytest.mark.usefixtures("one_thread")


def one(colour: str, shape: str, motion: str, *, size: str = "medium", background: str = "studio") -> Scene:
    return Scene(things=(Thing(colour=colour, shape=shape, size=size, motion=motion),), background=background)


def coloured(frames: Tensor) -> Tensor:
    """Where pixels are as saturated as no background is, bool [T, H, W]."""
    pixels = frames.float() / 255
    return pixels.amax(dim=-1) - pixels.amin(dim=-1) > 0.3


def centre(mask: Tensor) -> tuple[float, float]:
    """Mean column and row of a mask [H, W]."""
    rows, columns = mask.nonzero().float().mean(dim=0).tolist()
    return columns, rows


def test_render_is_deterministic_and_of_the_size_asked_for() -> None:
    scene = scene_for(3, seed=5)
    clip = render(scene, frames=9, height=64, width=96)
    assert clip.shape == (9, 64, 96, 3)
    assert clip.dtype == torch.uint8
    assert torch.equal(clip, render(scene, frames=9, height=64, width=96))
    other = Scene(things=scene.things, background=scene.background, seed=scene.seed + 1)
    assert not torch.equal(clip, render(other, frames=9, height=64, width=96))


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_thing_is_seen_whole_and_is_all_that_is_saturated(shape: str, background: str) -> None:
    area = {
        size: coloured(render(one("blue", shape, "still", size=size, background=background), frames=1)).sum()
        for size in SIZES
    }
    assert 250 < area["small"] < area["medium"] < area["large"]
    for motion in ("left", "up", "growing"):
        scene = one("red", shape, motion, size="large", background=background)
        seen = coloured(render(scene, frames=9))
        assert seen.flatten(1).any(dim=1).all()
        for edge in (seen[:, 0], seen[:, -1], seen[:, :, 0], seen[:, :, -1]):
            assert not edge.any()


@pytest.mark.parametrize(
    ("motion", "right", "down"), [("left", -1, 0), ("right", 1, 0), ("up", 0, -1), ("down", 0, 1)]
)
def test_things_move_where_they_should(motion: str, right: int, down: int) -> None:
    seen = coloured(render(one("green", "cross", motion), frames=9))
    (x0, y0), (x1, y1) = centre(seen[0]), centre(seen[-1])
    if right:
        assert (x1 - x0) * right > 20
        assert abs(y1 - y0) < 1
    else:
        assert (y1 - y0) * down > 20
        assert abs(x1 - x0) < 1


def test_things_grow_shrink_turn_and_stand_still() -> None:
    for motion, low, high in (("growing", 3, 4.5), ("shrinking", 1 / 4.5, 1 / 3)):
        area = coloured(render(one("pink", "star", motion), frames=9)).flatten(1).sum(dim=1)
        assert low < area[-1] / area[0] < high
    still = render(one("yellow", "square", "still"), frames=9)
    assert torch.equal(still[0], still[-1])
    for motion, sign in (("clockwise", 1), ("anticlockwise", -1)):
        seen = coloured(render(one("cyan", "triangle", motion), frames=25))
        # Rendered upright in the middle of the turn; a little later its tip has gone right, or left.
        x, y = centre(seen[12])
        tip = seen[15].nonzero().float()
        tip_x = tip[tip[:, 0] == tip[:, 0].min()][:, 1].mean()
        assert (float(tip_x) - x) * sign > 2
        assert y > 0


def test_two_things_have_their_sides() -> None:
    for index in range(12):
        scene = scene_for(index, objects=2)
        left, right = (
            coloured(render(Scene(things=(thing,), background="studio"), frames=1))[0].sum()
            for thing in scene.things
        )
        assert left > 0
        assert right > 0
        frames = render(scene, frames=9, height=64, width=96)
        seen = coloured(frames)
        assert not seen[:, :, 47:49].any()
        for half, thing in zip((slice(0, 48), slice(48, 96)), scene.things, strict=True):
            pixels = frames[:, :, half][seen[:, :, half]].float().mean(dim=0) / 255
            near = min(COLOURS, key=lambda name: chroma_distance(pixels, COLOURS[name]))
            assert near == thing.colour


def chroma_distance(pixel: Tensor, colour: tuple[float, float, float]) -> float:
    """Distance of two colours after their mean and strength are taken out."""
    first, second = (value - value.mean() for value in (pixel, torch.tensor(colour)))
    return float((first / first.norm() - second / second.norm()).norm())


@pytest.mark.parametrize("shape", [*SHAPES, *NEW_SHAPES])
def test_signed_distance_is_a_distance(shape: str) -> None:
    place = (torch.arange(240) + 0.5 - 120) / 80
    distance = signed_distance(shape, place[None, :], place[:, None])
    slope_y, slope_x = torch.gradient(distance, spacing=1 / 80)
    slope = torch.hypot(slope_x, slope_y)[1:-1, 1:-1]
    # Differences across a crease of the distance may come out a little above 1, or far below.
    assert slope.max() < 1.05
    assert slope.median() > 0.99
    inside = (place[None, :].square() + place[:, None].square()).sqrt()[distance < 0]
    reach = (SHAPES | NEW_SHAPES)[shape]
    assert 0.9 * reach < inside.max() <= reach


def test_captions_name_every_attribute() -> None:
    scene = Scene(
        things=(
            Thing(colour="red", shape="ball", size="small", motion="left"),
            Thing(colour="cyan", shape="triangle", size="medium", motion="clockwise"),
        ),
        background="meadow",
    )
    single = Scene(things=scene.things[:1], background="meadow")
    assert caption(single) == "A small red ball moves to the left over a green meadow."
    assert caption(single, short=True) == "A red ball moves to the left."
    assert caption(scene) == (
        "On the left, a small red ball moves to the left; on the right, a medium-sized cyan triangle "
        "turns clockwise, over a green meadow."
    )
    texts = [caption(scene, variant=variant) for variant in range(40)]
    assert len(set(texts)) > 35
    assert texts == [caption(scene, variant=variant) for variant in range(40)]
    for text in texts:
        for words in (
            ("small", "little", "tiny"),
            ("red",),
            ("ball", "sphere"),
            ("medium-sized", "mid-sized"),
            ("cyan", "turquoise"),
            ("triangle",),
            ("clockwise",),
            ("meadow", "field"),
        ):
            assert any(word in text.lower() for word in words), text


def test_articles_fit_their_nouns() -> None:
    text = caption(one("orange", "star", "up"), short=True)
    assert text == "An orange star moves up."


def test_a_tenth_of_combinations_is_held_out_and_every_pair_is_still_trained() -> None:
    trained = [
        (colour, shape, motion)
        for colour, shape, motion in itertools.product(COLOURS, SHAPES, MOTIONS)
        if not (shape in ROUND and motion.endswith("clockwise"))
        and not is_held_out(one(colour, shape, motion))
    ]
    total = len(COLOURS) * (len(SHAPES) * len(MOTIONS) - 2 * len(ROUND))
    assert 0.06 < 1 - len(trained) / total < 0.14
    assert len({(colour, shape) for colour, shape, _ in trained}) == len(COLOURS) * len(SHAPES)
    assert len({(colour, motion) for colour, _, motion in trained}) == len(COLOURS) * len(MOTIONS)
    assert len({(shape, motion) for _, shape, motion in trained}) == len(SHAPES) * len(MOTIONS) - 4


def test_the_split_is_stable_and_kept() -> None:
    assert not any(is_held_out(scene_for(index, seed=1)) for index in range(200))
    held_out = [scene_for(index, seed=1, held_out=True) for index in range(200)]
    assert all(is_held_out(scene) for scene in held_out)
    assert held_out == [scene_for(index, seed=1, held_out=True) for index in range(200)]
    assert len(set(held_out)) == 200
    either = [is_held_out(scene_for(index, held_out=None, objects=1)) for index in range(400)]
    assert 10 < sum(either) < 80
    assert {len(scene_for(index).things) for index in range(20)} == {1, 2}
    assert all(len(scene_for(index, objects=2).things) == 2 for index in range(20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "gren"}, "did you mean 'green'"),
        ({"shape": "cube"}, "unknown shape 'cube'"),
        ({"size": "larg"}, "did you mean 'large'"),
        ({"motion": "lef"}, "did you mean 'left'"),
        ({"shape": "ball", "motion": "clockwise"}, "nobody sees a ball turn"),
    ],
)
def test_unknown_attributes_are_refused(change: dict[str, str], message: str) -> None:
    fields = {"colour": "red", "shape": "star", "size": "small", "motion": "up"} | change
    with pytest.raises(ValueError, match=message):
        Thing(**fields)


def test_impossible_scenes_and_sizes_are_refused() -> None:
    scene = one("red", "ball", "up")
    with pytest.raises(ValueError, match="1 or 2 things, got 3"):
        Scene(things=scene.things * 3, background="studio")
    with pytest.raises(ValueError, match="did you mean 'meadow'"):
        one("red", "ball", "up", background="medow")
    with pytest.raises(ValueError, match="height must be a multiple of 16 from 64 on, got 100: use 96"):
        render(scene, height=100)
    with pytest.raises(ValueError, match=r"frames must be 8k \+ 1, got 24: use 25"):
        render(scene, frames=24)
    with pytest.raises(ValueError, match="objects must be 1, 2 or None, got 3"):
        scene_for(0, objects=3)
    with pytest.raises(ValueError, match="variant must be at least 0"):
        caption(scene, variant=-1)


def test_a_data_set_is_written_kept_and_extended(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "set", count=2, size=(9, 64, 64))
    assert manifest.read_text() == ".,annotation.json\n"
    folder, annotation = manifest.parent, manifest.with_name("annotation.json")
    records = json.loads(annotation.read_text())
    assert len(records) == 2
    for index, record in enumerate(records):
        path = folder / record["path"]
        info = probe(path)
        assert (info.frames, info.fps, info.height, info.width) == (9, 12, 64, 64)
        assert record["num_frames"] == 9
        assert record["fps"] == 12
        assert record["resolution"] == {"height": 64, "width": 64}
        scene = scene_for(index)
        assert record["cap"][0] == caption(scene)
        assert len(record["cap"]) == 5
        wanted = render(scene, frames=9, height=64, width=64)
        assert (read_frames(path).float() - wanted.float()).abs().mean() < 4
    clips = folder / "clips"
    before = (clips / "000001.mp4").stat().st_mtime_ns
    (clips / "000000.mp4").unlink()
    write_dataset(tmp_path / "set", count=3, size=(9, 64, 64))
    assert sorted(path.name for path in clips.iterdir()) == ["000000.mp4", "000001.mp4", "000002.mp4"]
    assert (clips / "000001.mp4").stat().st_mtime_ns == before
    assert len(json.loads(annotation.read_text())) == 3
    with pytest.raises(ValueError, match=r"other settings: seed 0 \(now 1\)"):
        write_dataset(tmp_path / "set", count=3, seed=1, size=(9, 64, 64))


def test_one_thing_alone_may_be_rendered(tmp_path: Path) -> None:
    """With every motion and background."""
    scenes = [scene_of("brown heart", index) for index in range(60)]
    assert {(thing.colour, thing.shape) for scene in scenes for thing in scene.things} == {("brown", "heart")}
    assert {scene.things[0].motion for scene in scenes} == set(MOTIONS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene_of("red ball", index).things[0].shape for index in range(30)} == {"ball"}
    manifest = write_dataset(tmp_path, count=2, size=(9, 64, 64), only="brown heart")
    assert all("brown heart" in record.captions[0] for record in read_manifest(manifest))
    with pytest.raises(ValueError, match=r"only brown heart \(now None\)"):
        write_dataset(tmp_path, count=3, size=(9, 64, 64), held_out=None)
    with pytest.raises(ValueError, match=r"unknown shape 'hart' .did you mean 'heart'"):
        write_dataset(tmp_path / "a", count=1, only="brown hart")
    assert not (tmp_path / "a").exists()


def test_a_data_set_may_be_moved(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", count=1, size=(9, 64, 64))
    moved = (tmp_path / "set").rename(tmp_path / "moved, with a comma")
    (record,) = read_manifest(moved / "data.txt", probing="all")
    assert record.path == moved / "clips" / "000000.mp4"
    assert not record.error


@pytest.mark.parametrize("name", ["data.txt", "annotation.json", "clips"])
def test_files_of_others_are_neither_replaced_nor_adopted(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir() if name == "clips" else (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"has {name}, which render_clips.py has not made: use another"):
        write_dataset(tmp_path, count=1, size=(9, 64, 64))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold one JSON object"),
        ('{"seed": 0}', "settings.json: .*Field required"),
        ("{", "valid JSON"),
    ],
)
def test_settings_that_are_not_ours_are_refused_with_the_file(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path, count=1, size=(9, 64, 64))
    assert (tmp_path / "settings.json").read_text() == text


def test_a_data_set_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        write_dataset(tmp_path, count=0)
    with pytest.raises(ValueError, match="height must be a multiple"):
        write_dataset(tmp_path, count=1, size=(9, 50, 64))
    with pytest.raises(ValueError, match="fps must be in"):
        write_dataset(tmp_path / "new" / "deep", count=1, fps=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("objects", [1, 2])
def test_the_judge_sees_what_was_drawn(objects: int) -> None:
    for index in range(6):
        scene = scene_for(index, seed=9, held_out=True, objects=objects)
        result = judge.right(scene, judge.judge(render(scene), objects=objects))
        assert result == {"colour": True, "shape": True, "motion": True, "all": True}, scene


def test_the_judge_knows_new_things_when_it_is_told_of_them() -> None:
    for index in range(12):
        scene = scene_of("brown heart", index, seed=1)
        clip = render(scene)
        assert judge.right(scene, judge.judge(clip, looks=judge.KNOWN_AND_NEW))["all"], scene
        assert not judge.right(scene, judge.judge(clip))["colour"]
    orange = one("orange", "star", "left")
    assert judge.right(orange, judge.judge(render(orange), looks=judge.KNOWN_AND_NEW))["all"]


def test_the_judge_contradicts_a_wrong_prompt_and_sees_nothing_in_nothing() -> None:
    verdicts = judge.judge(render(one("red", "ball", "left")))
    wrong = judge.right(one("green", "star", "right"), verdicts)
    assert wrong == {"colour": False, "shape": False, "motion": False, "all": False}
    blank = torch.full((9, 64, 64, 3), 128, dtype=torch.uint8)
    assert judge.judge(blank) == [judge.NOTHING]
    pair = Scene(things=scene_for(0, objects=2).things, background="studio")
    assert judge.judge(render(pair))[0].others > 0.2
