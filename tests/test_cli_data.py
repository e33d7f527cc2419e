"""`osp data check`: a manifest is told what would be used of it."""

import json
import re
from pathlib import Path

import pytest
import render_clips
import torch
from command import Command, mistake

from opensoraplan.data.video import VideoWriter
from opensoraplan.formats.mindspeed.inference import read_selection

SMALL = ["num_frames=25", "min_num_frames=25", "train_fps=12", "max_height=96", "max_width=128"]


def test_render_then_check(osp: Command, tmp_path: Path) -> None:
    folder, table = tmp_path / "shapes", tmp_path / "fate.csv"
    osp(folder, "--count", "2", program=render_clips.main)
    assert len(list((folder / "clips").glob("*.mp4"))) == 2
    printed = osp("data", "check", str(folder / "data.txt"), "--csv", str(table), "--set", *SMALL).out
    assert "kept     2" in printed
    assert "25 x 96 x 128        2  100.0%" in printed
    assert len(table.read_text().splitlines()) == 3
    before = sorted(folder.rglob("*"))
    assert osp("data", "check", folder, "--set", *SMALL).out in printed  # by the data.txt in it
    assert sorted(folder.rglob("*")) == before


def test_the_default_selection_names_why_all_are_dropped(osp: Command, tmp_path: Path) -> None:
    osp(tmp_path, "--count", "1", program=render_clips.main)
    printed = osp("data", "check", tmp_path / "data.txt")
    assert "kept     0" in printed.out
    assert "too small  1  fewer pixels than min_hxw asks for" in printed.out
    assert mistake(printed) == f"no clip of {tmp_path / 'data.txt'} would be used: the table shows why"


def test_a_folder_of_clips_is_checked_with_and_without_captions(osp: Command, tmp_path: Path) -> None:
    for name, frames in (("long.mp4", 20), ("short.mp4", 4), ("silent.mp4", 20)):
        with VideoWriter(tmp_path / name, fps=24) as writer:
            writer.write(torch.zeros(frames, 32, 48, 3, dtype=torch.uint8))
        (tmp_path / name).with_suffix(".txt").write_text("" if name == "silent.mp4" else "a clip")
    (tmp_path / "broken.mp4").write_bytes(b"nothing")
    rules = ["num_frames=17", "min_num_frames=9", "drop_short_ratio=0", "force_resolution=false"]
    small = ["--set", *rules, "max_hxw=4096", "min_hxw=1"]
    table = osp("data", "check", str(tmp_path), "--csv", str(tmp_path / "table.csv"), *small).out
    assert "kept     1" in table
    assert "17 x 32 x 48" in table
    assert "short.mp4: 4 frames give 1, min_num_frames is 9" in table
    assert table.count(str(tmp_path / "broken.mp4")) == 1
    assert table.endswith(f"every record: {tmp_path / 'table.csv'}\n")
    again = osp("data", "check", tmp_path, "--no-captions", "--global-batch", "3", *small).out
    assert "kept     0" in again
    assert "2 samples of 17x32x48, 3 needed" in again
    assert "no caption" not in again
    assert "Shapes" not in again
    assert "every record" not in again


DENOISER = """
output = "run"
model = {{ pretrained = "nowhere" }}
[data]
manifest = "{clips}"
batch_size = 2
selection = {{ num_frames = 9, min_num_frames = 9, train_fps = 12, max_height = 64, max_width = 64 }}
[optimizer]
accumulate = 2
"""
VAE = f"""
method = "vae"
{DENOISER}
[loss]
kl = 1e-2
"""


@pytest.fixture
def silent(tiny_clips: Path, tmp_path: Path) -> Path:
    """Three clips of which two have captions."""
    folder = tmp_path / "silent"
    folder.mkdir()
    for number, clip in enumerate(sorted((tiny_clips.parent / "clips").glob("*.mp4"))[:3]):
        (folder / clip.name).write_bytes(clip.read_bytes())
        if number:
            (folder / clip.name).with_suffix(".txt").write_text("a ball")
    return folder


