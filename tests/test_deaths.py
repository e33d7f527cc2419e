"""Whatever part of a run dies, the command ends within seconds, what was learned is saved, and the reason is
its last sentence. A run that was killed itself learns the same once it is resumed. By real processes and real
kills.
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from command import Running
from torch.nn.modules.module import register_module_forward_pre_hook

from opensoraplan import cli
from opensoraplan.train.config import TrainSettings, VAETrainSettings
from opensoraplan.train.log.metrics import FILE as METRICS
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.trainer import train

MakeRun = Callable[..., TrainSettings]
Start = Callable[..., Running]
ENDLESS = {"steps": 100_000, "ema_decay": 0.9}


def with_a_bug() -> None:
    """The command, in which any model fails once there is a file named "fail"."""

    def fail(*_: object) -> None:
        if Path("fail").exists():
            raise KeyError("a bug")

    register_module_forward_pre_hook(fail)
    cli.main()


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


def wait_for_steps(process: Running, folder: Path, *, lines: int = 2) -> None:
    """Until so many lines are logged; AssertionError if the process ends before."""
    log = folder / "run" / METRICS
    process.wait_until(lambda: log.exists() and log.read_text().count("\n") >= lines)


def data_workers(process: Running) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if child.name() == "pt_data_worker"]


def assert_all_is_saved(folder: Path) -> None:
    """The last step that was logged is in a checkpoint, which can be read."""
    last = json.loads((folder / "run" / METRICS).read_text().splitlines()[-1])["step"]
    assert checkpoint.steps(folder / "run") == [last]
    assert checkpoint.load(folder / "run", last).parts["model"]


def end_of(process: Running) -> tuple[int, str]:
    """Exit code and last line."""
    code = process.wait()
    return code, process.said().splitlines()[-1]


@pytest.mark.parametrize(("verb", "workers"), [("train", 2), ("train-vae", 1)])
def test_a_killed_worker_ends_the_run(
    tiny_run: MakeRun, start: Start, tmp_path: Path, verb: str, workers: int
) -> None:
    process = start(verb, configuration(verb, tiny_run, workers=workers))
    wait_for_steps(process, tmp_path)
    before = data_workers(process)
    assert len(before) == workers
    before[0].kill()
    code, last = end_of(process)
    assert code == 2
    assert last.startswith("osp: error: a worker process that reads clips has died (SIGKILL): memory or")
    assert "Traceback" not in process.said()
    assert not any(worker.is_running() for worker in before)
    assert_all_is_saved(tmp_path)


@pytest.mark.parametrize(("verb", "workers"), [("train", 2), ("train-vae", 1)])
def test_a_bug_in_a_step_ends_the_run(
    tiny_run: MakeRun, start: Start, tmp_path: Path, verb: str, workers: int
) -> None:
    process = start(verb, configuration(verb, tiny_run, workers=workers), program=with_a_bug)
    wait_for_steps(process, tmp_path)
    (tmp_path / "fail").touch()
    code, last = end_of(process)
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
    process.wait_until(lambda: data_workers(process))
    data_workers(process)[0].kill()
    code, last = end_of(process)
    assert code == 2
    assert last.startswith("osp: error: a worker process that reads clips has died (SIGKILL): ")


LORA: dict[str, Any] = {"kind": "lora", "rank": 4, "dropout": 0.2, "base": "int8"}
TRAINED = {"all weights": {}, "LoRA": LORA, "DoRA": {"kind": "dora", "rank": 2}}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("adapter", TRAINED.values(), ids=TRAINED)
def test_a_run_that_is_killed_and_resumed_learns_the_same(
    tiny_run: MakeRun, start: Start, tmp_path: Path, kills: int, adapter: dict[str, Any]
) -> None:
    """Bit for bit, at whatever moment it dies: in a step, in a checkpoint, while it begins."""
    steps = 6 * (kills + 1)
    run, whole = (
        tiny_run(
            name, adapter=adapter, optimizer={"steps": steps}, data={"workers": 1}, checkpoint={"keep": 1}
        )
        for name in ("run", "whole")
    )
    train(whole)
    config, moments = tmp_path / "run.json", random.Random(0)
    config.write_text(run.model_dump_json())
    for kill in range(kills):
        process = start("train", config, "--resume", "latest")
        wait_for_steps(process, tmp_path, lines=6 * kill + 1)
        time.sleep(moments.uniform(0, 0.3))
        assert process.code is None, process.said()  # or it was not killed
        process.kill()
    assert start("train", config, "--resume", "latest").wait() == 0
    one, two = (checkpoint.load(folder.output, steps).parts for folder in (whole, run))
    assert set(one) == set(two) == {"model", "ema", "optimizer"}
    for part, tensors in one.items():
        assert set(tensors) == set(two[part])
        assert all(torch.equal(tensor, two[part][name]) for name, tensor in tensors.items()), part
