"""The real command in its surroundings: signals at any moment, streams that are closed or narrow."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensoraplan.cli.surroundings import limit_spinning, settled
from opensoraplan.generate import saved

OSP = [sys.executable, "-m", "opensoraplan"]
RENDER = [sys.executable, str(Path(__file__).parents[1] / "examples/render_clips.py")]
SMALL = ["--frames", "9", "--height", "32", "--width", "32", "--device", "cpu"]


def start(
    *arguments: object,
    cwd: Path,
    program: list[str] = OSP,
    **options: Any,  # noqa: ANN401
) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*program, *map(str, arguments)], cwd=cwd, text=True, env=environment, **options)


def wait_until(is_so: Callable[[], object], process: subprocess.Popen[str], *, seconds: float = 120) -> None:
    """Wait for something that a process under way is to bring about."""
    end = time.monotonic() + seconds
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_generation_saves_latents(tiny_model: Path, tmp_path: Path, number: signal.Signals) -> None:
    """As Ctrl-C does, which test_cli.py tries. The newest are saved, not those of the tenth step before."""
    long = ["generate", "a cat", "--model", tiny_model, *SMALL, "--steps", "9999"]
    made = start(*long, cwd=tmp_path, umask=0o027)
    place = tmp_path / "samples" / "a-cat_seed0.latents.safetensors"
    wait_until(place.exists, made)
    made.send_signal(number)
    _, told = made.communicate()
    assert made.returncode == 128 + number, told
    assert told.endswith("osp: stopped\n")
    assert "stopped, 0 of 1 done: the same command with --resume goes on" in told
    assert "Traceback" not in told
    assert os.listdir(tmp_path / "samples") == [place.name]
    assert saved.read_record(place)[1] > 1
    assert place.stat().st_mode & 0o777 == 0o640


def test_a_signal_while_all_is_imported_is_no_traceback(tiny_model: Path, tmp_path: Path) -> None:
    """What Python itself has not yet imported when it starts is not ours to help."""
    moments = (0.5, 1, 2, 4)
    for number, moment in zip([signal.SIGINT, signal.SIGTERM] * 2, moments, strict=True):
        made = start("generate", "a cat", "--model", tiny_model, *SMALL, "--steps", "9999", cwd=tmp_path)
        time.sleep(moment)
        made.send_signal(number)
        _, told = made.communicate()
        assert "opensoraplan" not in told.partition("Traceback")[2], told
        assert made.returncode in (128 + number, -number), told
        assert not hidden(tmp_path)


class Dying:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_that_python_ignores_comes_again() -> None:
    """What is raised where an object is removed is lost; the callbacks of imports are such places."""
    with settled("osp") as stop, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        Dying()
        end = time.monotonic() + 5
        while time.monotonic() < end:
            time.sleep(0.01)
    assert stop.signal == signal.SIGTERM


def test_what_killed_processes_left_is_cleared(tmp_path: Path) -> None:
    render = ("clips", "--frames", "9", "--height", "64", "--width", "64")
    made = start(*render, "--count", "4000", cwd=tmp_path, program=RENDER)
    wait_until(lambda: list(tmp_path.glob("clips/clips/.osp-*.partial/*.mp4")), made)
    made.kill()
    made.communicate()
    assert hidden(tmp_path)
    again = start(*render, "--count", "1", cwd=tmp_path, program=RENDER)
    again.communicate()
    assert again.returncode == 0
    assert not hidden(tmp_path)


def test_a_terminated_rendering_leaves_no_file_half_written(tmp_path: Path) -> None:
    made = start("clips", "--count", "4000", cwd=tmp_path, program=RENDER)
    wait_until(lambda: list(tmp_path.glob("clips/clips/.osp-*.partial/*.mp4")), made)
    made.terminate()
    assert made.communicate()[1].endswith("render_clips.py: stopped\n")
    assert made.returncode == 143
    assert not hidden(tmp_path)


def test_processes_share_the_clips_to_render(tmp_path: Path) -> None:
    """None is rendered twice, and what one that is killed was at, another renders."""
    three = [start("clips", "--count", "30", cwd=tmp_path, program=RENDER) for _ in range(3)]
    wait_until(lambda: len(list(tmp_path.glob("clips/clips/.osp-*.partial"))) == 3, three[0])
    three[0].kill()
    for made in three:
        _, told = made.communicate()
        assert made.returncode == (-signal.SIGKILL if made is three[0] else 0), told
    assert [name for name in sorted(os.listdir(tmp_path / "clips/clips")) if name.endswith(".mp4")] == [
        f"{number:06d}.mp4" for number in range(30)
    ]


def test_processes_share_the_prompts_of_a_file(tiny_model: Path, tmp_path: Path) -> None:
    """One that is killed keeps none of them."""
    prompts = [f"cat number {number}" for number in range(4)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    job = ("generate", "prompts.txt", "--model", tiny_model, *SMALL, "--steps", "8", "--out", "out")
    both = [start(*job, cwd=tmp_path) for _ in range(2)]
    wait_until(lambda: list(tmp_path.glob("out/*.mp4")), both[0])
    both[0].kill()
    both[0].communicate()
    _, told = both[1].communicate()
    assert both[1].returncode == 0, told
    assert sorted(path.name for path in tmp_path.glob("out/*.mp4")) == [
        f"{number:04d}_cat-number-{number}_seed{number}.mp4" for number in range(4)
    ]


def test_one_video_is_not_made_by_two_at_once(tiny_model: Path, tmp_path: Path) -> None:
    long = ("generate", "a cat", "--model", tiny_model, *SMALL, "--steps", "9999")
    first = start(*long, cwd=tmp_path)
    wait_until(lambda: list(tmp_path.glob("samples/*.latents.safetensors")), first)
    second = start(*long, cwd=tmp_path)
    _, told = second.communicate()
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert f"another process ({first.pid} on " in told
    assert "is making this very video" in told


def test_output_that_nobody_reads(tmp_path: Path) -> None:
    command = f"{sys.executable} -m opensoraplan plan | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.stdout, ended.stderr) == ("141\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_output_onto_a_full_disk(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        made = start("plan", cwd=tmp_path, stdout=full)
        assert made.communicate()[1] == "osp: error: stdout: No space left on device\n"
    assert made.returncode == 2


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-", "2> >(true)"])
def test_streams_that_are_closed_end_no_run(tmp_path: Path, closed: str) -> None:
    """Nor do they get into the files that are opened in their place."""
    render = "clips --count 2 --frames 9 --height 64 --width 64"
    command = f"{' '.join(RENDER)} {render} {closed}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended
    clips = sorted((tmp_path / "clips/clips").iterdir())
    assert [clip.name for clip in clips] == ["000000.mp4", "000001.mp4"]
    assert all(clip.read_bytes()[4:8] == b"ftyp" for clip in clips)


def test_narrow_terminals_and_letters_that_stdout_lacks(tmp_path: Path) -> None:
    for environment in ({"COLUMNS": "1"}, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}):
        made = start("train", "--help", cwd=tmp_path, env=environment)
        out, told = made.communicate(timeout=60)
        assert (made.returncode, told) == (0, ""), environment
        assert "--resume" in out


# --- Several processes --------------------------------------------------------------------------------------


def test_others_that_do_not_come_are_told(tmp_path: Path) -> None:
    """Variables of a job that is over; the wait for it can be stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    made = start("generate", "A red ball.", *SMALL, "--steps", "1", cwd=tmp_path, env=job)
    assert made.stderr is not None
    told = next(line for line in made.stderr if "waits" in line)
    assert "process 0 of 2" in told
    assert told.endswith("to run one process alone, unset RANK, WORLD_SIZE and LOCAL_RANK\n")
    made.send_signal(signal.SIGINT)
    assert "Traceback" not in made.communicate()[1]
    assert made.returncode != 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian a.toml", "osp launch runs train, cache, generate, not 'trian' (did you mean 'train'?)"),
        ("train a.toml", "a.toml does not exist"),
        ("generate a.txt", "the prompt file a.txt does not exist"),
    ],
)
def test_launch_looks_at_the_command_first(tmp_path: Path, command: str, message: str) -> None:
    made = start("launch", "--processes", "2", "--", *command.split(), cwd=tmp_path)
    _, told = made.communicate()
    assert made.returncode == 2
    assert told.startswith(f"osp: error: {message}")
    assert len(told.splitlines()) == 1, told


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
