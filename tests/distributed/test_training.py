"""`osp train` in several processes: the losses of one, and checkpoints for any number of them."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import cast

import psutil
import pytest
import torch
from denoising import CONFIG
from ranks import Ranks
from torch.distributed.tensor import DTensor

from opensoraplan.parallel.mesh import Mesh
from opensoraplan.train import checkpoint
from opensoraplan.train.building import build, build_shards
from opensoraplan.train.cache import write_cache
from opensoraplan.train.cache_ray import write_cache_by_ray
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.metrics import FILE as METRICS
from opensoraplan.train.trainer import train

MakeRun = Callable[..., TrainSettings]
TIMEOUT = 400
PORT = 29417
# Several processes sum in another order than one does.
CLOSE = 1e-4


def losses(run: TrainSettings) -> list[float]:
    """By step: those that were done again are logged again."""
    lines = (run.output / METRICS).read_text().splitlines()
    return list({record["step"]: record["loss"] for record in map(json.loads, lines)}.values())


def launch(run: TrainSettings, *, processes: int, restarts: int = 0) -> subprocess.Popen[str]:
    config = run.output.with_suffix(f".{processes}.json")
    config.write_text(run.model_dump_json())
    command = [sys.executable, "-m", "opensoraplan.cli", "launch", f"--processes={processes}"]
    command += [f"--max-restarts={restarts}", "--", "train", str(config), "--resume", "latest"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def launch_cache(run: TrainSettings, out: Path, *, processes: int) -> subprocess.Popen[str]:
    config = run.output.with_suffix(".cache.json")
    config.write_text(run.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "opensoraplan.cli", "cache", str(config), "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def launch_rank(run: TrainSettings, rank: int, *, of: int) -> subprocess.Popen[str]:
    """One process of a job, without torchrun."""
    config = run.output.with_suffix(".ranks.json")
    config.write_text(run.model_dump_json())
    command = [sys.executable, "-m", "opensoraplan.cli", "train", str(config)]
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(PORT), "WORLD_SIZE": str(of), "RANK": str(rank)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **meeting}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for success; what was written to stderr."""
    _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, said
    return said


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--kills")


