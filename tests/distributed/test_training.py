"""`osp train` in several processes: the losses of one, and checkpoints for any number of them."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import psutil
import pytest
import torch
from command import Running
from diffusers.models.attention_dispatch import attention_backend
from ranks import Ranks
from safetensors.torch import load_file
from tiny_models import FOUR_HEADS
from torch.distributed.tensor import DTensor

from opensoraplan.data.buckets import BucketSampler
from opensoraplan.data.dataset import Batch
from opensoraplan.parallel.mesh import Mesh, MeshSettings
from opensoraplan.parallel.ranks import Ranks as JobRanks
from opensoraplan.train.config import TrainSettings
from opensoraplan.train.inputs.cache import write_cache
from opensoraplan.train.inputs.cache_ray import write_cache_by_ray
from opensoraplan.train.inputs.sources import Encoded, clips_of_all, open_source, select_clips
from opensoraplan.train.inputs.turns import encoded_batches
from opensoraplan.train.learner.building import build
from opensoraplan.train.log.metrics import FILE as METRICS
from opensoraplan.train.run import checkpoint
from opensoraplan.train.run.export import export_run
from opensoraplan.train.run.trainer import train

MakeRun = Callable[..., TrainSettings]
Begin = Callable[..., list[Running]]
TIMEOUT = 400
# Several processes sum in another order than one does.
CLOSE = 1e-4


def losses(run: TrainSettings, name: str = "loss") -> list[float]:
    """By step: those that were done again are logged again."""
    records = map(json.loads, (run.output / METRICS).read_text().splitlines())
    return list({record["step"]: record[name] for record in records if name in record}.values())


class Job(subprocess.Popen[bytes]):
    """Processes under way. What they say goes to a file: a pipe that is not read until they end fills up, and
    torchrun, which tells of every killed process, would wait for room in it for ever.
    """

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        self._log = log
        with log.open("wb") as file:
            super().__init__(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stderr=file)

    def said(self) -> str:
        return self._log.read_text()


def launch(run: TrainSettings, *, processes: int, restarts: int) -> Job:
    config = run.output.with_suffix(f".{processes}.json")
    config.write_text(run.model_dump_json())
    command = [sys.executable, "-m", "opensoraplan", "launch", f"--processes={processes}"]
    command += [f"--max-restarts={restarts}", "--", "train", str(config), "--resume", "latest"]
    return Job(command, config.with_suffix(".log"))


@pytest.fixture
def begin(start_ranks: Callable[..., list[Running]]) -> Begin:
    """Starts a run in several processes, without torchrun."""

    def begun(run: TrainSettings, *, ranks: int, resume: str = "latest") -> list[Running]:
        config = run.output.with_suffix(f".{ranks}.json")
        config.write_text(run.model_dump_json())
        return start_ranks("train", config, "--resume", resume, ranks=ranks)

    return begun


def finish(job: list[Running]) -> None:
    """Wait for success."""
    for process in job:
        assert process.wait(TIMEOUT) == 0, process.said()


@pytest.fixture
def six(tiny_run: MakeRun) -> MakeRun:
    """Runs of six samples a step, however they are shared out."""

    def settings(
        *,
        steps: int = 8,
        output: str = "run",
        ranks: int = 1,
        sections: Mapping[str, Any] = MappingProxyType({}),
        **parallel: int,
    ) -> TrainSettings:
        return tiny_run(
            output,
            data={"batch_size": 1, **sections.get("data", {})},
            optimizer={"accumulate": 6 // ranks, "steps": steps, "eps": 1e-6},
            parallel=parallel,
            **{name: section for name, section in sections.items() if name != "data"},
        )

    return settings


def test_any_number_of_processes_goes_on_with_a_checkpoint_of_any_other(six: MakeRun, begin: Begin) -> None:
    one = six(steps=4, output="one")
    train(one)
    finish(begin(six(steps=1, ranks=2, dp_shard=2, tp=2), ranks=4))
    files = [path.name for path in checkpoint.path_of(six().output, 1).glob("ema*")]
    assert sorted(files) == [f"ema-0000{rank}-of-00004.safetensors" for rank in range(1, 5)]
    finish(begin(six(steps=2, sp=2), ranks=2))
    train(six(steps=3), resume="latest")
    finish(begin(six(steps=4, ranks=3), ranks=3))
    assert losses(six()) == pytest.approx(losses(one), rel=CLOSE)
    assert losses(six(), "grad_norm") == pytest.approx(losses(one, "grad_norm"), rel=CLOSE)
    averages = [checkpoint.load(run.output, 4).parts["ema"]["proj_out.weight"] for run in (one, six())]
    assert (averages[0] - averages[1]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_that_of_one_process(six: MakeRun, begin: Begin, tmp_path: Path, kind: str) -> None:
    adapter = {"adapter": {"kind": kind, "rank": 2}}
    one = six(steps=3, output="one", sections=adapter)
    train(one)
    finish(begin(six(steps=1, ranks=2, dp_shard=2, sections=adapter), ranks=2))
    finish(begin(six(steps=2, sp=2, sections=adapter), ranks=2))
    train(six(steps=3, sections=adapter), resume="latest")
    assert losses(six()) == pytest.approx(losses(one), rel=CLOSE)
    assert losses(six(), "grad_norm") == pytest.approx(losses(one, "grad_norm"), rel=1e-3)
    files = []
    for run in (one, six()):
        files.append(tmp_path / f"{run.output.name}.safetensors")
        export_run(run.output, files[-1])
    expected, found = map(load_file, files)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=0)


def test_attention_that_is_chosen_is_that_of_every_process(ranks: Ranks, six: MakeRun) -> None:
    run = six(sp=2, sections={"model": {"attention": "_native_math"}})
    assert ranks(backends, run, ranks=2) == [{"_native_math"}, {"_native_math"}]


def backends(run: TrainSettings) -> set[str]:
    mesh = Mesh.build(run.parallel.filled(2), device_type="cpu")
    with attention_backend("native"):  # and back: diffusers' choice is the process's
        model = build(run, device=torch.device("cpu"), mesh=mesh)
    return {str(getattr(p._attention_backend, "value", None)) for p in model.attn_processors.values()}


def test_encoders_take_turns(ranks: Ranks, six: MakeRun) -> None:
    run = six(steps=2, sp=2)
    got: list[torch.Tensor] = []
    for turns, encoded in ((True, (6, 6)), (False, (12, 0))):
        other = run.model_copy(update={"parallel": run.parallel.model_copy(update={"encoder_dp": turns})})
        counts, moments = zip(*ranks(count_encoded, other, ranks=2), strict=True)
        assert counts == encoded
        got += moments
    assert all(torch.equal(moments, got[0]) for moments in got[1:])


def count_encoded(run: TrainSettings) -> tuple[int, torch.Tensor]:
    """How many of 12 micro-batches this rank encodes, and what it gets of all."""
    source, _ = open_source(run, device=torch.device("cpu"))
    counter = itertools.count()

    encode_batch = source.encode

    def encode(batch: Batch) -> Encoded:
        next(counter)
        return encode_batch(batch)

    sampler = BucketSampler(source.shapes, global_batch=6, seed=run.seed)
    job = JobRanks(Mesh.build(run.parallel.filled(2), device_type="cpu"))
    source = replace(source, encode=encode)
    turns = encoded_batches(source, sampler, run, job, start=0, account=lambda _failures: None)
    moments = torch.stack([turn.encoded.moments for turn in turns])
    return next(counter), moments


def test_validation_and_what_is_logged_are_those_of_one_process(
    six: MakeRun, begin: Begin, tiny_clips: Path
) -> None:
    """The average's weights stay out of training, and sums of steps that were saved half-way are whole."""
    validation = {"every": 2, "manifest": tiny_clips, "samples": 2}
    sections = {"validation": validation, "log": {"every": 3}}
    one = six(steps=6, output="one", sections=sections)
    two = six(steps=6, ranks=2, dp_shard=2, sections=sections)
    train(one)
    finish(begin(two, ranks=2))
    assert losses(two) == pytest.approx(losses(one), rel=CLOSE)
    assert losses(two, "validation_loss") == pytest.approx(losses(one, "validation_loss"), rel=CLOSE)
    finish(begin(two, ranks=2, resume="4"))  # in the middle of what step 6 logs
    assert losses(two) == pytest.approx(losses(one), rel=CLOSE)


