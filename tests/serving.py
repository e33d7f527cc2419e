"""Servers for the tests: the app in this process, and the command in processes of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from opensoraplan import builtin
from opensoraplan.data.video import read_frames
from opensoraplan.generate import job
from opensoraplan.generate.session import Session, SessionOptions
from opensoraplan.requests import Request
from opensoraplan.serve.access import Keys
from opensoraplan.serve.app import make_app
from opensoraplan.serve.artefacts import Artefacts
from opensoraplan.serve.database import Database
from opensoraplan.serve.roster import Roster
from opensoraplan.serve.service import Service
from opensoraplan.serve.settings import ServeSettings
from opensoraplan.serve.store import NAMES, NewJob, Store, new_id

PROMPT = "A large red ball moves to the right in front of a grey wall."
# What a server, and a job, takes at most.
TIMEOUT = 300
JSON = {"prompt": PROMPT, "steps": 4, "seed": 1}
# Enough steps that a test can act between two of them.
LONG = 16


def new_job(owner: str = "", **changes: Any) -> NewJob:  # noqa: ANN401
    return NewJob(owner, "builtin", {"prompt": PROMPT}, **changes)


def add(store: Store, new: NewJob | None = None, *, most_queued: int = 100) -> Any:  # noqa: ANN401 (a job)
    return store.add(new or new_job(), job_id=new_id(), most_queued=most_queued)


@contextmanager
def open_database(url: str) -> Iterator[Database]:
    database = Database(url, counters=NAMES)
    try:
        yield database
    finally:
        database.close()


@contextmanager
def app_of(data: Path, *, keys: tuple[str, ...] = (), **changes: Any) -> Iterator[Any]:  # noqa: ANN401 (the app)
    """The app of a server without workers; its `state.service` has the rest."""
    settings = ServeSettings.read({"data": data, **changes}, where="the test's server")
    data.mkdir(parents=True, exist_ok=True)
    with open_database(settings.store_url) as database:
        service = Service(settings, Store(database), Roster(database), Artefacts(data))
        yield make_app(service, Keys([*keys]))


class Server:
    """`osp serve`, or `osp serve worker`, in a process of its own, and its workers."""

    def __init__(
        self,
        folder: Path,
        *words: object,
        environment: Mapping[str, str] | None = None,
        new_session: bool = False,
    ) -> None:
        self.folder = folder
        self._log = folder / f"log-{time.monotonic_ns()}.txt"
        line = [sys.executable, "-m", "opensoraplan", "serve", *map(str, words)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                line, cwd=folder, stderr=log, env=variables, start_new_session=new_session
            )

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until(self, is_so: Callable[[], Any]) -> Any:  # noqa: ANN401 (what it returns)
        """The first true value of `is_so`."""
        end = time.monotonic() + TIMEOUT
        while not (value := is_so()):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.1)
        return value

    @property
    def address(self) -> str:
        """The address of the API, which is there at once."""
        found = self.wait_until(lambda: re.search(r"on (http://\S+)/v1", self.said()))
        return found[1]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end. Returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(TIMEOUT)


class Client(httpx.Client):
    """Of the API of a server."""

    def __init__(self, server: Server) -> None:
        super().__init__(base_url=server.address, timeout=TIMEOUT)
        self._server = server

    def create(self, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 (values of JSON)
        answer = self.post("/v1/videos", json={**JSON, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def video(self, job_id: str) -> dict[str, Any]:
        return self.get(f"/v1/videos/{job_id}").json()

    def wait_for_step(self, job_id: str, step: int) -> dict[str, Any]:
        """The job once it is at this step, at least."""

        def there() -> dict[str, Any] | None:
            found = self.video(job_id)
            assert found["status"] in ("queued", "in_progress"), found
            return found if found["step"] >= step else None

        return self._server.wait_until(there)

    def wait_for_end(self, job_id: str) -> dict[str, Any]:
        """The job once it has ended."""

        def ended() -> dict[str, Any] | None:
            found = self.video(job_id)
            return found if found["status"] in ("completed", "failed") else None

        return self._server.wait_until(ended)

    def wait_until_ready(self) -> None:
        self._server.wait_until(lambda: self.get("/ready").status_code == 200)


@contextmanager
def serving(
    folder: Path, *words: object, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[Server, Client]]:
    """A server on a free port, with a client that waits until it is ready."""
    server = Server(folder, "--port", 0, "--lease", 3, *words, environment=environment)
    try:
        with Client(server) as client:
            yield server, client
    finally:
        server.kill()


def undisturbed(folder: Path, **changes: Any) -> torch.Tensor:  # noqa: ANN401
    """The frames of a video as `osp generate` makes it."""
    values = {"frames": 25, "height": 96, "width": 128, "fps": 12, "guidance": 3, "solver": "adams"}
    request = Request(**{**values, **JSON, **changes})
    options = SessionOptions(builtin.folder(), device="cpu", dtype="fp32", progress=False)
    with Session.open(options, request) as session:
        folder.mkdir(exist_ok=True)
        (path,) = job.run(session, [request], [folder / "undisturbed.mp4"], resume=False)
    return read_frames(path)


def video_of(server: Server, job_id: str) -> torch.Tensor:
    return read_frames(server.folder / "osp-data" / "jobs" / job_id / "video.mp4")
