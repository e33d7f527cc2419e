"""`osp data render` and `osp data check`: clips are made, and a manifest is told what would be used of it."""

import json
import re
import sys
from pathlib import Path

import pytest

from opensoraplan import cli
from opensoraplan.convert.mindspeed_json import read_selection

SMALL = ["num_frames=25", "min_num_frames=25", "train_fps=12", "max_height=96", "max_width=96"]


def osp(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["osp", *arguments])
    cli.main()


def test_render_then_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = tmp_path / "shapes", tmp_path / "fate.csv"
    osp(monkeypatch, "data", "render", str(folder), "--count", "2")
    assert len(list((folder / "clips").glob("*.mp4"))) == 2
    osp(monkeypatch, "data", "check", str(folder / "data.txt"), "--csv", str(table), "--set", *SMALL)
    printed = capsys.readouterr().out
    assert "kept     2" in printed
    assert "25 x 96 x 96        2  100.0%" in printed
    assert len(table.read_text().splitlines()) == 3


def test_the_default_selection_names_why_all_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    osp(monkeypatch, "data", "render", str(tmp_path), "--count", "1")
    osp(monkeypatch, "data", "check", str(tmp_path / "data.txt"))
    printed = capsys.readouterr().out
    assert "kept     0" in printed
    assert "too small  1  fewer pixels than min_hxw asks for" in printed


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
    ],
)
def test_mistakes_are_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "bad.json").write_text('{"dataset_param": {"preprocess_parameters": {"num_frame": 9}}}')
    (tmp_path / "other.json").write_text("{}")
    names = {"{clips}": "clips", "{bad}": "bad.json", "{other}": "other.json"}
    filled = [str(tmp_path / names[a]) if a in names else a for a in arguments]
    with pytest.raises(SystemExit) as stop:
        osp(monkeypatch, "data", "check", *filled)
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert "osp: error: " in errors
    assert "Traceback" not in errors
    assert re.search(message, errors)