def test_killed_ranks_cost_no_more_than_the_steps_since_the_last_checkpoint(six: MakeRun, kills: int) -> None:
    """torchrun starts all ranks again. One is killed at a random moment: early, in a step, while saving."""
    steps = 4 * (kills + 1)
    one = six(steps=steps, output="one")
    train(one)
    run = six(steps=steps, ranks=2, dp_shard=2)
    job = launch(run, processes=2, restarts=kills)
    moments = random.Random(0)
    for kill in range(kills):
        wait_for_step(run, 4 * kill + 1, job)
        time.sleep(moments.uniform(0, 0.5))
        kill_a_worker(job, moments)
    job.wait(timeout=TIMEOUT)
    assert job.returncode == 0, job.said()
    assert losses(run) == pytest.approx(losses(one), rel=CLOSE)


def wait_for_step(run: TrainSettings, step: int, job: Job) -> None:
    """Return once the run has logged so many steps, or has ended."""
    deadline = time.monotonic() + TIMEOUT
    log = run.output / METRICS
    while job.poll() is None and not (log.exists() and log.read_text().count("\n") >= step):
        assert time.monotonic() < deadline, f"step {step} was never reached"
        time.sleep(0.1)


def kill_a_worker(job: Job, chance: random.Random) -> None:
    while True:
        assert job.poll() is None, f"no rank could be killed: {job.said()}"
        workers = []
        for child in psutil.Process(job.pid).children():
            with suppress(psutil.NoSuchProcess):
                if "train" in child.cmdline():
                    workers.append(child)
        if workers:
            chance.choice(workers).kill()
            return


