"""What cleaning removes from the captions of a run, as `osp data check` and the run itself say it."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import Command

from opensoraplan.train.config import TrainSettings
from opensoraplan.train.inputs.sources import open_source
from opensoraplan.train.log.validation import Validation

CAPTIONS = [
    "A red ball moves to the left.",
    "一只猫在海滩上奔跑",
    "a photo of p3rs0n",
    ["<trigger>", "a p3rs0n in 1920x1080"],
    "clip.mp4",
    "Two “cats” \u2013 that isn\u2019t much, is it?",
    "a photo of p3rs0n",
    "Ein Kätzchen",
]
SIZE = {"num_frames": 9, "min_num_frames": 9, "train_fps": 12, "max_height": 64, "max_width": 64}


@pytest.fixture
def manifest(tiny_clips: Path) -> Path:
    """The tiny clips with other captions."""
    records = json.loads(tiny_clips.with_name("annotation.json").read_text())
    path = tiny_clips.with_name("odd.json")
    path.write_text(json.dumps([{**r, "cap": cap} for r, cap in zip(records, CAPTIONS, strict=True)]))
    return path


def test_the_check_counts_and_names_them(osp: Command, manifest: Path) -> None:
    size = ["--set", *(f"{key}={value}" for key, value in SIZE.items())]
    said = osp("data", "check", manifest, *size).out
    table = said[said.index("Captions\n") :].splitlines()
    assert table[1] == "  3 captions are empty after cleaning: their clips train without a caption"
    assert table[2].endswith("mp4: '一只猫在海滩上奔跑' becomes ''")
    assert table[3].endswith("mp4: '<trigger>' becomes ''")
    assert table[5].startswith("  3 captions lose words to cleaning: p3rs0n (3), ")
    assert "1920x1080 (1)" in table[5]
    assert table[6].endswith("mp4: 'a photo of p3rs0n' becomes 'a photo of'")
    assert table[-1] == "  text.keep_chinese=true keeps Chinese characters, text.clean=false all of the text"
    assert "Captions" not in osp("data", "check", manifest, "--no-captions", *size).out


def test_a_run_says_it_before_it_begins(
    manifest: Path,
    tiny_run: Callable[..., TrainSettings],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said(**text: bool) -> list[str]:
        caplog.clear()
        settings = tiny_run(data={"manifest": manifest}, text=text)
        open_source(settings, device=torch.device("cpu"))
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    emptied, shortened = said()
    assert emptied.startswith("3 captions are empty after cleaning: their clips train without a caption: ")
    assert shortened.startswith("3 captions lose words to cleaning: p3rs0n (3), ")
    assert said(keep_chinese=True)[0].startswith("2 captions are empty")
    assert said(clean=False) == []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert said() == []


def test_prompts_of_validation_are_checked_before_the_first_step(
    tiny_run: Callable[..., TrainSettings], caplog: pytest.LogCaptureFixture
) -> None:
    def validation(prompt: str) -> None:
        settings = tiny_run(validation={"every": 2, "prompts": [prompt], "frames": 9})
        Validation(settings, encoders=None, device=torch.device("cpu"))

    validation("a p3rs0n walks")
    assert "validation.prompts: cleaning removes p3rs0n from the prompt 'a p3rs0n walks'" in caplog.text
    with pytest.raises(
        ValueError, match=r"validation\.prompts: cleaning leaves nothing of the prompt 'p3rs0n'"
    ):
        validation("p3rs0n")
