"""Makes the video of one job with a session: files in the job's folder, state in the store. The steps of a
worker that died before are not done again.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from opensoraplan.generate import job as files
from opensoraplan.requests import Request
from opensoraplan.serve.artefacts import Artefacts
from opensoraplan.serve.jobs import Failure, Job, percent_of_frames, percent_of_steps
from opensoraplan.serve.loras import find_loras, to_files
from opensoraplan.serve.settings import WorkerSettings
from opensoraplan.serve.store import Store

if TYPE_CHECKING:
    from opensoraplan.generate.session import Session

logger = logging.getLogger(__name__)

# How often a finished job is told to a database that cannot be reached, and the seconds in between.
_TELLS, _TELL_S = 60, 1.0


class GoneError(KeyboardInterrupt):
    """The job was removed, or another worker has it. A KeyboardInterrupt: job.py stops at it as at Ctrl-C."""


class DrainError(KeyboardInterrupt):
    """The worker is to stop: its job goes back into the queue."""


class SpoiledError(Exception):
    """A job failed in a way that may have spoiled this process, which must be replaced."""


@dataclass(frozen=True)
class Maker:
    """Makes videos of jobs. `moved` is called whenever a job moves on; `stopping` is set when the worker is
    to stop. The current folder is that of the LoRAs.
    """

    settings: WorkerSettings
    store: Store
    artefacts: Artefacts
    moved: Callable[[], None]
    stopping: threading.Event

    def make(self, job: Job, session_for: Callable[[Request], "Session"]) -> None:
        """Make the video of a claimed job, and finish the job in the store. `session_for` gives the session
        for a request. Raises SpoiledError, after the job went back to the queue, if this process must end.
        """
        with _log_to(self.artefacts.folder(job.id) / "log.txt"):
            try:
                self._make(job, session_for)
            except DrainError:
                logger.info("%s goes back to the queue", job.id)
                self._tell(lambda: self._give_back(job, None))
            except GoneError:
                self._clear_up(job)
            except FloatingPointError as error:
                self._fail(job, Failure("not_finite", str(error)))
            except Exception as error:
                if self.store.get(job.id) is None:  # its folder went away under this
                    self._clear_up(job)
                    return
                logger.exception("%s failed", job.id)
                why = _explain(error)
                self._tell(lambda: self._give_back(job, why))
                raise SpoiledError(str(error)) from error

    def _make(self, job: Job, session_for: Callable[[Request], "Session"]) -> None:
        self.moved()
        try:
            request = self.request_of(job)
            session = session_for(request)
            session.check(request)
            files.warn_of_tasks(self.settings.folder, [request])
        except (ValueError, FileNotFoundError) as error:
            self._fail(job, Failure("invalid_request", str(error)))
            return
        self.moved()
        wanted = self.artefacts.video(job.id, request.frames)
        progress = _Progress(self, job, request)
        watch = files.Progress(self.settings.save_every, progress.on_step, progress.on_frames)
        (path,) = files.run(session, [request], [wanted], resume=True, progress=watch)
        path.replace(wanted)  # the same, but after a try with other weights
        self.artefacts.draw_pictures(job.id, request.frames)
        done = self._tell(lambda: self.store.complete(job, keep=self.settings.keep_seconds))
        if not done:
            raise GoneError

    def request_of(self, job: Job) -> Request:
        """The request of a job, with files in place of names. Raises ValueError for files that went away."""
        values = dict(job.request)
        if values.get("image") is not None:
            picture = self.artefacts.picture(job.id)
            if not picture.is_file():
                raise ValueError("the picture that the video begins with was removed")
            values["image"] = str(picture)
        known = find_loras(self.settings.loras)
        wanted = values.get("lora", ())
        if absent := [text for text in wanted if text.rpartition(":")[0] not in known and text not in known]:
            raise ValueError(f"this server has no LoRA {', '.join(absent)} any longer")
        return Request.read({**values, "lora": to_files(wanted, known)}, where="the request")

    def _clear_up(self, job: Job) -> None:
        """The job is not this worker's any longer: remove its files, if it was removed."""
        if self.store.get(job.id) is None:
            logger.info("%s was cancelled", job.id)
            self.artefacts.remove(job.id)
        else:
            logger.info("another worker has %s", job.id)

    def _fail(self, job: Job, why: Failure) -> None:
        self._tell(lambda: self.store.fail(job, why, keep=self.settings.keep_seconds))

    def _give_back(self, job: Job, why: Failure | None) -> bool:
        settings = self.settings
        self.store.give_back(job, why, max_tries=settings.max_tries, keep=settings.keep_seconds)
        return True

    def _tell(self, tell: Callable[[], bool]) -> bool:
        """Tell the store how a job ended, and wait for it if it cannot be reached."""
        for _ in range(_TELLS - 1):
            try:
                return tell()
            except SQLAlchemyError as error:
                logger.warning("the store cannot be reached, trying again: %s", error)
                self.moved()
                time.sleep(_TELL_S)
        return tell()


class _Progress:
    """Tells the store how far a job is, and stops it if it is gone or the worker is to stop."""

    def __init__(self, maker: Maker, job: Job, request: Request) -> None:
        self._maker, self._job, self._request = maker, job, request
        self._before: float | None = None

    def on_step(self, step: int) -> None:
        now = time.monotonic()
        measured = {} if self._before is None else {"step_seconds": now - self._before}
        self._before = now
        steps, every = self._request.steps, self._maker.settings.save_every
        self._report(
            saved=step % every == 0 or step == steps,
            step=step,
            progress=percent_of_steps(step, steps),
            **measured,
        )

    def on_frames(self, frames: int) -> None:
        self._report(progress=percent_of_frames(frames, self._request.frames))

    def _report(self, **values: Any) -> None:  # noqa: ANN401 (as Store.report)
        maker = self._maker
        maker.moved()
        try:
            if not maker.store.report(self._job, lease=maker.settings.lease, **values):
                raise GoneError
        except SQLAlchemyError as error:  # the lease lasts for a while
            logger.warning("the store cannot be reached: %s", error)
        if maker.stopping.is_set():
            raise DrainError


def _explain(error: Exception) -> Failure:
    if isinstance(error, MemoryError):
        return Failure("out_of_memory", str(error))
    return Failure("internal_error", f"{type(error).__name__}: {error}")


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """In the block, what this package logs also goes to a file, if its folder is there still."""
    if not path.parent.is_dir():
        yield
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("opensoraplan")
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()