def wait_for_steps(run: TrainSettings, job: list[Running]) -> None:
    log = run.output / METRICS
    job[0].wait_until(lambda: log.exists() and log.read_text().count("\n") >= 2)


def test_rank_that_hangs_ends_the_others_with_rank_and_step(six: MakeRun, begin: Begin) -> None:
    run = six(steps=1000, ranks=2, dp_shard=2, timeout_s=10)
    first, second = begin(run, ranks=2)
    wait_for_steps(run, [first, second])
    second.send(signal.SIGSTOP)
    assert first.wait() > 0
    assert re.search(r"rank 0 of 2, step \d+: .*[Tt]imed out", first.said()), first.said()


def test_worker_that_is_killed_ends_all_ranks_with_the_last_step_saved(six: MakeRun, begin: Begin) -> None:
    run = six(steps=1000, ranks=2, sections={"checkpoint": {"every": 1000}, "data": {"workers": 1}})
    job = begin(run, ranks=2)
    wait_for_steps(run, job)
    psutil.Process(job[1].pid).children()[0].kill()
    assert [process.wait() for process in job] == [2, 2]
    last = checkpoint.steps(run.output)[-1]
    assert len(losses(run)) == last
    for text in (process.said() for process in job):
        assert re.search(rf"error: step {last + 1}: rank 1 of 2: a worker .* died \(SIGKILL\)", text), text


def test_rank_that_is_killed_ends_the_others_in_spite_of_their_workers(six: MakeRun, begin: Begin) -> None:
    run = six(steps=1000, ranks=2, sections={"data": {"workers": 1}})
    first, second = job = begin(run, ranks=2)
    wait_for_steps(run, job)
    second.kill()
    assert first.wait() == 2
    said = first.said()
    assert re.search(r"error: rank 0 of 2, step \d+: another process has died or hangs", said), said
    assert "Traceback" not in said


