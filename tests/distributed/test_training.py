"""`osp train` in several processes: the losses of one, and checkpoints for any number of them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opensoraplan.train import checkpoint
from opensoraplan.train.cache import write_cache
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.trainer import train

MakeRun = Callable[..., TrainSettings]
TIMEOUT = 400
# Several processes sum in another order than one does.
CLOSE = 1e-4


def losses(run: TrainSettings) -> list[float]:
    lines = (run.output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def launch(run: TrainSettings, *, processes: int, restarts: int = 0) -> subprocess.Popen[str]:
    config = run.output.with_suffix(f".{processes}.json")
    config.write_text(run.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    command += ["-m", "opensoraplan.cli", "train", str(config), "--resume", "latest"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def launch_cache(run: TrainSettings, out: Path, *, processes: int) -> subprocess.Popen[str]:
    config = run.output.with_suffix(".cache.json")
    config.write_text(run.model_dump_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "opensoraplan.cli", "cache", str(config), "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for success; what was written to stderr."""
    _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, said
    return said


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


def test_cache_of_two_processes_has_the_files_of_one(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run()
    write_cache(run, tmp_path / "one")
    finish(launch_cache(run, tmp_path / "two", processes=2))
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "two").iterdir()}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_other_global_batch_is_refused_with_what_would_fit(six: MakeRun) -> None:
    train(six(steps=2))
    run = six(steps=4, ranks=3)
    job = launch(run, processes=2)
    _, said = job.communicate(timeout=TIMEOUT)
    assert job.returncode != 0
    assert "set data.batch_size x optimizer.accumulate to 3" in said
