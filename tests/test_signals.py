"""The real command in its surroundings: signals at any moment, streams that are closed or narrow."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import render_clips
from command import TIMEOUT, Command, Running, mistake

from opensoraplan import cli
from opensoraplan.cli.surroundings import guard_signals_and_streams, limit_spinning
from opensoraplan.generate import saved
from opensoraplan.parallel import ranks

OSP = [sys.executable, "-m", "opensoraplan"]
RENDER = [sys.executable, render_clips.__file__]
SMALL = ["--frames", "9", "--height", "32", "--width", "32", "--device", "cpu"]
# Clips that take long enough to be caught while they are written.
CLIPS = ["clips", "--frames", "65", "--height", "192", "--width", "192"]
Process = subprocess.Popen[str]
Start = Callable[..., Running]


def started(*words: object, **options: Any) -> Process:  # noqa: ANN401
    """A process of a Python of its own, for what happens while it begins or is of its streams."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen([*map(str, words)], text=True, env=environment, **options)


def end_of(process: Process) -> tuple[int, str]:
    """Its exit code, and what it said."""
    try:
        said = process.communicate(timeout=TIMEOUT)[1]
    finally:
        process.kill()
    return process.returncode, said


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def test_a_stopped_generation_saves_latents(
    start: Start, osp: Command, tiny_model: Path, tmp_path: Path
) -> None:
    """As Ctrl-C does, which test_cli.py tries. The newest are saved, not those of the tenth step before.
    Until then no other process makes the same video.
    """
    long = ["generate", "a cat", "--model", tiny_model, *SMALL, "--steps", "9999"]
    made = start(*long, umask=0o027)
    place = tmp_path / "samples" / "a-cat_seed0.latents.safetensors"
    made.wait_until(place.exists)
    refused = mistake(osp(*long))
    assert f"another process ({made.pid} on " in refused
    assert "is making the same video" in refused
    made.send(signal.SIGTERM)
    assert made.wait() == 128 + signal.SIGTERM, made.said()
    told = made.said()
    assert told.endswith("osp: stopped\n")
    assert "stopped after 0 of 1 videos: continue with the same command and --resume" in told
    assert "Traceback" not in told
    assert os.listdir(tmp_path / "samples") == [place.name]
    assert saved.read_record(place)[1] > 1
    assert place.stat().st_mode & 0o777 == 0o640


def test_a_signal_while_all_is_imported_is_no_traceback(tiny_model: Path, tmp_path: Path) -> None:
    """What Python itself has not yet imported when it starts is not ours to help."""
    moments = (0.5, 1, 2, 4)
    for number, moment in zip([signal.SIGINT, signal.SIGTERM] * 2, moments, strict=True):
        words = ["generate", "a cat", "--model", tiny_model, *SMALL, "--steps", "9999"]
        made = started(*OSP, *words, cwd=tmp_path)
        time.sleep(moment)
        made.send_signal(number)
        code, told = end_of(made)
        assert "opensoraplan" not in told.partition("Traceback")[2], told
        assert code in (128 + number, -number), told
        assert not hidden(tmp_path)


class Dying:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_python_ignores_comes_again() -> None:
    """What is raised where an object is removed is lost; the callbacks of imports are such places."""
    with guard_signals_and_streams("osp") as stop, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        Dying()
        end = time.monotonic() + 5
        while time.monotonic() < end:
            time.sleep(0.01)
    assert stop.signal == signal.SIGTERM


