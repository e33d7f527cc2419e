"""A worker: a process with a session, which makes the videos of one job after the other until it is told to
stop.

supervisor.py starts it and replaces it, making.py makes one video.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from opensoraplan.defaults import STEP_CACHE_FILE, GenerateDefaults
from opensoraplan.device import total_memory
from opensoraplan.formats.lora import load_lora
from opensoraplan.generate.planning import needs_of
from opensoraplan.generate.session import Session, SessionOptions
from opensoraplan.requests import Request
from opensoraplan.runtime.placement import peak_on_host
from opensoraplan.runtime.step_cache import Calibration
from opensoraplan.serve.artefacts import Artefacts
from opensoraplan.serve.database import Database
from opensoraplan.serve.loras import find_loras
from opensoraplan.serve.making import Maker, SpoiledError
from opensoraplan.serve.process import Identity
from opensoraplan.serve.roster import Roster, Worker
from opensoraplan.serve.settings import WorkerSettings
from opensoraplan.serve.store import NAMES, Store

logger = logging.getLogger(__name__)

# Exit codes: the model cannot be loaded, which a new process would not change; the process must be replaced.
UNUSABLE, SPOILED = 2, 3
# Seconds between looks into an empty queue, and into a store that cannot be reached.
_POLL_S, _RETRY_S = 0.2, 2.0


def main(settings: WorkerSettings, identity: Identity) -> None:
    """The process of a worker."""
    logging.basicConfig(level=logging.WARNING, format=f"{identity.device}: %(message)s", stream=sys.stderr)
    logging.getLogger("opensoraplan").setLevel(logging.INFO)
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
        signal.signal(number, signal.SIG_IGN)  # a terminal sends them to all processes; the supervisor drains
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if settings.loras is not None:
        os.chdir(settings.loras)
    database = Database(settings.store_url, counters=NAMES)
    worker = WorkLoop(settings, identity, database, stopping)
    try:
        worker.run()
    except (ValueError, FileNotFoundError, MemoryError) as error:
        Roster(database).tell(identity.id, error=str(error))
        sys.exit(UNUSABLE)
    except SpoiledError:
        sys.exit(SPOILED)


def _end_with_parent() -> None:
    """End this process when the supervisor's ends, however: another one will make its jobs."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(SPOILED)


class WorkLoop:
    """What a worker does: one job after the other, with one session."""

    def __init__(
        self, settings: WorkerSettings, identity: Identity, database: Database, stopping: threading.Event
    ) -> None:
        self._settings, self._identity, self._stopping = settings, identity, stopping
        self._roster, self._store = Roster(database), Store(database)
        self._pulse = Pulse(self._roster, identity.id, settings)
        artefacts = Artefacts(settings.data)
        self._maker = Maker(settings, self._store, artefacts, self._pulse.moved, stopping)
        self._session: Session | None = None

    def run(self) -> None:
        """Open the session, then make videos until `stopping` is set."""
        identity, model = self._identity, self._settings.model_id
        self._roster.join(Worker(identity.id, identity.supervisor, identity.device, model, os.getpid()))
        self._pulse.start()
        self._open_session()
        logger.info("ready")
        while not self._stopping.is_set():
            try:
                job = self._store.claim(identity.id, model, lease=self._settings.lease)
            except SQLAlchemyError as error:
                logger.warning("the store cannot be reached: %s", error)
                self._stopping.wait(_RETRY_S)
                continue
            if job is None:
                self._stopping.wait(_POLL_S)
                continue
            with self._pulse.working():
                self._maker.make(job, self._session_for)

    def _session_for(self, request: Request) -> Session:
        """The session; opened again if the request has a LoRA that is newer than it."""
        if self._session is not None and set(request.lora_strengths()) - set(self._session.loras):
            self._session.close()
            self._session = None  # so that its memory is free
        return self._session or self._open_session()

    def _open_session(self) -> Session:
        settings = self._settings
        usable, broken = {}, {}
        for name, file in find_loras(settings.loras).items():
            try:
                load_lora(file, settings.folder / "transformer")
                usable[name] = str(file)
            except ValueError as error:
                broken[name] = str(error)
                logger.warning("the LoRA %s is not used: %s", name, error)
        largest = settings.largest_request().model_copy(update={"lora": tuple(usable.values())})
        session = Session.open(options_of(settings, self._identity.device), largest)
        session.model = settings.model_id  # videos do not tell the paths of this machine
        session.tells_folders = False
        self._session = session
        facts = {**facts_of(session, largest), "loras": sorted(usable), "broken_loras": broken}
        self._roster.tell(self._identity.id, ready=1, facts=facts)
        return session


def options_of(settings: WorkerSettings, device: str) -> SessionOptions:
    """How a worker's session computes."""
    folder = settings.folder
    same = ("vae_dtype", "memory", "weights", "attention", "compile", "tiling")
    ratios = Calibration.of(folder).ratios if (folder / STEP_CACHE_FILE).is_file() else None
    return SessionOptions(
        model=folder,
        device=device,
        dtype=settings.dtype or GenerateDefaults.of(folder).dtype or "bf16",
        **{name: getattr(settings, name) for name in same},
        progress=False,
        step_ratios=ratios,
    )


def facts_of(session: Session, largest: Request) -> dict[str, Any]:
    """What a worker can do: the device, the largest video, and the memory in bytes that it is predicted to
    take and that there is.
    """
    pipeline, device = session.pipeline, session.pipeline.device
    if session.arrangement is not None:
        peak = session.arrangement.plan.peak
    else:
        grid = largest.grid(pipeline.vae.strides)
        peak = peak_on_host(pipeline.vae, [needs_of(pipeline, largest)], [grid])
    return {
        "device": str(device),
        "largest": [largest.frames, largest.height, largest.width],
        "predicted_bytes": int(peak),
        "total_bytes": int(total_memory(device)),
    }


class Pulse(threading.Thread):
    """Gives signs of life, which renew the lease of the job, as long as the job moves on."""

    def __init__(self, roster: Roster, worker: str, settings: WorkerSettings) -> None:
        super().__init__(daemon=True, name="pulse")
        self._roster, self._worker, self._settings = roster, worker, settings
        self._moved: float | None = None

    def moved(self) -> None:
        """The job has moved on."""
        self._moved = time.monotonic()

    def working(self) -> "Pulse":
        return self

    def __enter__(self) -> None:
        self.moved()

    def __exit__(self, *_: object) -> None:
        self._moved = None

    def run(self) -> None:
        lease, hang = self._settings.lease, self._settings.hang
        while True:
            moved = self._moved
            if moved is None or time.monotonic() - moved < hang:
                with suppress(SQLAlchemyError):  # the lease lasts for a while
                    self._roster.beat(self._worker, lease=lease)
            time.sleep(lease / 4)