@pytest.mark.parametrize(
    ("run", "options", "expected"),
    [
        (DENOISER, [], ["kept     0", "no caption  1", "2 samples of 9x64x64, 4 needed"]),
        (DENOISER, ["--set", "optimizer.accumulate=1"], ["kept     2", "no caption  1"]),
        (DENOISER, ["--global-batch", "2"], ["kept     2", "no caption  1"]),
        (DENOISER, ["--no-captions", "--global-batch", "1"], ["kept     3"]),
        (VAE, ["--global-batch", "1"], ["kept     3"]),
        (VAE, ["--set", "data.selection.max_width=96"], ["kept     0", "too small  3"]),
    ],
)
def test_a_run_is_checked_as_it_will_train(
    osp: Command,
    tmp_path: Path,
    silent: Path,
    run: str,
    options: list[str],
    expected: list[str],
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(run.format(clips=silent))
    outcome = osp("data", "check", path, *options)
    assert outcome.code == (2 if "kept     0" in expected else 0)
    for part in ["records  3", *expected]:
        assert part in outcome.out


def test_a_folder_for_a_vae_needs_no_captions(osp: Command, silent: Path) -> None:
    small = ["num_frames=9", "min_num_frames=9", "train_fps=12", "max_height=64", "max_width=64"]
    assert "kept     3" in osp("data", "check", silent, "--no-captions", "--set", *small).out


def test_selection_from_the_guides_file(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    parameters = {"num_frames": 57, "train_fps": 12, "cfg": 0.1, "video_reader_type": "decoder"}
    path.write_text("# the guide's\n" + json.dumps({"dataset_param": {"preprocess_parameters": parameters}}))
    settings = read_selection(path, changes=["max_height=288", "max_width=512"])
    assert (settings.num_frames, settings.train_fps) == (57, 12)
    assert (settings.max_height, settings.max_width) == (288, 512)
    assert read_selection(None).num_frames == 121


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.jsonl"], "no.jsonl does not exist"),
        (["{clips}", "--data", "{bad}"], "unknown key 'num_frame' .did you mean 'num_frames'"),
        (["{clips}", "--data", "{other}"], "has no dataset_param.preprocess_parameters"),
        (["{clips}", "--set", "train_fps"], "a change is written section.key=value, got 'train_fps'"),
        (["{clips}"], "clips"),
        (["{run}", "--global-batch", "0"], "--global-batch must be at least 1, got 0"),
        (
            ["{run}", "--seed", "1"],
            "is a run, so its settings are used: .* --set .* instead of --seed",
        ),
        (
            ["{run}", "--set", "num_frames=9"],
            "unknown key 'num_frames' .did you mean 'data.selection.num_frames'",
        ),
        (["{run}", "--set", "data.manifest=none", "data.features=x"], "has no data.manifest"),
    ],
)
def test_mistakes_are_one_message(
    osp: Command,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "bad.json").write_text('{"dataset_param": {"preprocess_parameters": {"num_frame": 9}}}')
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "run.toml").write_text(DENOISER.format(clips=tmp_path / "clips"))
    names = {"{run}": "run.toml", "{clips}": "clips", "{bad}": "bad.json", "{other}": "other.json"}
    filled = [str(tmp_path / names[a]) if a in names else a for a in arguments]
    assert re.search(message, mistake(osp("data", "check", *filled)))


def test_all_files_are_held_against_the_manifest(osp: Command, tmp_path: Path, tiny_clips: Path) -> None:
    clip = {"path": str(next((tiny_clips.parent / "clips").glob("*.mp4"))), "cap": "a ball", "fps": 12}
    # The file has 9 x 64 x 64.
    rows = [
        {**clip, "num_frames": 17, "height": 64, "width": 64},
        {**clip, "num_frames": 9, "height": 64, "width": 128},
    ]
    path = tmp_path / "clips.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    sizes = ["num_frames=17", "min_num_frames=9", "max_height=64", "max_width=64"]
    small = ["--set", *sizes, "train_fps=12", "drop_short_ratio=0"]
    printed = osp("data", "check", str(path), *small).out
    assert "kept     2" in printed
    assert re.search("17 x 64 x 64 +1 ", printed)
    printed = osp("data", "check", str(path), "--all-files", *small).out
    assert "kept     1" in printed
    assert re.search("  9 x 64 x 64 +1 ", printed)
    assert "the manifest says 64 x 128 (height x width), the file is 64 x 64" in printed
