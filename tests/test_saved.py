"""Latents in files: what was written is read back, anything else is an error that names file and fault."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opensoraplan.generate import saved
from opensoraplan.models.text import PromptEmbeds
from opensoraplan.requests import Request

RECORD = {
    **Request(prompt="a cat", frames=9, height=32, width=48, steps=4).model_dump(mode="json"),
    "model": "m",
}
SCALING = {"shift": [0.0] * 4, "scale": [1.0] * 4}
LATENTS = torch.zeros(1, 4, 2, 4, 6)


def file_of(
    folder: Path,
    *,
    record: object = RECORD,
    step: object = 4,
    scaling: object = SCALING,
    **tensors: Tensor,
) -> Path:
    path = folder / f"a{saved.SUFFIX}"
    record = {**record, "step": step} if isinstance(record, dict) else record
    metadata = {"record": json.dumps(record), "scaling": json.dumps(scaling)}
    save_file({"latents": LATENTS, **tensors}, path, metadata=metadata)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    prompt = PromptEmbeds(torch.ones(1, 3, 2), torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 5))
    saved.write(tmp_path / "a", saved.SavedLatents(LATENTS, 0, RECORD, SCALING, prompt, velocity=LATENTS + 1))
    found = saved.read(tmp_path / "a")
    assert (found.step, found.record, found.scaling, found.negative) == (0, RECORD, SCALING, None)
    assert found.prompt is not None
    assert torch.equal(found.prompt.pooled, prompt.pooled)
    assert saved.is_latents_of(tmp_path / "a", RECORD)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"steps": None}, "record: steps: Input should be a valid integer"),
        ({"steps": "4"}, "record: steps: Input should be a valid integer, got '4'"),
        ({"steps": 10**30}, "record: steps: .* less than or equal to 10000"),
        (
            {"height": 96},
            r"has latents of shape \[1, 4, 2, 4, 6\]; its record needs \[1, channels, 2, 12, 6\]",
        ),
        ({"frames": [9]}, "record: frames: "),
        ({"frames": 10}, "frames must be 8k \\+ 1"),
        ({"fps": 0}, "record: fps: "),
        ({"seed": -1}, "record: seed: "),
        ({"prompt": 3}, "record: prompt: Input should be a valid string"),
        ({"model": None}, "record: model: "),
        ({"model": {"transformer": "a"}}, "model must say where its vae is"),
        ({"vae_dtype": []}, "record: vae_dtype: "),
        ({name: None for name in RECORD}, "record: .*; and [0-9]+ more"),
    ],
)
def test_records_that_are_none(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, record={**RECORD, **changes})
    with pytest.raises(ValueError, match=fault) as error:
        saved.read_record(path)
    assert str(error.value).startswith(str(path))
    assert "pydantic" not in str(error.value)
    assert not saved.is_latents_of(path, RECORD)


@pytest.mark.parametrize("missing", ["prompt", "model", "frames", "height", "width", "fps", "steps", "seed"])
def test_a_record_without_a_field(missing: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, record={key: value for key, value in RECORD.items() if key != missing})
    with pytest.raises(ValueError, match=f"record: {missing}: Field required"):
        saved.read_record(path)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"record": [1]}, "record must hold one JSON object, got a list"),
        ({"record": {"a": float("nan")}}, "record is not valid JSON: NaN"),
        ({"step": -1}, "record: step: .* greater than or equal to 0, got -1"),
        ({"step": 5}, "step 5 is greater than the number of steps, 4"),
        ({"step": True}, "record: step: "),
        ({"scaling": []}, "scaling must hold one JSON object"),
        ({"scaling": {"shift": None}}, "scaling: scale: Field required"),
        ({"scaling": {"shift": None, "scale": [1.0]}}, "scale has 1 values for 4 channels"),
        ({"scaling": {"shift": None, "scale": [0.0] * 4}}, "scaling: scale.0: .* greater than 0"),
        ({"latents": LATENTS.repeat(2, 1, 1, 1, 1)}, r"has latents of shape \[2, 4, 2, 4, 6\]"),
        ({"latents": LATENTS[0]}, r"has latents of shape \[4, 2, 4, 6\]"),
        ({"latents": LATENTS / 0}, "latents is not finite"),
        ({"velocity": LATENTS[:, :2].clone()}, "has velocity"),
        ({"prompt.mask": torch.ones(1, 3)}, "the embeddings of its prompt have the shapes"),
    ],
)
def test_files_that_are_damaged(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, **changes)
    with pytest.raises(ValueError, match=fault) as error:
        saved.read(path)
    assert str(error.value).startswith(str(path))