def test_what_killed_processes_left_is_cleared(start: Start, osp: Command, tmp_path: Path) -> None:
    made = start(*CLIPS, "--count", "400", program=render_clips.main)
    made.wait_until(lambda: list(tmp_path.glob("clips/clips/.osp-*.partial/*.mp4")))
    made.kill()
    assert hidden(tmp_path)
    assert osp(*CLIPS, "--count", "1", program=render_clips.main).code == 0
    assert not hidden(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_rendering_leaves_no_file_half_written(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    made = start(*CLIPS, "--count", "400", program=render_clips.main)
    made.wait_until(lambda: list(tmp_path.glob("clips/clips/.osp-*.partial/*.mp4")))
    made.send(number)
    assert made.wait() == 128 + number
    assert made.said().endswith("render_clips.py: stopped\n")
    assert not hidden(tmp_path)


def test_processes_share_the_clips_to_render(start: Start, osp: Command, tmp_path: Path) -> None:
    """None is rendered twice, and what one that is killed was at, another renders."""
    job = [*CLIPS, "--count", "8"]
    both = [start(*job, program=render_clips.main) for _ in range(2)]
    both[0].wait_until(lambda: len(list(tmp_path.glob("clips/clips/.osp-*.partial"))) == 2)
    both[0].kill()
    assert osp(*job, program=render_clips.main).code == 0
    assert both[1].wait() == 0, both[1].said()
    assert [name for name in sorted(os.listdir(tmp_path / "clips/clips")) if name.endswith(".mp4")] == [
        f"{number:06d}.mp4" for number in range(8)
    ]


def test_processes_share_the_prompts_of_a_file(
    start: Start, osp: Command, tiny_model: Path, tmp_path: Path
) -> None:
    """One that is killed keeps none of them."""
    prompts = [f"cat number {number}" for number in range(4)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    job = ("generate", "prompts.txt", "--model", tiny_model, *SMALL, "--steps", "8", "--out", "out")
    other = start(*job)
    other.wait_until(lambda: list(tmp_path.glob("out/*.mp4")))
    killer = threading.Timer(0.1, other.kill)
    killer.start()
    outcome = osp(*job)
    killer.join()
    assert outcome.code == 0, outcome
    assert sorted(path.name for path in tmp_path.glob("out/*.mp4")) == [
        f"{number:04d}_cat-number-{number}_seed{number}.mp4" for number in range(4)
    ]


def test_output_that_nobody_reads() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    made = started(*OSP, "--help", stdout=writing)
    os.close(writing)
    assert end_of(made) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_output_onto_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        made = started(*OSP, "--help", stdout=full)
    assert end_of(made) == (2, "osp: error: stdout: No space left on device\n")


# A program in the surroundings of the command that uses both streams while it writes two files.
WRITE = """
import logging, sys
from opensoraplan.cli import main

def write(words):
    with open("a.txt", "w") as first, open("b.txt", "w") as second:
        sys.stdout.write("said\\n" * 9999)
        logging.getLogger("opensoraplan").info("told")
        first.write("first")
        second.write("second")

main(write)
"""


def end_with_streams(closed: str, program: list[str], folder: Path) -> None:
    command = ["bash", "-c", f'"$@" {closed}', "bash", *program]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=TIMEOUT)
    assert ended.returncode == 0, ended


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "2> >(true)"])
def test_streams_that_are_closed_end_no_run(tmp_path: Path, closed: str) -> None:
    """Nor do they get into the files that are opened in their place."""
    end_with_streams(closed, [sys.executable, "-c", WRITE], tmp_path)
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["first", "second"]


def test_clips_are_whole_where_both_streams_are_closed(tmp_path: Path) -> None:
    size = "--count 2 --frames 9 --height 64 --width 64"
    end_with_streams("1>&- 2>&-", [*RENDER, "clips", *size.split()], tmp_path)
    clips = sorted((tmp_path / "clips/clips").iterdir())
    assert [clip.name for clip in clips] == ["000000.mp4", "000001.mp4"]
    assert all(clip.read_bytes()[4:8] == b"ftyp" for clip in clips)


def test_narrow_terminals_and_letters_that_stdout_lacks() -> None:
    for environment in ({"COLUMNS": "1"}, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}):
        made = started(*OSP, "train", "--help", env=environment)
        out, told = made.communicate(timeout=TIMEOUT)
        assert (made.returncode, told) == (0, ""), environment
        assert "--resume" in out


# --- Several processes --------------------------------------------------------------------------------------


def impatient() -> None:
    """The command, which waits in silence for a shorter time than usual."""
    ranks._SILENCE_S = 0.5
    cli.main()


def test_others_that_do_not_come_are_told(start: Start) -> None:
    """Variables of a job that is over; the wait for it can be stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    made = start("generate", "A red ball.", *SMALL, "--steps", "1", environment=job, program=impatient)
    made.wait_until(lambda: "waits" in made.said())
    told = next(line for line in made.said().splitlines() if "waits" in line)
    assert "process 0 of 2" in told
    assert told.endswith("to run one process alone, unset RANK, WORLD_SIZE and LOCAL_RANK")
    made.send(signal.SIGINT)
    assert made.wait() != 0
    assert "Traceback" not in made.said()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian a.toml", "osp launch runs train, cache, generate, not 'trian' (did you mean 'train'?)"),
        ("train a.toml", "a.toml does not exist"),
        ("generate a.txt", "the prompt file a.txt does not exist"),
    ],
)
def test_launch_looks_at_the_command_first(osp: Command, command: str, message: str) -> None:
    told = osp("launch", "--processes", "2", "--", *command.split())
    assert told.code == 2
    assert told.err.startswith(f"osp: error: {message}")
    assert len(told.err.splitlines()) == 1, told


@pytest.mark.parametrize(
    ("load", "given", "expected"),
    [
        (0.5, {}, {"GOMP_SPINCOUNT": "10000"}),
        (999.0, {}, {"OMP_WAIT_POLICY": "passive"}),
        (999.0, {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        (0.5, {"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_threads_spin_less_on_busy_cores(
    monkeypatch: pytest.MonkeyPatch, load: float, given: dict[str, str], expected: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "environ", dict(given))
    limit_spinning()
    assert os.environ == expected
