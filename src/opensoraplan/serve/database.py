"""The database of a server: tables, connections, transactions and its clock. SQLite for one machine,
PostgreSQL for several.

Not here: what is done with jobs (store.py) and workers (roster.py).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    ColumnElement,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    func,
    insert,
    literal,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

_METADATA = MetaData()
# Raised when a table changes, so that another version's database is refused.
_SCHEMA = 1
# Any number that no other program takes for its own advisory lock.
_LOCK = 0x6F73705F

JOBS = Table(
    "jobs",
    _METADATA,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("model", String(255), nullable=False),
    Column("request", JSON, nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("started_at", Float(53)),
    Column("completed_at", Float(53)),
    Column("expires_at", Float(53)),
    Column("step", Integer, nullable=False, default=0),
    Column("progress", Integer, nullable=False, default=0),
    Column("step_seconds", Float(53)),
    Column("tries", Integer, nullable=False, default=0),
    Column("worker", String(255)),
    Column("lease_until", Float(53)),
    Column("error_code", String(32)),
    Column("error_message", Text),
    Column("idempotency_key", String(255)),
    Column("body_digest", String(64)),
    UniqueConstraint("owner", "idempotency_key"),
    Index("jobs_in_order", "status", "created_at", "id"),
    Index("jobs_of_owner", "owner", "created_at", "id"),
)
WORKERS = Table(
    "workers",
    _METADATA,
    Column("id", String(255), primary_key=True),
    Column("supervisor", String(255), nullable=False, index=True),
    Column("device", String(64), nullable=False),
    Column("model", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("ready", Integer, nullable=False, default=0),
    Column("beat_at", Float(53), nullable=False),
    Column("facts", JSON, nullable=False),
    Column("error", Text),
)
# Totals since the database was made.
COUNTERS = Table(
    "counters", _METADATA, Column("name", String(64), primary_key=True), Column("value", Float(53))
)


class Database:
    """Connections to the database of `url`, and its tables, which are made if they are not there. Raises
    ValueError for another version's tables and for a URL that is none, and SQLAlchemyError if the database
    cannot be reached.
    """

    def __init__(self, url: str, *, counters: tuple[str, ...] = ()) -> None:
        try:
            self._engine = create_engine(url, pool_pre_ping=True, **_options(url))
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise ValueError(
                f"the store is a database as sqlite:///FILE or postgresql://USER@HOST/NAME ({error})"
            ) from None
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        if self._is_sqlite:
            _set_up_sqlite(self._engine)
            self._reading = self._engine.execution_options(is_reading=True)
        else:
            self._reading = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._create_tables({"schema": _SCHEMA, **dict.fromkeys(counters, 0)})

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction, which is committed at the end of the block."""
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection without a transaction: no statement waits for a writer."""
        with self._reading.connect() as connection:
            yield connection

    def now(self) -> ColumnElement[float]:
        """The time in seconds since 1970, by the one clock that all machines of a store share."""
        if self._is_sqlite:  # on one machine
            return literal(time.time(), Float(53))
        return func.extract("epoch", func.clock_timestamp()).cast(Float(53))

    def close(self) -> None:
        self._engine.dispose()

    def _create_tables(self, counters: dict[str, float]) -> None:
        with self.writing() as connection:
            if not self._is_sqlite:  # several machines may start at once
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            _METADATA.create_all(connection)
            found = {row.name: row.value for row in connection.execute(select(COUNTERS))}
            if missing := [{"name": n, "value": v} for n, v in counters.items() if n not in found]:
                connection.execute(insert(COUNTERS), missing)
        if (schema := found.get("schema", _SCHEMA)) != _SCHEMA:
            raise ValueError(
                f"the store was made by another version of opensoraplan (format {schema:g}, this one has "
                f"{_SCHEMA}): use another --data or --store"
            )


def _options(url: str) -> dict[str, Any]:
    return {} if url.startswith("sqlite") else {"pool_size": 10, "max_overflow": 30, "pool_recycle": 1800}


def _set_up_sqlite(engine: Engine) -> None:
    """Readers do not wait for writers, writers wait for each other, and what is committed is on the disk."""

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _record: object) -> None:  # noqa: ANN401 (a connection of sqlite3)
        connection.isolation_level = None  # Python begins no transactions by itself
        for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if not connection.get_execution_options().get("is_reading"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")
