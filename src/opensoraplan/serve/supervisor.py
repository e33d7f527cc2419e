"""The supervisor: starts a worker process for each device, replaces those that die or hang, and puts their
jobs back into the queue. It also removes expired jobs.
"""

import logging
import multiprocessing
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any, Self

from sqlalchemy.exc import SQLAlchemyError

from opensoraplan.claims import claim
from opensoraplan.serve.artefacts import Artefacts
from opensoraplan.serve.database import Database
from opensoraplan.serve.jobs import Failure
from opensoraplan.serve.process import Identity, run_worker
from opensoraplan.serve.roster import Roster
from opensoraplan.serve.settings import WorkerSettings
from opensoraplan.serve.store import Store

logger = logging.getLogger(__name__)

# Seconds before a worker that died before it was ready is started again: doubled each time, up to the last.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
# Seconds between looks into a store that cannot be reached.
_RETRY_S = 1.0
# Seconds between searches for folders without a job, of which there may be many to look through.
_CLEAN_S = 3600.0
# Leases after which workers of other supervisors are forgotten.
_FORGET_LEASES = 20
_NO_WORKERS = ("none",)


@contextmanager
def named_supervisor(data: Path) -> Iterator[str]:
    """A name that no other supervisor has while the block runs: the first of HOST-0, HOST-1, ... that is
    free, so that a restarted one has the name that it had before.
    """
    host = socket.gethostname()
    for number in count():
        name = f"{host}-{number}"
        own = claim(data / f"supervisor-{name}")
        if own is not None:
            with own:
                yield name
            return


@dataclass
class _Slot:
    """A device and the worker process on it. `killed`: why the supervisor has killed it. `was_ready`: whether
    any worker on the device was. `early_deaths`: how many in a row died before they were ready.
    """

    device: str
    process: BaseProcess | None = None
    worker: str = ""
    killed: str = ""
    was_ready: bool = False
    early_deaths: int = 0
    start_at: float = 0.0


