"""Disks that are full: what is said to be saved is there. Each job is a process that the system lets write no
file beyond some size.
"""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from opensoraplan.generate import job as generate
from opensoraplan.generate import saved

SIZE = ["--frames", "9", "--height", "32", "--width", "32"]
SMALL = [*SIZE, "--steps", "4", "--guidance", "1", "--device", "cpu"]
# Bytes: less than latents or a video take.
ROOM = 2000
# A command whose disk is full from its N-th pass through the denoiser on, N = 0: from the start.
JOB = """
import resource, sys
from itertools import count
from torch.nn.modules.module import register_module_forward_pre_hook
from opensoraplan import cli
from opensoraplan.models.sparse_ummdit import SparseUMMDiT

passes, first = count(1), int(sys.argv.pop(1))

def fill(module=None, _inputs=None):
    if module is None or isinstance(module, SparseUMMDiT) and next(passes) == first:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))

if first:
    register_module_forward_pre_hook(fill)
else:
    fill()
cli.main()
"""


def osp(*words: object, folder: Path, full_from: int = 0) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    script = JOB.format(room=ROOM)
    process = subprocess.run(
        [sys.executable, "-c", script, str(full_from), *map(str, words)],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in process.stderr, process.stderr
    return process.returncode, process.stderr


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_latents_that_could_not_be_saved_are_not_promised(tiny_model: Path, tmp_path: Path) -> None:
    command = ["generate", "a cat", "--model", tiny_model, *SMALL, "--save-every", 1, "--out", "a.mp4"]
    code, said = osp(*command, folder=tmp_path)
    assert code == 2
    assert "the latents of step 4 cannot be saved in a.latents.safetensors" in said
    assert "nothing is saved of this video, which begins anew the next time" in said
    assert "are in" not in said
    assert said.count("osp: error: ") == 1
    assert "a.mp4" in said.partition("osp: error: ")[2]
    assert names(tmp_path) == []


def test_latents_of_an_older_step_are_not_called_finished(tiny_model: Path, tmp_path: Path) -> None:
    command = ["generate", "a cat", "--model", tiny_model, *SMALL, "--save-every", 1, "--out", "a.mp4"]
    code, said = osp(*command, folder=tmp_path, full_from=3)
    assert code == 2
    assert "the latents after step 2 of 4 are in a.latents.safetensors" in said
    assert "finished" not in said
    assert names(tmp_path) == ["a.latents.safetensors"]
    assert saved.read_record(tmp_path / "a.latents.safetensors")[1] == 2
    code, said = osp(*command, "--resume", folder=tmp_path, full_from=99)
    assert code == 0, said
    assert "going on after step 2 of 4" in said
    assert names(tmp_path) == ["a.json", "a.mp4"]


def test_a_video_without_room_for_its_json_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        generate.write_record(tmp_path / "a.mp4", {"prompt": "a cat", "steps": 50})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "a.mp4 is written, but not its .json, whose text is in its metadata: " in caplog.text
    assert names(tmp_path) == []
