"""`osp serve`: the HTTP server in a thread, the supervisor of the workers in the main one; and `osp serve
worker`, which is the supervisor alone.
"""

import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sqlalchemy.exc import SQLAlchemyError

from opensoraplan.serve.artefacts import Artefacts
from opensoraplan.serve.database import Database
from opensoraplan.serve.settings import ServeSettings, WorkerSettings
from opensoraplan.serve.store import NAMES
from opensoraplan.serve.supervisor import Supervisor, named_supervisor

logger = logging.getLogger(__name__)

# Seconds between looks at the workers, and seconds that downloads have to end when the server stops.
_WATCH_S, _DOWNLOADS_S = 0.1, 5


def serve(settings: ServeSettings) -> None:
    """Serve until a signal arrives; then workers save their latents and put their jobs back into the queue.
    Raises ValueError for what cannot be served, before anything is loaded.
    """
    from opensoraplan.serve.access import Keys
    from opensoraplan.serve.app import make_app
    from opensoraplan.serve.roster import Roster
    from opensoraplan.serve.service import Service
    from opensoraplan.serve.store import Store

    keys = Keys.of(settings.keys)
    with _listen(settings) as listening, _opened(settings) as database, _stop_signals() as stop:
        service = Service(settings, Store(database), Roster(database), Artefacts(settings.data))
        with _answering(make_app(service, keys), listening) as is_answering:
            host, port = listening.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            logger.info("serving %s on http://%s:%d/v1", settings.model_id, shown, port)
            with named_supervisor(settings.data) as name, Supervisor(settings, database, name) as supervisor:
                supervisor.start()
                while not stop.wait(_WATCH_S):
                    if not is_answering():
                        raise RuntimeError("the HTTP server has ended")
                    supervisor.watch()
                service.draining.set()
                logger.info("stopping: running jobs are saved and continue after the next start")
                supervisor.drain()


def work(settings: WorkerSettings) -> None:
    """Make videos of the jobs of a store until a signal arrives, as `serve`."""
    with (
        _opened(settings) as database,
        _stop_signals() as stop,
        named_supervisor(settings.data) as name,
        Supervisor(settings, database, name) as supervisor,
    ):
        supervisor.start()
        logger.info("working on jobs of %s", settings.model_id)
        while not stop.wait(_WATCH_S):
            supervisor.watch()
        logger.info("stopping: running jobs are saved, and others make them")
        supervisor.drain()


@contextmanager
def _opened(settings: WorkerSettings) -> Iterator[Database]:
    """The database of the jobs. Raises ValueError if it cannot be reached."""
    settings.data.mkdir(parents=True, exist_ok=True)
    try:
        database = Database(settings.store_url, counters=NAMES)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise ValueError(f"the store cannot be reached: {reason}") from None
    try:
        yield database
    finally:
        database.close()


@contextmanager
def _listen(settings: ServeSettings) -> Iterator[socket.socket]:
    """A socket for the server's address. Raises ValueError if it cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # TCP is named so that asyncio sends small answers at once: it asks accepted sockets for their protocol.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        if sys.platform != "win32":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((settings.host, settings.port))
        except OSError as error:
            where = f"{settings.host}, port {settings.port}"
            raise ValueError(
                f"cannot listen on {where}: {error.strerror or error}; use another --port"
            ) from None
        yield listening


@contextmanager
def _answering(app: object, listening: socket.socket) -> Iterator[Callable[[], bool]]:
    """uvicorn in a thread of its own, where it leaves signals alone. Yields a function: whether it runs."""
    import uvicorn

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_DOWNLOADS_S,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="http")
    thread.start()
    try:
        yield thread.is_alive
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM, SIGINT and SIGHUP set; a second one ends the process as usual."""
    stop = threading.Event()
    before = {}

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    names = ("SIGINT", "SIGTERM", "SIGHUP")
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
        before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
