"""The store: jobs in a database, from being queued to being removed. Each state follows from the one before
in one transaction, so that no job is lost or made twice, whichever process dies.

A worker holds a job by a lease, which it renews. If it has lost the lease of a job, whatever it says of the
job is ignored.
"""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from opensoraplan.serve.database import COUNTERS, JOBS, Database
from opensoraplan.serve.jobs import Failure, Job

# Counters of finished jobs, of what the workers did, and of jobs that took at most so many seconds from being
# sent to being finished.
OUTCOMES = ("completed", "failed", "cancelled")
BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 14_400)
NAMES = (*OUTCOMES, "retried", "steps", "seconds", *(f"within_{bound}" for bound in BUCKETS))


class QueueFullError(Exception):
    """As many jobs wait as may."""


class OtherRequestError(Exception):
    """An idempotency key was used before, with another request."""


@dataclass(frozen=True)
class NewJob:
    """What a job begins with, see `Job`."""

    owner: str
    model: str
    request: Mapping[str, Any]
    idempotency_key: str | None = None
    body_digest: str | None = None


def new_id() -> str:
    return f"video_{secrets.token_hex(16)}"


class Store:
    """The jobs of a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- What clients ask for -------------------------------------------------------------------------------

    def add(self, new: NewJob, *, job_id: str, most_queued: int) -> Job:
        """Queue a job. With an idempotency key that was used before, return the job of that time instead.
        Raises QueueFullError and OtherRequestError.
        """
        try:
            return self._add(new, job_id, most_queued)
        except IntegrityError:  # the same key at the same time
            return self._add(new, job_id, most_queued)

    def _add(self, new: NewJob, job_id: str, most_queued: int) -> Job:
        with self._database.writing() as connection:
            if new.idempotency_key is not None:
                mine = and_(JOBS.c.owner == new.owner, JOBS.c.idempotency_key == new.idempotency_key)
                if (found := connection.execute(select(JOBS).where(mine)).first()) is not None:
                    if found.body_digest != new.body_digest:
                        raise OtherRequestError
                    return Job(**found._mapping)
            waiting = select(func.count()).where(JOBS.c.status == "queued")
            if connection.execute(waiting).scalar_one() >= most_queued:
                raise QueueFullError
            values = {**vars(new), "id": job_id, "status": "queued", "created_at": self._database.now()}
            row = connection.execute(insert(JOBS).values(values).returning(JOBS)).one()
            return Job(**row._mapping)

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """The job of that id, if there is one and it is the owner's."""
        own = [] if owner is None else [JOBS.c.owner == owner]
        with self._database.reading() as connection:
            row = connection.execute(select(JOBS).where(JOBS.c.id == job_id, *own)).first()
        return None if row is None else Job(**row._mapping)

    def page(
        self, owner: str, *, after: Job | None, limit: int, order: Literal["asc", "desc"]
    ) -> tuple[list[Job], bool]:
        """The owner's jobs by age, at most `limit` of those behind `after`, and whether there are more."""
        time_and_id = (JOBS.c.created_at, JOBS.c.id)
        query = select(JOBS).where(JOBS.c.owner == owner).limit(limit + 1)
        query = query.order_by(*(c.desc() if order == "desc" else c.asc() for c in time_and_id))
        if after is not None:
            first, second = JOBS.c.created_at, JOBS.c.id
            same = first == after.created_at
            if order == "desc":
                query = query.where(or_(first < after.created_at, and_(same, second < after.id)))
            else:
                query = query.where(or_(first > after.created_at, and_(same, second > after.id)))
        with self._database.reading() as connection:
            found = [Job(**row._mapping) for row in connection.execute(query)]
        return found[:limit], len(found) > limit

    def places(self, jobs: Iterable[Job]) -> dict[str, int]:
        """How many jobs are before each of those that wait, by id."""
        waiting = [job.id for job in jobs if job.status == "queued"]
        if not waiting:
            return {}
        order = {"partition_by": JOBS.c.model, "order_by": (JOBS.c.created_at, JOBS.c.id)}
        number = func.row_number().over(**order).label("number")
        queue = select(JOBS.c.id, number).where(JOBS.c.status == "queued").subquery()
        query = select(queue.c.id, queue.c.number).where(queue.c.id.in_(waiting))
        with self._database.reading() as connection:
            return {row.id: row.number - 1 for row in connection.execute(query)}

    def remove(self, job_id: str, owner: str) -> Job | None:
        """Remove a job. A worker that has it notices after its step."""
        mine = and_(JOBS.c.id == job_id, JOBS.c.owner == owner)
        with self._database.writing() as connection:
            row = connection.execute(delete(JOBS).where(mine).returning(JOBS)).first()
            if row is not None and row.status in ("queued", "in_progress"):
                self._count(connection, "cancelled")
        return None if row is None else Job(**row._mapping)

    # --- What workers do ------------------------------------------------------------------------------------

    def claim(self, worker: str, model: str, *, lease: float) -> Job | None:
        """The oldest queued job of this model, which then belongs to this worker; None if there is none."""
        oldest = (
            select(JOBS.c.id)
            .where(JOBS.c.status == "queued", JOBS.c.model == model)
            .order_by(JOBS.c.created_at, JOBS.c.id)
            .limit(1)
        )
        now = self._database.now()
        values = {
            "status": "in_progress",
            "worker": worker,
            "lease_until": now + lease,
            "tries": JOBS.c.tries + 1,
            "started_at": func.coalesce(JOBS.c.started_at, now),
        }
        with self._database.reading() as connection:  # most often there is none, and nothing to lock for
            if connection.execute(oldest).first() is None:
                return None
        free = oldest.with_for_update(skip_locked=True).scalar_subquery()  # by no other worker
        with self._database.writing() as connection:
            statement = update(JOBS).where(JOBS.c.id == free).values(values)
            row = connection.execute(statement.returning(JOBS)).first()
        return None if row is None else Job(**row._mapping)

    def report(self, job: Job, *, lease: float, saved: bool = False, **values: Any) -> bool:  # noqa: ANN401
        """Store what a worker says of its job, and renew its lease. `saved`: it has saved latents of a
        further step. False if the job is not this worker's any longer, because it was removed or the lease
        has lapsed.
        """
        values["lease_until"] = self._database.now() + lease
        if saved:
            values["tries"] = 0
        with self._database.writing() as connection:
            held = connection.execute(update(JOBS).where(_is_held(job)).values(values)).rowcount == 1
            if held and "step" in values:
                self._count(connection, "steps")
        return held

    def complete(self, job: Job, *, keep: float) -> bool:
        """The video of a job is made. `keep`: seconds until it expires; 0 for never. False as in `report`."""
        now = self._database.now()
        values = _finished(now, keep) | {"status": "completed", "progress": 100, "error_code": None}
        with self._database.writing() as connection:
            statement = update(JOBS).where(_is_held(job)).values(values | {"error_message": None})
            row = connection.execute(statement.returning(JOBS)).first()
            if row is None:
                return False
            seconds = row.completed_at - row.created_at
            self._count(connection, "completed")
            self._count(connection, "seconds", seconds)
            for bound in BUCKETS:
                if seconds <= bound:
                    self._count(connection, f"within_{bound}")
        return True

    def fail(self, job: Job, why: Failure, *, keep: float) -> bool:
        """A job cannot be made. `keep` and the result as in `complete`."""
        with self._database.writing() as connection:
            return self._fail(connection, _is_held(job), why, keep)

    def give_back(self, job: Job, why: Failure | None, *, max_tries: int, keep: float) -> None:
        """Queue a worker's job again, or let it fail after `max_tries`. `why`: None if the worker only stops,
        which is no try.
        """
        with self._database.writing() as connection:
            self._put_back(connection, _is_held(job), why, max_tries, keep)

    # --- What supervisors do --------------------------------------------------------------------------------

    def release(self, workers: Sequence[str], why: Failure | None, *, max_tries: int, keep: float) -> int:
        """`give_back` all jobs of workers that are gone. Returns how many there were."""
        held = and_(JOBS.c.status == "in_progress", JOBS.c.worker.in_(workers))
        with self._database.writing() as connection:
            return self._put_back(connection, held, why, max_tries, keep)

    def release_lapsed(self, why: Failure, *, max_tries: int, keep: float) -> int:
        """`give_back` all jobs whose lease has lapsed. Returns how many there were."""
        lapsed = and_(JOBS.c.status == "in_progress", JOBS.c.lease_until < self._database.now())
        with self._database.reading() as connection:
            if connection.execute(select(JOBS.c.id).where(lapsed).limit(1)).first() is None:
                return 0
        with self._database.writing() as connection:
            return self._put_back(connection, lapsed, why, max_tries, keep)

    def remove_expired(self) -> list[str]:
        """Remove finished jobs that have expired. Returns their ids."""
        expired = JOBS.c.expires_at < self._database.now()
        with self._database.reading() as connection:
            if connection.execute(select(JOBS.c.id).where(expired).limit(1)).first() is None:
                return []
        with self._database.writing() as connection:
            return list(connection.execute(delete(JOBS).where(expired).returning(JOBS.c.id)).scalars())

    def known(self, ids: Sequence[str]) -> set[str]:
        """Those of these ids that are of jobs."""
        with self._database.reading() as connection:
            return set(connection.execute(select(JOBS.c.id).where(JOBS.c.id.in_(ids))).scalars())

    def counts(self) -> dict[str, int]:
        """How many jobs have which status."""
        query = select(JOBS.c.status, func.count()).group_by(JOBS.c.status)
        with self._database.reading() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def totals(self) -> dict[str, float]:
        """The counters of `NAMES`."""
        with self._database.reading() as connection:
            rows = connection.execute(select(COUNTERS).where(COUNTERS.c.name.in_(NAMES)))
            return {row.name: row.value for row in rows}

    # --- Within a transaction -------------------------------------------------------------------------------

    def _put_back(
        self,
        connection: Connection,
        which: ColumnElement[bool],
        why: Failure | None,
        max_tries: int,
        keep: float,
    ) -> int:
        found = connection.execute(select(JOBS).where(which).with_for_update()).all()
        for row in found:
            this = JOBS.c.id == row.id
            if why is not None and row.tries >= max_tries:
                tried = f"{row.tries} workers in a row, at step {row.step}"
                self._fail(connection, this, Failure(why.code, f"{why.message} ({tried})"), keep)
                continue
            values = {"status": "queued", "worker": None, "lease_until": None}
            if why is None:
                values["tries"] = max(row.tries - 1, 0)
            else:
                values |= {"error_code": why.code, "error_message": why.message}
                self._count(connection, "retried")
            connection.execute(update(JOBS).where(this).values(values))
        return len(found)

    def _fail(self, connection: Connection, which: ColumnElement[bool], why: Failure, keep: float) -> bool:
        values = _finished(self._database.now(), keep) | {"status": "failed"}
        values |= {"error_code": why.code, "error_message": why.message}
        if not connection.execute(update(JOBS).where(which).values(values)).rowcount:
            return False
        self._count(connection, "failed")
        return True

    def _count(self, connection: Connection, name: str, amount: float = 1) -> None:
        statement = update(COUNTERS).where(COUNTERS.c.name == name)
        connection.execute(statement.values(value=COUNTERS.c.value + amount))


def _is_held(job: Job) -> ColumnElement[bool]:
    """Whether the worker that claimed a job has it still."""
    return and_(JOBS.c.id == job.id, JOBS.c.status == "in_progress", JOBS.c.worker == job.worker)


def _finished(now: ColumnElement[float], keep: float) -> dict[str, Any]:
    expires = {"expires_at": now + keep} if keep else {}
    return {"completed_at": now, "worker": None, "lease_until": None, **expires}
