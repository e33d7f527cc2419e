"""The store in PostgreSQL does what that in SQLite does."""

import threading

import pytest
from serving import open_database
from store_contract import StoreContract

from opensoraplan.serve.store import Store


class TestPostgreSQL(StoreContract):
    pass


def test_many_servers_make_the_tables_at_once(url: str) -> None:
    made: list[dict[str, int]] = []

    def start() -> None:
        with open_database(url) as database:
            made.append(Store(database).counts())

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [{}] * 6


def test_a_server_that_is_not_there(url: str) -> None:
    from opensoraplan.serve.server import work
    from opensoraplan.serve.settings import WorkerSettings

    settings = WorkerSettings(store=url.replace("?host=", "?host=/nowhere"))
    with pytest.raises(ValueError, match="the store cannot be reached: connection"):
        work(settings)