@pytest.fixture
def six(tiny_run: MakeRun) -> MakeRun:
    """Runs of six samples a step, however they are shared out."""

    def settings(*, steps: int = 8, output: str = "run", ranks: int = 1, **parallel: int) -> TrainSettings:
        return tiny_run(
            output,
            data={"batch_size": 1},
            optimizer={"accumulate": 6 // ranks, "steps": steps, "eps": 1e-6},
            parallel=parallel,
        )

    return settings


def test_any_number_of_processes_goes_on_with_a_checkpoint_of_any_other(six: MakeRun) -> None:
    one = six(output="one")
    train(one)
    finish(launch(six(steps=2, ranks=2, dp_shard=2, tp=2), processes=4))
    assert (checkpoint.path_of(six().output, 2) / "sharded").is_dir()
    finish(launch(six(steps=4, sp=2), processes=2))
    train(six(steps=6), resume="latest")
    finish(launch(six(steps=8, ranks=3), processes=3))
    assert losses(six()) == pytest.approx(losses(one), rel=CLOSE)
    averages = [checkpoint.load(run.output, 8).parts["ema"]["proj_out.weight"] for run in (one, six())]
    assert (averages[0] - averages[1]).abs().max() < 1e-4


def test_encoders_that_take_turns_give_the_same_losses(six: MakeRun) -> None:
    runs = [six(steps=2, output=f"turns-{turns}", sp=2, encoder_dp=turns) for turns in (True, False)]
    for run in runs:
        finish(launch(run, processes=2))
    assert losses(runs[0]) == losses(runs[1])


def test_killed_ranks_cost_no_more_than_the_steps_since_the_last_checkpoint(six: MakeRun, kills: int) -> None:
    """torchrun starts all ranks again. One is killed at a random moment: early, in a step, while saving."""
    steps = 6 * (kills + 1)
    one = six(steps=steps, output="one")
    train(one)
    run = six(steps=steps, ranks=2, dp_shard=2)
    job = launch(run, processes=2, restarts=kills)
    moments = random.Random(0)
    for kill in range(kills):
        wait_for_step(run, 6 * kill + 1, job)
        time.sleep(moments.uniform(0, 0.5))
        kill_a_worker(job, moments)
    finish(job)
    assert losses(run) == pytest.approx(losses(one), rel=CLOSE)


def wait_for_step(run: TrainSettings, step: int, job: subprocess.Popen[str]) -> None:
    """Return once the run has logged so many steps, or has ended."""
    deadline = time.monotonic() + TIMEOUT
    log = run.output / METRICS
    while job.poll() is None and not (log.exists() and log.read_text().count("\n") >= step):
        assert time.monotonic() < deadline, f"step {step} was never reached"
        time.sleep(0.1)


def kill_a_worker(job: subprocess.Popen[str], chance: random.Random) -> None:
    while True:
        assert job.poll() is None, f"no rank could be killed: {job.communicate()[1]}"
        workers = []
        for child in psutil.Process(job.pid).children():
            with suppress(psutil.NoSuchProcess):
                if "train" in child.cmdline():
                    workers.append(child)
        if workers:
            chance.choice(workers).kill()
            return


def test_rank_that_hangs_ends_the_others_with_rank_and_step(six: MakeRun) -> None:
    run = six(steps=1000, ranks=2, dp_shard=2, timeout_s=10)
    jobs = [launch_rank(run, rank, of=2) for rank in range(2)]
    try:
        wait_for_step(run, 2, jobs[0])
        jobs[1].send_signal(signal.SIGSTOP)
        _, said = jobs[0].communicate(timeout=60)
    finally:
        for job in jobs:
            job.kill()
    assert jobs[0].returncode not in (0, -signal.SIGKILL)
    assert re.search(r"rank 0 of 2, step \d+: .*[Tt]imed out", said), said


def test_cache_of_two_processes_has_the_files_of_one(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run()
    write_cache(run, tmp_path / "one")
    finish(launch_cache(run, tmp_path / "two", processes=2))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_other_global_batch_is_refused_with_what_would_fit(six: MakeRun) -> None:
    train(six(steps=2))
    run = six(steps=4, ranks=3)
    job = launch(run, processes=2)
    _, said = job.communicate(timeout=TIMEOUT)
    assert job.returncode != 0
    assert "set data.batch_size x optimizer.accumulate to 3" in said


def test_ray_writes_the_files_of_one_process_and_a_killed_worker_loses_none(
    tiny_run: MakeRun, tmp_path: Path
) -> None:
    run = tiny_run()
    sizes = {"videos_per_shard": 2, "texts_per_shard": 8}
    write_cache(run, tmp_path / "one", **sizes)
    killer = threading.Thread(target=kill_a_ray_worker)
    killer.start()
    write_cache_by_ray(run, tmp_path / "ray", **sizes)
    killer.join()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "ray")
    again = write_cache_by_ray(run, tmp_path / "ray", **sizes)
    assert (again.written, again.missing) == (0, 0)


def kill_a_ray_worker() -> None:
    """One that encodes shards, as soon as there is one."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            if "_Worker" in process.name() + " ".join(process.cmdline()):
                process.kill()
                return
        time.sleep(0.05)
    raise AssertionError("Ray started no worker")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("new", [False, True], ids=["pretrained", "new"])
def test_shards_begin_as_one_process_does(ranks: Ranks, tiny_run: MakeRun, new: bool) -> None:
    changes = {"model": {"pretrained": None, "config": CONFIG}} if new else {}
    run = tiny_run(parallel={"dp_shard": 2, "tp": 2}, **changes)
    wanted = dict(build(run.model, seed=run.seed).named_parameters())
    for weights in ranks(whole_weights, run, ranks=4):
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def whole_weights(run: TrainSettings) -> dict[str, torch.Tensor]:
    mesh = Mesh.build(run.parallel, device_type="cpu")
    model = build_shards(run, mesh, device=torch.device("cpu"))
    return {name: cast(DTensor, weight).full_tensor().detach() for name, weight in model.named_parameters()}
