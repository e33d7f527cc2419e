"""The store in SQLite; tests/postgresql has the other one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import add, open_database
from store_contract import StoreContract

from opensoraplan.serve.database import COUNTERS, Database
from opensoraplan.serve.store import Store


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with open_database(f"sqlite:///{tmp_path}/jobs.sqlite") as opened:
        yield opened


class TestSQLite(StoreContract):
    pass


def test_jobs_are_there_when_it_is_opened_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    with open_database(url) as database:
        made = add(Store(database))
    with open_database(url) as database:
        assert Store(database).get(made.id) == made


def test_the_store_of_another_version_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    with open_database(url) as database, database.writing() as connection:
        connection.execute(COUNTERS.update().where(COUNTERS.c.name == "schema").values(value=99))
    with pytest.raises(ValueError, match=r"another version of opensoraplan \(format 99, this one has 1\)"):
        Database(url)


@pytest.mark.parametrize("url", ["jobs.sqlite", "nosuch://there", "mysql://me@there/db", ""])
def test_what_is_no_database_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"the store is a database as sqlite:///FILE or postgresql://"):
        Database(url)
