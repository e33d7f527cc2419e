"""Whatever part of a run dies, the command ends within seconds, what was learned is saved, and the reason is
its last sentence. By real processes and real kills.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from opensoraplan.train.config import TrainSettings, VAETrainSettings
from opensoraplan.train.log.metrics import FILE as METRICS
from opensoraplan.train.run import checkpoint

MakeRun = Callable[..., TrainSettings]
Start = Callable[..., subprocess.Popen[bytes]]
# Starting takes most of it; a hang takes for ever.
TIMEOUT = 120
ENDLESS = {"steps": 100_000, "ema_decay": 0.9}
# The command, in which any model fails once there is a file named "fail".
WITH_A_BUG = """
import pathlib, torch
from opensoraplan.cli import main
def fail(*_):
    if pathlib.Path("fail").exists():
        raise KeyError("a bug")
torch.nn.modules.module.register_module_forward_pre_hook(fail)
main()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command in an empty folder, with stderr in the file `said`; kills what is left."""
    started: list[subprocess.Popen[bytes]] = []

    def command(*arguments: object, program: tuple[str, ...] = ("-m", "opensoraplan.cli")) -> object:
        line = [sys.executable, *program, *map(str, arguments)]
        with (tmp_path / "said").open("wb") as said:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            started.append(subprocess.Popen(line, cwd=tmp_path, stderr=said, env=environment))
        return started[-1]

    yield command
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.wait()


def configuration(verb: str, tiny_run: MakeRun, *, workers: int) -> Path:
    """The file of a run without an end, which saves nothing by itself."""
    run: TrainSettings | VAETrainSettings
    seldom = {"every": 100_000}
    run = tiny_run(data={"workers": workers}, optimizer=ENDLESS, checkpoint=seldom)
    if verb == "train-vae":
        data = {**run.data.model_dump(include={"manifest", "batch_size", "workers", "selection"})}
        values = {"output": run.output, "model": {"pretrained": run.vae.pretrained}, "optimizer": ENDLESS}
        values |= {"data": {**data, "frames": 9, "height": 64, "width": 64}, "log": {"every": 1}}
        run = VAETrainSettings.read({**values, "checkpoint": seldom}, where="the test's run")
    path = run.output.with_suffix(".json")
    path.write_text(run.model_dump_json())
    return path


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_steps(process: subprocess.Popen[bytes], folder: Path) -> None:
    log = folder / "run" / METRICS
    wait_until(lambda: process.poll() is not None or (log.exists() and log.read_text().count("\n") >= 2))
    assert process.poll() is None, (folder / "said").read_text()


def data_workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if child.name() == "pt_data_worker"]


def assert_all_is_saved(folder: Path) -> None:
    """The last step that was logged is in a checkpoint, which can be read."""
    last = json.loads((folder / "run" / METRICS).read_text().splitlines()[-1])["step"]
    assert checkpoint.steps(folder / "run") == [last]
    assert checkpoint.load(folder / "run", last).parts["model"]


def end_of(process: subprocess.Popen[bytes], folder: Path) -> tuple[int, str]:
    """Exit code and last line."""
    code = process.wait(TIMEOUT)
    return code, (folder / "said").read_text().splitlines()[-1]


@pytest.mark.parametrize(("verb", "workers"), [("train", 2), ("train-vae", 1)])
def test_a_killed_worker_ends_the_run(
    tiny_run: MakeRun, start: Start, tmp_path: Path, verb: str, workers: int
) -> None:
    process = start(verb, configuration(verb, tiny_run, workers=workers))
    wait_for_steps(process, tmp_path)
    before = data_workers(process)
    assert len(before) == workers
    before[0].kill()
    code, last = end_of(process, tmp_path)
    assert code == 2
    assert last.startswith("osp: error: a worker process that reads clips has died (SIGKILL): memory or")
    assert "Traceback" not in (tmp_path / "said").read_text()
    assert not any(worker.is_running() for worker in before)
    assert_all_is_saved(tmp_path)


@pytest.mark.parametrize(("verb", "workers"), [("train", 2), ("train-vae", 1)])
def test_a_bug_in_a_step_ends_the_run(
    tiny_run: MakeRun, start: Start, tmp_path: Path, verb: str, workers: int
) -> None:
    process = start(verb, configuration(verb, tiny_run, workers=workers), program=("-c", WITH_A_BUG))
    wait_for_steps(process, tmp_path)
    (tmp_path / "fail").touch()
    code, last = end_of(process, tmp_path)
    assert code == 1
    assert last == "osp: error: KeyError: 'a bug' (a bug: please report it with what is above)"
    assert_all_is_saved(tmp_path)


def test_a_killed_worker_ends_a_cache(
    tiny_run: MakeRun, start: Start, tmp_path: Path, tiny_clips: Path
) -> None:
    whole = json.loads(tiny_clips.with_name("annotation.json").read_text())
    many = tiny_clips.with_name("many.json")
    many.write_text(json.dumps(whole * 200))
    config = tmp_path / "run.json"
    config.write_text(tiny_run(data={"manifest": many, "workers": 1}).model_dump_json())
    process = start("cache", config, "--out", "features")
    wait_until(lambda: process.poll() is not None or data_workers(process))
    assert process.poll() is None, (tmp_path / "said").read_text()
    data_workers(process)[0].kill()
    code, last = end_of(process, tmp_path)
    assert code == 2
    assert last.startswith("osp: error: a worker process that reads clips has died (SIGKILL): ")
