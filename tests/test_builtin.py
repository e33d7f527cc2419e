"""The model that comes with the package: small, whole, and what `osp generate` uses without a --model."""

import json
import re
from pathlib import Path

from command import Command

from opensoraplan import OpenSoraPlanPipeline, builtin
from opensoraplan.data.video import probe
from opensoraplan.defaults import GenerateDefaults
from opensoraplan.fingerprint import fingerprint_weights
from opensoraplan.runtime.step_cache import Calibration
from opensoraplan.shapes import latent_shape

MEBIBYTE = 2**20


def test_weights_are_small_enough_to_ship() -> None:
    files = [path for path in builtin.folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 32 * MEBIBYTE
    assert max(path.stat().st_size for path in files) < 16 * MEBIBYTE


def test_pipeline_takes_prompts_as_they_are() -> None:
    pipeline = OpenSoraPlanPipeline.from_pretrained(builtin.folder())
    settings = pipeline.prompt_settings
    assert settings.template is None
    assert pipeline.scheduler.config["shift"] < 7  # the release's, for latents 250 times as large
    assert settings.negative("") == ""
    assert len(pipeline.transformer.config["num_layers"]) == 5
    assert list(pipeline.transformer.config["sparse_n"]) == [1, 2, 4, 2, 1]


def test_defaults_are_a_video_that_can_be_made() -> None:
    defaults = GenerateDefaults.of(builtin.folder())
    size = (defaults.frames or 0, defaults.height or 0, defaults.width or 0)
    assert latent_shape(*size) == (4, 12, 16)


def test_its_step_cache_was_measured_on_its_weights() -> None:
    folder = builtin.folder()
    assert Calibration.of(folder).transformer == fingerprint_weights(folder / "transformer")


def test_its_files_name_no_place_on_a_machine() -> None:
    for path in builtin.folder().rglob("*config.json"):
        text = path.read_text()
        assert "_name_or_path" not in text, path
        assert not re.search(r'"/\w', text), path


def test_generate_without_a_model_uses_it(osp: Command, tmp_path: Path) -> None:
    outcome = osp("generate", "a red ball moves left", "--steps", "1", "--out", "a.mp4")
    info = probe(tmp_path / "a.mp4")
    assert "as no --model is given; it knows coloured shapes" in outcome.log
    assert (info.frames, info.height, info.width, info.fps) == (25, 96, 128, 12)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["prompt"] == "a red ball moves left"


def test_another_size_than_it_was_trained_on_is_warned_about(osp: Command) -> None:
    ball = ["generate", "ball", "--steps", "1", "--frames", "1"]
    other = osp(*ball, "--height", "64", "--width", "64", "--out", "a.png").log
    assert "trained on 96 x 128 (height x width); at 64 x 64 it may repeat objects" in other
    assert "repeat objects" not in osp(*ball, "--out", "b.png").log
