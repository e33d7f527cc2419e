"""A worker in this process: one job after the other, and LoRAs of a folder that come while it runs."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import open_database
from tiny_models import lora_of

from opensoraplan.data.video import read_frames
from opensoraplan.formats.lora import write_lora
from opensoraplan.generate import job
from opensoraplan.generate.session import Session
from opensoraplan.requests import Request
from opensoraplan.serve.artefacts import Artefacts
from opensoraplan.serve.database import Database
from opensoraplan.serve.jobs import Job
from opensoraplan.serve.process import Identity
from opensoraplan.serve.roster import Roster
from opensoraplan.serve.settings import WorkerSettings
from opensoraplan.serve.store import NewJob, Store, new_id
from opensoraplan.serve.worker import WorkLoop, options_of

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"prompt": "a cat", "frames": 9, "height": 32, "width": 32, "steps": 2, "seed": 3}


class Bench:
    def __init__(self, model: Path, database: Database, folder: Path) -> None:
        self.loras = folder / "loras"
        self.loras.mkdir()
        self.settings = WorkerSettings(
            model=model, name="tiny", data=folder, loras=self.loras, largest=(9, 32, 32), dtype="fp32"
        )
        self.store, self.roster = Store(database), Roster(database)
        self.artefacts, self.database = Artefacts(folder), database

    def work_on(self, *requests: dict[str, Any], then: Any = None) -> list[Job]:  # noqa: ANN401 (a call)
        """The jobs of these requests, the last of them sent after `then`, as a worker has made them."""
        stopping, ids = threading.Event(), []

        def send(request: dict[str, Any]) -> None:
            values = Request(**SMALL).model_dump(mode="json") | request
            ids.append(new_id())
            self.artefacts.create(ids[-1], values)
            self.store.add(NewJob("", "tiny", values), job_id=ids[-1], most_queued=10)

        def jobs() -> list[Job]:
            return [found for one in ids if (found := self.store.get(one)) is not None]

        def wait() -> None:
            while any(one.status in ("queued", "in_progress") for one in jobs()) and not stopping.wait(0.02):
                pass

        def feed() -> None:
            try:
                wait()
                if then is not None:
                    send(then())
                    wait()
            finally:
                stopping.set()

        for request in requests:
            send(request)
        feeding = threading.Thread(target=feed)
        feeding.start()
        try:
            WorkLoop(self.settings, Identity("w", "host-0", "cpu"), self.database, stopping).run()
        finally:
            stopping.set()
            feeding.join()
        return jobs()

    def frames(self, made: Job) -> torch.Tensor:
        return read_frames(self.artefacts.video(made.id, 9))


@pytest.fixture
def bench(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with open_database(f"sqlite:///{tmp_path}/jobs.sqlite") as database:
        made = Bench(tiny_model, database, tmp_path)
        monkeypatch.chdir(made.loras)  # as the process of a worker
        yield made


def test_loras_by_name_also_those_that_come_later(bench: Bench, tiny_model: Path, tmp_path: Path) -> None:
    write_lora(lora_of(tiny_model, seed=0), bench.loras / "style.safetensors", kind="diffusers")
    write_lora(lora_of(tiny_model, seed=1), bench.loras / "motion", kind="peft")
    (bench.loras / "broken.safetensors").write_bytes(b"no LoRA")

    def add_late() -> dict[str, Any]:
        (worker,) = bench.roster.workers()
        assert worker.ready
        assert worker.facts["loras"] == ["motion", "style"]
        assert list(worker.facts["broken_loras"]) == ["broken"]
        assert worker.facts["largest"] == [9, 32, 32]
        assert 0 < worker.facts["predicted_bytes"] < worker.facts["total_bytes"]
        write_lora(lora_of(tiny_model, seed=2), bench.loras / "late.safetensors", kind="comfy")
        return {"lora": ["late"]}

    wanted = ([], ["style"], ["style:0.5", "motion:-1"])
    jobs = bench.work_on(*({"lora": names} for names in wanted), {"lora": ["broken"]}, then=add_late)
    assert [one.status for one in jobs] == ["completed"] * 3 + ["failed", "completed"]
    assert jobs[3].error_code == "invalid_request"
    made = [bench.frames(one) for one in (*jobs[:3], jobs[4])]
    assert len({frames.numpy().tobytes() for frames in made}) == 4
    # As the command makes it, and without the paths of this machine.
    asked = Request(**SMALL, lora=("style.safetensors:0.5", "motion:-1"))
    with Session.open(options_of(bench.settings, "cpu"), asked) as session:
        (path,) = job.run(session, [asked], [tmp_path / "own.mp4"], resume=False)
    assert torch.equal(read_frames(path), made[2])
    video = bench.artefacts.video(jobs[2].id, 9)
    assert str(tmp_path).encode() not in video.read_bytes()
    assert json.loads(video.with_suffix(".json").read_text())["lora"] == [
        "style.safetensors:0.5",
        "motion:-1.0",
    ]


def test_a_model_that_does_not_fit(bench: Bench) -> None:
    bench.settings = bench.settings.model_copy(update={"largest": (8001, 16_000, 16_000)})
    with pytest.raises(MemoryError, match=r"generating is predicted to take [\d,.]+ GB of memory, cpu has"):
        bench.work_on({})
