"""What `osp serve` refuses before it loads anything, and what its workers cannot load."""

import multiprocessing
import os
import re
import signal
import socket
from pathlib import Path

import pytest
from command import Command, mistake
from serving import TIMEOUT, Server

from opensoraplan.serve.supervisor import resolve_devices


def test_mistakes(osp: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OSP_API_KEY", raising=False)
    (tmp_path / "keys.txt").write_text("# none\n\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for line, said in {
            "--host 0.0.0.0": "host 0.0.0.0 can be reached from other machines: set OSP_API_KEY",
            "--host 0.0.0.0 --keys keys.txt": "keys.txt has no keys: write one into each line",
            "--keys nowhere.txt": "nowhere.txt does not exist",
            "--model nowhere": "nowhere does not exist",
            "--loras nowhere": "nowhere does not exist",
            "--name a/b": "name: String should match pattern",
            "--largest 26 96 128": "the largest video: frames must be 8k + 1",
            "--largest 25 96 129": "129",
            "--save-every 0": "save_every: Input should be greater than or equal to 1",
            "--store mysql://me@there/x": "the store is a database as sqlite:///FILE or postgresql://",
            f"--port {port}": f"cannot listen on 127.0.0.1, port {port}: Address already in use",
            "worker --store postgresql://osp@127.0.0.1:1/x": "the store cannot be reached: ",
        }.items():
            assert said in mistake(osp("serve", *line.split())), line
            assert {one.name for one in tmp_path.iterdir()} == {"keys.txt"}, line


def test_help_and_the_two_verbs(osp: Command) -> None:
    assert "--queue INT" in osp("serve", "--help").out
    worker = osp("serve", "worker", "--help")
    assert worker.code == 0
    assert "--devices NAME ..." in worker.out
    assert "--queue" not in worker.out
    assert "did you mean '--lease'" in mistake(osp("serve", "--leas", "3"))


def test_a_video_that_fits_no_worker_ends_the_server(tmp_path: Path) -> None:
    """And the folder is for its user only."""
    server = Server(tmp_path, "--port", 0, "--devices", "cpu", "--largest", 8001, 16_000, 16_000)
    try:
        assert server.process.wait(TIMEOUT) == 2
    finally:
        server.kill()
    said = server.said()
    assert re.search(r"osp: error: generating is predicted to take [\d,.]+ GB of memory, cpu has", said)
    assert (tmp_path / "osp-data").stat().st_mode & 0o777 == 0o700


def test_devices() -> None:
    """Of a process of its own, since the supervisor does not load torch."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    resolve_devices(["cpu", "cpu"], sender)
    assert receiver.recv() == ["cpu", "cpu"]
    resolve_devices(["cpu", "nothing:1"], sender)
    assert "device 'nothing:1' is not one of cpu, cuda, npu" in receiver.recv()
    resolve_devices([], sender)
    assert receiver.recv()


def test_a_terminal_stops_the_server_once(tmp_path: Path) -> None:
    """Ctrl-C goes to all its processes: the supervisor stops them, in order."""
    server = Server(tmp_path, "--port", 0, "--devices", "none", new_session=True)
    try:
        assert server.address.startswith("http://127.0.0.1:")
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.process.wait(TIMEOUT) == 0
    finally:
        server.kill()
