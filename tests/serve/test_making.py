"""What a worker does with one job, however its session ends; and its signs of life."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import open_database

from opensoraplan.data.video import read_frames
from opensoraplan.generate.session import Session
from opensoraplan.pipeline import OpenSoraPlanPipeline
from opensoraplan.requests import Request
from opensoraplan.serve.artefacts import Artefacts
from opensoraplan.serve.database import Database
from opensoraplan.serve.jobs import Job
from opensoraplan.serve.making import Maker, SpoiledError
from opensoraplan.serve.roster import Roster, Worker
from opensoraplan.serve.settings import WorkerSettings
from opensoraplan.serve.store import NewJob, Store, new_id
from opensoraplan.serve.worker import Pulse

SMALL: dict[str, Any] = {
    "prompt": "a cat",
    "frames": 9,
    "height": 32,
    "width": 32,
    "steps": 4,
    "guidance": 1.0,
}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with open_database(f"sqlite:///{tmp_path}/jobs.sqlite") as opened:
        yield opened


class Bench:
    """A maker with a session of its own, and its store."""

    def __init__(self, pipeline: OpenSoraPlanPipeline, database: Database, data: Path) -> None:
        self.pipeline, self.session = pipeline, Session(pipeline, "tiny")
        self.store, self.artefacts = Store(database), Artefacts(data)
        self.stopping = threading.Event()
        settings = WorkerSettings(data=data, save_every=1, max_tries=2)
        self.maker = Maker(settings, self.store, self.artefacts, lambda: None, self.stopping)
        self.hooks: list[Callable[[int], None]] = []
        self.steps = 0
        pipeline.transformer.register_forward_pre_hook(self._step)

    def _step(self, *_: object) -> None:
        self.steps += 1
        for hook in self.hooks:
            hook(self.steps)

    def queue(self, **changes: Any) -> str:  # noqa: ANN401
        request = Request(**{**SMALL, **changes}).model_dump(mode="json")
        job_id = new_id()
        self.artefacts.create(job_id, request)
        return self.store.add(NewJob("", "tiny", request), job_id=job_id, most_queued=10).id

    def make(self) -> Job | None:
        """Make the next job. Returns it as it is then; None if it is gone."""
        self.steps = 0
        job = self.store.claim("w", "tiny", lease=60)
        assert job is not None
        try:
            self.maker.make(job, lambda _request: self.session)
        except SpoiledError:
            assert self.store.get(job.id) != job
            raise
        return self.store.get(job.id)

    def files(self, job_id: str) -> list[str]:
        return sorted(path.name for path in self.artefacts.folder(job_id).iterdir())


@pytest.fixture
def bench(pipeline: OpenSoraPlanPipeline, database: Database, tmp_path: Path) -> Bench:
    return Bench(pipeline, database, tmp_path / "data")


def test_a_video_and_its_files(bench: Bench) -> None:
    made = bench.queue()
    job = bench.make()
    assert job is not None
    assert (job.status, job.step, job.progress) == ("completed", 4, 100)
    names = ["log.txt", "request.json", "spritesheet.png", "thumbnail.webp", "video.json", "video.mp4"]
    assert bench.files(made) == names


def test_stopping_saves_the_newest_latents_and_queues_the_job(bench: Bench) -> None:
    made, whole = bench.queue(), bench.queue()
    bench.hooks.append(lambda step: bench.stopping.set() if step == 3 else None)
    job = bench.make()
    assert job is not None
    assert (job.id, job.status, job.step, job.tries) == (made, "queued", 3, 0)
    assert "video.latents.safetensors" in bench.files(made)
    bench.hooks.clear()
    bench.stopping.clear()
    job = bench.make()
    assert job is not None
    assert (job.id, job.status, bench.steps) == (made, "completed", 1)
    bench.make()
    videos = [read_frames(bench.artefacts.video(one, 9)) for one in (made, whole)]
    assert torch.equal(*videos)


def test_a_job_that_is_removed_stops_within_a_step(bench: Bench) -> None:
    made = bench.queue()
    bench.hooks.append(lambda step: bench.store.remove(made, "") if step == 2 else None)
    assert bench.make() is None
    assert bench.steps == 2
    assert not bench.artefacts.folder(made).exists()


def test_full_memory_ends_the_worker_and_after_some_the_job(bench: Bench) -> None:
    made = bench.queue()

    def full(step: int) -> None:
        if step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    bench.hooks.append(full)
    with pytest.raises(SpoiledError, match="9 frames of 32 x 32 do not fit into memory"):
        bench.make()
    job = bench.store.get(made)
    assert job is not None
    assert (job.status, job.step, job.error_code, job.tries) == ("queued", 1, "out_of_memory", 0)
    bench.hooks[:] = [lambda _step: full(2)]
    for status in ("queued", "failed"):
        with pytest.raises(SpoiledError):
            bench.make()
        job = bench.store.get(made)
        assert job is not None
        assert (job.status, job.error_code) == (status, "out_of_memory")
    assert str(job.error_message).endswith("ask for fewer or smaller ones (2 workers in a row, at step 1)")


def test_errors_of_the_worker_are_tried_again(bench: Bench) -> None:
    made = bench.queue()

    def broken(_step: int) -> None:
        raise RuntimeError("a bug")

    bench.hooks.append(broken)
    with pytest.raises(SpoiledError, match="a bug"):
        bench.make()
    assert "RuntimeError: a bug" in (bench.artefacts.folder(made) / "log.txt").read_text()
    bench.hooks.clear()
    job = bench.make()
    assert job is not None
    assert (job.status, job.error_code) == ("completed", None)


def test_latents_that_are_not_finite_fail_at_once(bench: Bench) -> None:
    bench.queue()
    with torch.no_grad():
        bench.pipeline.transformer.proj_out.weight.fill_(float("nan"))
    job = bench.make()
    assert job is not None
    assert (job.status, job.error_code) == ("failed", "not_finite")


def test_requests_that_the_session_refuses_fail_at_once(bench: Bench) -> None:
    bench.queue(step_cache=0.1)
    job = bench.make()
    assert job is not None
    assert (job.status, job.error_code) == ("failed", "invalid_request")
    assert "calibrate" in str(job.error_message)
    bench.queue(lora=["style:0.5"])
    job = bench.make()
    assert job is not None
    assert job.error_message == "this server has no LoRA style:0.5 any longer"


def test_a_finished_video_is_not_made_again(bench: Bench) -> None:
    """As after a worker that was killed before it could tell the store."""
    made = bench.queue()
    finished = bench.make()
    assert finished is not None
    again = bench.store.add(NewJob("", "tiny", finished.request), job_id=new_id(), most_queued=10)
    bench.artefacts.folder(made).rename(bench.artefacts.folder(again.id))
    job = bench.make()
    assert job is not None
    assert (job.id, job.status, bench.steps) == (again.id, "completed", 0)


def test_a_job_that_hangs_gives_no_signs_of_life(database: Database, tmp_path: Path) -> None:
    roster = Roster(database)
    roster.join(Worker("w", "host-0", "cpu", "tiny", 1))
    pulse = Pulse(roster, "w", WorkerSettings(data=tmp_path, lease=0.2, hang=0.4))
    pulse.start()

    def is_silent() -> bool:
        return bool(roster.silent(0.3))

    time.sleep(1)
    assert not is_silent()
    with pulse.working():
        time.sleep(0.2)
        pulse.moved()
        time.sleep(0.3)
        assert not is_silent()
        time.sleep(1)
        assert is_silent()
    time.sleep(0.2)
    assert not is_silent()
