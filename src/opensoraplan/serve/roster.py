"""The roster: which workers there are, what they can do, and when they last gave a sign of life."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import delete, insert, select, update

from opensoraplan.serve.database import JOBS, WORKERS, Database


@dataclass(frozen=True)
class Worker:
    """A worker process. `supervisor`: the name of what started it. `ready`: its model is loaded. `facts`:
    what it says of itself, see `worker.facts_of`. `error`: why it could not load the model.
    """

    id: str
    supervisor: str
    device: str
    model: str
    pid: int
    ready: bool = False
    beat_at: float = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


class Roster:
    """The workers of a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def join(self, worker: Worker) -> None:
        """A worker has started."""
        values = {**vars(worker), "ready": 0, "beat_at": self._database.now()}
        with self._database.writing() as connection:
            connection.execute(insert(WORKERS).values(values))

    def beat(self, worker: str, *, lease: float) -> None:
        """A worker gives a sign of life, which renews the lease of its job."""
        now = self._database.now()
        held = JOBS.c.status == "in_progress", JOBS.c.worker == worker
        with self._database.writing() as connection:
            connection.execute(update(WORKERS).where(WORKERS.c.id == worker).values(beat_at=now))
            connection.execute(update(JOBS).where(*held).values(lease_until=now + lease))

    def tell(self, worker: str, **values: Any) -> None:  # noqa: ANN401 (columns of a worker)
        """Store what a worker says of itself: `ready`, `facts` or `error`."""
        with self._database.writing() as connection:
            connection.execute(update(WORKERS).where(WORKERS.c.id == worker).values(values))

    def leave(self, workers: Sequence[str]) -> None:
        """Workers have ended."""
        with self._database.writing() as connection:
            connection.execute(delete(WORKERS).where(WORKERS.c.id.in_(workers)))

    def workers(self, supervisor: str | None = None) -> list[Worker]:
        """All workers, or those of a supervisor."""
        query = select(WORKERS).order_by(WORKERS.c.id)
        if supervisor is not None:
            query = query.where(WORKERS.c.supervisor == supervisor)
        with self._database.reading() as connection:
            return [Worker(**{**row._mapping, "ready": bool(row.ready)}) for row in connection.execute(query)]

    def silent(self, seconds: float) -> set[str]:
        """The ids of workers without a sign of life for so long."""
        query = select(WORKERS.c.id).where(WORKERS.c.beat_at < self._database.now() - seconds)
        with self._database.reading() as connection:
            return set(connection.execute(query).scalars())
