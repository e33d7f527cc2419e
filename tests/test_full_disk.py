"""Disks that are full: what is said to be saved is there. The system lets the process of the tests write no
file beyond some size.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from command import Command, Outcome, mistake
from torch.nn.modules.module import register_module_forward_pre_hook

from opensoraplan.generate import job as generate
from opensoraplan.generate import saved
from opensoraplan.models.sparse_ummdit import SparseUMMDiT

SIZE = ["--frames", "9", "--height", "32", "--width", "32"]
SMALL = [*SIZE, "--steps", "4", "--guidance", "1", "--device", "cpu"]
# Bytes: less than latents or a video take.
ROOM = 2000


@contextmanager
def full_disk(*, room: int = ROOM, at_pass: int = 0) -> Iterator[None]:
    """The disk is full from a pass through the denoiser on, or from the start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    passes = count(1)

    def fill(module: object = None, _inputs: object = None) -> None:
        if module is None or (isinstance(module, SparseUMMDiT) and next(passes) == at_pass):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))

    hook = register_module_forward_pre_hook(fill)
    try:
        if not at_pass:
            fill()
        yield
    finally:
        hook.remove()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def told(outcome: Outcome) -> str:
    return outcome.log + mistake(outcome)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_latents_that_could_not_be_saved_are_not_promised(
    osp: Command, tiny_model: Path, tmp_path: Path
) -> None:
    command = ["generate", "a cat", "--model", tiny_model, *SMALL, "--save-every", 1, "--out", "a.mp4"]
    with full_disk():
        outcome = osp(*command)
    said = told(outcome)
    assert "cannot save the latents after step 4 in a.latents.safetensors" in said
    assert "nothing of this video is saved: it will start from the first step" in said
    assert "are saved in" not in said
    assert "a.mp4" in mistake(outcome)
    assert names(tmp_path) == []


def test_latents_of_an_older_step_are_not_called_finished(
    osp: Command, tiny_model: Path, tmp_path: Path
) -> None:
    command = ["generate", "a cat", "--model", tiny_model, *SMALL, "--save-every", 1, "--out", "a.mp4"]
    with full_disk(at_pass=3):
        said = told(osp(*command))
    assert "the latents after step 2 of 4 are saved in a.latents.safetensors" in said
    assert "the last step" not in said
    assert names(tmp_path) == ["a.latents.safetensors"]
    assert saved.read_record(tmp_path / "a.latents.safetensors")[1] == 2
    outcome = osp(*command, "--resume")
    assert outcome.code == 0, outcome
    assert "resuming after step 2 of 4" in outcome.log
    assert names(tmp_path) == ["a.json", "a.mp4"]


def test_a_video_without_room_for_its_json_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with full_disk(room=10):
        generate.write_record(tmp_path / "a.mp4", {"prompt": "a cat", "steps": 50})
    assert "a.mp4 is written, but its .json is not (the metadata has the same text): " in caplog.text
    assert names(tmp_path) == []
