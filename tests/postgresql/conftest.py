"""A PostgreSQL server for the tests of this folder: that of Debian's package, or another one."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import open_database

from opensoraplan.serve.database import Database

_DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def program(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *map(str, _DEBIAN)]))
    assert found is not None, f"these tests need PostgreSQL's {name}: apt-get install postgresql"
    return found


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a server that listens on a socket in a folder of its own. It does not run as root."""
    user: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="osp") as folder:
        if user:
            os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
        run = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder, **user}
        data = f"{folder}/data"
        subprocess.run([program("initdb"), "-D", data, "-U", "osp", "-A", "trust", "--no-sync"], **run)
        settings = f"-k {folder} -c listen_addresses='' -c fsync=off"
        log = f"{folder}/log"
        subprocess.run([program("pg_ctl"), "-D", data, "-o", settings, "-l", log, "-w", "start"], **run)
        try:
            yield f"postgresql+psycopg://osp@/postgres?host={folder}"
        finally:
            subprocess.run([program("pg_ctl"), "-D", data, "-m", "immediate", "stop"], **run)


@pytest.fixture
def url(postgresql: str, tmp_path: Path) -> str:
    """The URL of an empty database."""
    with open_database(postgresql) as server, server.reading() as connection:
        name = f"d{abs(hash(tmp_path))}"
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    return postgresql.replace("/postgres?", f"/{name}?")


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    with open_database(url) as opened:
        yield opened
