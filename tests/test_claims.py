"""Claims between processes: one has it, a dead one has lost it, and forked ones do not keep it."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opensoraplan.claims import claim, clear_dead_claims, hold_claim, lock_of, share_out

# Claims what it is told to, says so, and waits for the end of its input.
CLAIM = """
import os, sys
from pathlib import Path
from opensoraplan.claims import claim
own = claim(Path(sys.argv[1]))
print("free" if own else "taken", flush=True)
if "fork" in sys.argv and os.fork() == 0:
    print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextmanager
def claimant(path: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that claims the path, and what it found."""
    command = [sys.executable, "-c", CLAIM, str(path), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_one_process_has_it_until_it_dies(tmp_path: Path) -> None:
    path = tmp_path / ("clip" * 60 + ".mp4")  # no name of a file is too long
    with claimant(path) as (process, found):
        assert found == "free"
        assert claim(path) is None
        assert claim(tmp_path / "other.mp4") is not None
        with pytest.raises(ValueError, match=rf"another process \({process.pid} on .*\) is making .*: wait"):
            hold_claim(path, doing=f"making {path.name}").__enter__()
        with claimant(path) as (_, other):
            assert other == "taken"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with claim(path) as own:  # type: ignore[union-attr]
            assert own.is_certain
            with claimant(path) as (_, other):
                assert other == "taken"
    assert not lock_of(path).exists()


def test_a_forked_process_does_not_keep_it(tmp_path: Path) -> None:
    """As a data worker, which may outlive a main process that is killed."""
    with claimant(tmp_path / "a", "fork") as (process, found):
        assert found == "free"
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(child, 0)  # it lives
        own = claim(tmp_path / "a")
        assert own is not None
        own.release()
        os.kill(child, signal.SIGKILL)


def test_parts_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    with hold_claim(tmp_path / "a", doing="making it"):
        assert claim(tmp_path / "a") is None
        assert claim(tmp_path / "a") is None  # to have tried it releases nothing
    with hold_claim(tmp_path / "a", doing="making it"):
        pass
    assert os.listdir(tmp_path) == []


def test_never_two_at_once(tmp_path: Path) -> None:
    """Locks whose files are removed are easily had by two: one of the old file, one of the new."""
    inside, worst = 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, worst
        for _ in range(300):
            own = claim(tmp_path / "a")
            if own is not None:
                with guard:
                    inside += 1
                    worst = max(worst, inside)
                with guard:
                    inside -= 1
                own.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == 1


def test_the_dead_are_cleared(tmp_path: Path) -> None:
    with claimant(tmp_path / "alive"):
        with claimant(tmp_path / "dead"):
            pass
        assert lock_of(tmp_path / "dead").exists()
        clear_dead_claims(tmp_path)
        assert os.listdir(tmp_path) == [lock_of(tmp_path / "alive").name]


def test_work_is_shared_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What another process is at comes last; when that dies, it is done here."""
    caplog.set_level(logging.INFO)
    done = []
    with claimant(tmp_path / "b") as (process, _):

        def work(name: str) -> bool:
            own = claim(tmp_path / name)
            if own is None:
                process.kill()
                return False
            with own:
                done.append(name)
                return True

        share_out("abc", work, what="letters")
    assert "".join(done) == "acb"


def test_the_package_is_imported_where_there_is_no_fcntl() -> None:
    """As on Windows; where there is no lock at all, claims are granted."""
    code = """
import pkgutil, sys, tempfile
from importlib import import_module
from pathlib import Path
import psutil, torch  # which know where they are
sys.modules["fcntl"] = sys.modules["resource"] = None
import opensoraplan
names = [m.name for m in pkgutil.walk_packages(opensoraplan.__path__, "opensoraplan.")]
for name in names:
    if not name.endswith("__main__"):
        import_module(name)
from opensoraplan import claims, disk
with tempfile.TemporaryDirectory() as folder:
    first, second = claims.claim(Path(folder) / "a"), claims.claim(Path(folder) / "a")
    assert first and second and not first.is_certain
    disk.write_whole(Path(folder) / "b", lambda file: file.write_text("whole"))
print(len(names))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 80
