"""A run is resumed where the files that it uses have moved, not where they are others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from opensoraplan.train.config import TrainSettings
from opensoraplan.train.inputs.cache import write_cache
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")
MakeRun = Callable[..., TrainSettings]


def logged(run: TrainSettings) -> list[float]:
    lines = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def change_weights(folder: Path) -> None:
    """Of the model in this folder."""
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    first = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    save_file({**tensors, first: tensors[first] * 1.5}, weights, metadata={"format": "pt"})


def test_a_resumed_run_tells_of_encoders_that_were_replaced(
    tiny_run: MakeRun, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    parts = {"vae": {"pretrained": model}, "text": {"t5": model, "clip": model}}

    def go_on(steps: int) -> str:
        caplog.clear()
        train(tiny_run(**parts, optimizer={"steps": steps}, checkpoint={"every": 1}), resume="latest")
        return caplog.text

    assert "files are not those" not in go_on(1) + go_on(2)
    for name in ("vae", "text_encoder_2"):
        change_weights(model / name)
    assert "vae.pretrained, text.clip: the files are not those that the run was trained with" in go_on(3)
    assert "files are not those" not in go_on(4)


def test_a_run_goes_on_where_its_files_have_moved(
    tiny_run: MakeRun, tiny_model: Path, tmp_path: Path
) -> None:
    """To the same bits; other files there are refused."""
    copy, other = (shutil.copytree(tiny_model, tmp_path / name) for name in ("copy", "other"))
    change_weights(other / "text_encoder_2")

    def run_from(model: Path, *, steps: int, clip: Path | None = None) -> TrainSettings:
        parts = {"vae": {"pretrained": model}, "text": {"t5": model, "clip": clip or model}}
        return tiny_run(**parts, model={"pretrained": model}, optimizer={"steps": steps})

    whole = tiny_run("whole", optimizer={"steps": 4})
    train(whole)
    train(run_from(tiny_model, steps=2))
    message = rf"resumed with other files .*:\n  text\.clip: {tiny_model} -> {other}\nName"
    with pytest.raises(ValueError, match=message):
        train(run_from(copy, steps=4, clip=other), resume="latest")
    run = run_from(copy, steps=4)
    train(run, resume="latest")
    assert logged(run) == logged(whole)
    assert json.loads((run.output / "config.json").read_text())["text"]["clip"] == str(copy)


def test_a_run_goes_on_with_features_that_have_moved(tiny_run: MakeRun, tmp_path: Path) -> None:
    write_cache(tiny_run(), tmp_path / "features")
    write_cache(tiny_run(text={"clean": False}), tmp_path / "other")
    sections: dict[str, Any] = {"vae": {"pretrained": None}, "text": {"t5": None, "clip": None}}
    train(tiny_run(**sections, data={"features": tmp_path / "features"}, optimizer={"steps": 2}))
    (tmp_path / "features").rename(tmp_path / "moved")
    for folder in ("other", "moved"):
        run = tiny_run(**sections, data={"features": tmp_path / folder}, optimizer={"steps": 4})
        if folder == "other":
            with pytest.raises(ValueError, match=r"\n  data\.features: .*features -> .*other\nName the old"):
                train(run, resume="latest")
        else:
            train(run, resume="latest")
    assert checkpoint.steps(tmp_path / "run") == [2, 4]