def test_cache_of_two_processes_has_the_files_of_one(
    tiny_run: MakeRun, start_ranks: Callable[..., list[Running]], tmp_path: Path
) -> None:
    run = tiny_run()
    write_cache(run, tmp_path / "one")
    (tmp_path / "run.json").write_text(run.model_dump_json())
    finish(start_ranks("cache", "run.json", "--out", "two", ranks=2))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_processes_that_see_different_clips_are_told(ranks: Ranks, six: MakeRun) -> None:
    assert ranks(clips_seen, six(), 0, ranks=2) == ["", ""]
    first, second = ranks(clips_seen, six(), 1, ranks=2)
    assert first == second
    assert re.match(r"the processes see different clips \(rank 0: 8, rank 1: 7, or other captions", first)


def clips_seen(run: TrainSettings, missing: int) -> str:
    """What is said if the second rank lacks so many of the clips."""
    job = JobRanks(Mesh.build(run.parallel.filled(2), device_type="cpu"))
    assert run.data.manifest is not None
    samples = select_clips(run.data, run.data.manifest, root=None, seed=0)
    try:
        clips_of_all(samples[missing * job.rank :], job)
    except ValueError as error:
        return str(error)
    return ""


class OddError(Exception):
    """Cannot be sent: it is not made of its text."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


ERRORS: dict[str, Callable[[], Exception]] = {
    "ValueError: wrong": lambda: ValueError("wrong"),
    "MemoryError: full": lambda: MemoryError("full"),
    "KeyError: 'name'": lambda: KeyError("name"),
    "OddError: code 3": lambda: OddError(code=3),
}


@pytest.mark.parametrize("said", ERRORS)
def test_what_the_first_process_raises_is_raised_in_all(ranks: Ranks, said: str) -> None:
    others = f"RuntimeError: {said}" if said.startswith("Odd") else said
    assert ranks(raised_together, said, ranks=2) == [said, others]


def raised_together(said: str) -> str:
    def decide() -> None:
        raise ERRORS[said]()

    job = JobRanks(Mesh.build(MeshSettings(), device_type="cpu"))
    try:
        job.agree(decide)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_other_global_batch_is_refused_with_what_would_fit(six: MakeRun, begin: Begin) -> None:
    train(six(steps=2))
    for process in begin(six(steps=4, ranks=3), ranks=2):
        assert process.wait() == 2
        assert "set data.batch_size x optimizer.accumulate to 3" in process.said()


def test_ray_writes_the_files_of_one_process_and_a_killed_worker_loses_none(
    tiny_run: MakeRun, tmp_path: Path
) -> None:
    run = tiny_run()
    sizes = {"videos_per_shard": 1, "texts_per_shard": 8}
    write_cache(run, tmp_path / "one", **sizes)
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_ray_worker, args=(tmp_path / "ray", killed), daemon=True)
    killer.start()
    write_cache_by_ray(run, tmp_path / "ray", **sizes)
    killer.join()
    assert killed, "no worker was killed between two shards"
    assert files_of(tmp_path / "one") == files_of(tmp_path / "ray")
    again = write_cache_by_ray(run, tmp_path / "ray", **sizes)
    assert (again.written, again.missing) == (0, 0)


def kill_a_ray_worker(folder: Path, killed: list[int]) -> None:
    """Once the first clips are written, before the last ones are."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and not killed:
        time.sleep(0.01)
        if len(list(folder.glob("videos-*.safetensors"))) not in range(1, 7):
            continue
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "_Worker" in process.name() + " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)


def files_of(folder: Path) -> dict[str, bytes]:
    """Without what a killed writer has left."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("new", [False, True], ids=["pretrained", "new"])
def test_shards_begin_as_one_process_does(ranks: Ranks, tiny_run: MakeRun, new: bool) -> None:
    changes = {"model": {"pretrained": None, "config": FOUR_HEADS}} if new else {}
    run = tiny_run(parallel={"dp_shard": 2, "tp": 2}, **changes)
    wanted = dict(build(run, device=torch.device("cpu")).named_parameters())
    for weights in ranks(whole_weights, run, ranks=4):
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def whole_weights(run: TrainSettings) -> dict[str, torch.Tensor]:
    mesh = Mesh.build(run.parallel, device_type="cpu")
    model = build(run, device=torch.device("cpu"), mesh=mesh)
    return {name: cast(DTensor, weight).full_tensor().detach() for name, weight in model.named_parameters()}