class Supervisor:
    """Keeps workers running: call `watch` again and again. A context manager, which kills what is left."""

    def __init__(self, settings: WorkerSettings, database: Database, name: str) -> None:
        self._settings, self._name = settings, name
        self._store, self._roster = Store(database), Roster(database)
        self._artefacts = Artefacts(settings.data)
        self._context = _context()
        self._slots: list[_Slot] = []
        self._look_at = self._clean_at = 0.0

    def start(self) -> None:
        """Put the jobs of this supervisor's former workers back into the queue, and start workers. Raises
        ValueError for devices that are not there.
        """
        former = [worker.id for worker in self._roster.workers(self._name)]
        if back := self._release(former, None):
            logger.info("%d jobs that were running go on", back)
        self._slots = [_Slot(device) for device in self._devices()]
        for slot in self._slots:
            self._start(slot)

    def watch(self) -> None:
        """Replace workers that have died or hang, and look after the jobs. Raises ValueError if the model
        cannot be loaded.
        """
        try:
            self._watch()
        except SQLAlchemyError as error:
            logger.warning("the store cannot be reached: %s", error)
            time.sleep(_RETRY_S)

    def _watch(self) -> None:
        for slot in self._slots:
            process = slot.process
            if process is None:
                if time.monotonic() >= slot.start_at:
                    self._start(slot)
            elif not process.is_alive():
                self._bury(slot, process)
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + self._settings.lease / 4
            self._look()

    def drain(self) -> None:
        """Let workers save their latents, put their jobs back into the queue, and end."""
        running = [slot for slot in self._slots if slot.process is not None]
        for slot in running:
            assert slot.process is not None
            slot.process.terminate()
        end = time.monotonic() + self._settings.drain
        for slot in running:
            assert slot.process is not None
            slot.process.join(max(end - time.monotonic(), 0))
            if slot.process.is_alive():
                logger.warning("the worker on %s did not stop in time: killed", slot.device)
                slot.process.kill()
                slot.process.join()
        self._release([slot.worker for slot in running], None)
        self._slots = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slot in self._slots:
            if slot.process is not None:
                slot.process.kill()
                slot.process.join()

    def _devices(self) -> list[str]:
        wanted = self._settings.devices
        if wanted == _NO_WORKERS:
            return []
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=resolve_devices, args=(list(wanted), sender))
        process.start()
        sender.close()
        try:
            found = receiver.recv()
        except EOFError:
            raise RuntimeError("the process that looks for devices died") from None
        process.join()
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _start(self, slot: _Slot) -> None:
        slot.worker, slot.killed = f"{self._name}/{slot.device}/{token_hex(4)}", ""
        identity = Identity(slot.worker, self._name, slot.device)
        process = self._context.Process(target=run_worker, args=(self._settings, identity))
        process.start()
        slot.process = process

    def _bury(self, slot: _Slot, process: BaseProcess) -> None:
        """A worker has ended by itself, or was killed."""
        told = next((one for one in self._roster.workers(self._name) if one.id == slot.worker), None)
        if told is not None and told.error is not None and not slot.was_ready:
            raise ValueError(told.error)
        is_ready = told is not None and told.ready
        slot.was_ready = slot.was_ready or is_ready
        slot.early_deaths = 0 if is_ready else slot.early_deaths + 1
        how = slot.killed or _describe(process.exitcode)
        logger.warning("the worker on %s %s: starting another one", slot.device, how)
        self._release([slot.worker], Failure("worker_died", f"the worker {how}"))
        slot.process = None
        wait = _FIRST_WAIT_S * 2 ** (slot.early_deaths - 1) if slot.early_deaths else 0.0
        slot.start_at = time.monotonic() + min(wait, _LONGEST_WAIT_S)

    def _release(self, workers: list[str], why: Failure | None) -> int:
        settings = self._settings
        back = self._store.release(workers, why, max_tries=settings.max_tries, keep=settings.keep_seconds)
        self._roster.leave(workers)
        return back

    def _look(self) -> None:
        """Kill workers that hang; look after jobs of workers elsewhere, and after finished ones."""
        settings = self._settings
        silent = self._roster.silent(settings.lease)
        for slot in self._slots:
            if slot.process is not None and slot.worker in silent:
                slot.killed = f"gave no sign of life for {settings.lease:g} s"
                slot.process.kill()
        lapsed = Failure("worker_died", f"the worker gave no sign of life for {settings.lease:g} s")
        self._store.release_lapsed(lapsed, max_tries=settings.max_tries, keep=settings.keep_seconds)
        self._roster.leave(sorted(self._roster.silent(_FORGET_LEASES * settings.lease)))
        for job_id in self._store.remove_expired():
            self._artefacts.remove(job_id)
        if time.monotonic() >= self._clean_at:
            self._clean_at = time.monotonic() + _CLEAN_S
            self._artefacts.remove_orphans(self._store.known)


def _context() -> Any:  # noqa: ANN401 (a context of multiprocessing)
    """How worker processes are started: forked from one that has imported all that takes long, where it can
    be. That process has never used a device, so that each worker begins anew.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["opensoraplan.serve.worker"])
    return context


def resolve_devices(wanted: list[str], sender: Any) -> None:  # noqa: ANN401 (a connection)
    """Send the names of the devices to use, all accelerators if none are `wanted`, or why there are none."""
    import torch

    from opensoraplan.device import resolve_device

    try:
        found = [str(resolve_device(name)) for name in wanted]
        if not found:
            first = resolve_device(None).type
            number = 1 if first == "cpu" else getattr(torch, first).device_count()
            found = ["cpu"] if first == "cpu" else [f"{first}:{index}" for index in range(number)]
        sender.send(found)
    except ValueError as error:
        sender.send(str(error))


def _describe(code: int | None) -> str:
    """How a process ended."""
    if code is None or code >= 0:
        return f"ended with code {code}"
    killed = " (the system does this when memory is full)" if -code == 9 else ""
    return f"was ended by signal {-code}{killed}"
