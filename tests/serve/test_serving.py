"""Servers and workers as processes: videos of OpenAI's client, jobs that survive whatever is killed."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from openai import NotFoundError, OpenAI
from PIL import Image
from serving import LONG, PROMPT, Client, Server, serving, undisturbed, video_of

from opensoraplan.data.video import read_frames


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Client]]:
    folder = tmp_path_factory.mktemp("served")
    with serving(folder, "--devices", "cpu", "--save-every", 2) as (server, client):
        client.wait_until_ready()
        yield server, client


@pytest.fixture
def openai(served: tuple[Server, Client]) -> OpenAI:
    return OpenAI(base_url=f"{served[0].address}/v1", api_key="none is needed")


def in_store(folder: Path, query: str) -> int:
    """The one number that a query of a server's store finds."""
    with contextlib.closing(sqlite3.connect(folder / "osp-data" / "jobs.sqlite")) as database:
        (found,) = database.execute(query).fetchone()
    return found


def worker_pid(server: Server) -> int:
    """The process that has a job, or waits for one."""
    return in_store(server.folder, "SELECT pid FROM workers WHERE ready")


def step_of(folder: Path, job_id: str) -> int:
    return in_store(folder, f"SELECT step FROM jobs WHERE id = '{job_id}'")


def test_the_client_of_openai(openai: OpenAI, served: tuple[Server, Client], tmp_path: Path) -> None:
    server, client = served
    made = openai.videos.create_and_poll(prompt=PROMPT, extra_body={"steps": 4, "seed": 1})
    assert (made.status, made.progress, made.error) == ("completed", 100, None)
    assert made.completed_at is not None
    assert made.completed_at >= made.created_at
    video = tmp_path / "video.mp4"
    openai.videos.download_content(made.id).write_to_file(video)
    assert torch.equal(read_frames(video), undisturbed(tmp_path))
    thumbnail, sheet = tmp_path / "thumbnail.webp", tmp_path / "sheet.png"
    openai.videos.download_content(made.id, variant="thumbnail").write_to_file(thumbnail)
    openai.videos.download_content(made.id, variant="spritesheet").write_to_file(sheet)
    with Image.open(thumbnail) as small, Image.open(sheet) as large:
        assert (small.size, small.format) == ((128, 96), "WEBP")
        assert large.size == (7 * 128 + 6 * 2, 96)
    whole = video.read_bytes()
    part = client.get(f"/v1/videos/{made.id}/content", headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole[10:20])
    beyond = client.get(f"/v1/videos/{made.id}/content", headers={"Range": f"bytes={len(whole)}-"})
    assert beyond.status_code == 416
    assert str(server.folder).encode() not in whole
    assert next(one.id for one in openai.videos.list()) == made.id
    assert openai.videos.retrieve(made.id).id == made.id
    assert [one.id for one in openai.models.list()] == ["builtin"]
    assert openai.videos.delete(made.id).deleted
    with pytest.raises(NotFoundError):
        openai.videos.retrieve(made.id)
    assert not (server.folder / "osp-data" / "jobs" / made.id).exists()


def test_the_lines_of_the_documentation(served: tuple[Server, Client], tmp_path: Path) -> None:
    """curl's and Python's, as they are printed; but for the address."""
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    text = text.replace("http://localhost:8000", served[0].address)
    lines = [block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if "curl" in block]
    script = "set -euo pipefail\nalias curl='curl --fail-with-body'\nshopt -s expand_aliases\n" + "\n".join(
        lines
    )
    said = subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "event: video" in said.stdout
    assert "video.deleted" in said.stdout
    assert len(read_frames(tmp_path / "video.mp4")) == 25
    for name in ("thumbnail.webp", "sheet.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    assert len(read_frames(tmp_path / "ball.mp4")) == 25


def test_a_video_begins_with_the_picture_that_is_sent(
    openai: OpenAI, served: tuple[Server, Client], tmp_path: Path
) -> None:
    """Near enough to tell it from any other; and no path of the server is told."""
    server, client = served
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32], pixels[:, 32:] = (200, 60, 40), (40, 90, 200)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    made = openai.videos.create_and_poll(
        prompt=PROMPT,
        input_reference=tmp_path / "start.png",
        extra_body={"size": "64x48", "frames": 9, "steps": 2, "seed": 1},
    )
    assert (made.status, made.error) == ("completed", None)
    first = video_of(server, made.id)[0].float()
    assert (first - torch.as_tensor(pixels)).abs().mean() < 20
    folder = server.folder / "osp-data" / "jobs" / made.id
    for told in (client.get(f"/v1/videos/{made.id}").content, (folder / "video.mp4").read_bytes()):
        assert str(server.folder).encode() not in told
    assert openai.videos.delete(made.id).deleted
    assert not folder.exists()


def test_a_picture(served: tuple[Server, Client]) -> None:
    _, client = served
    made = client.create(frames=1, steps=2)
    assert client.wait_for_end(made["id"])["status"] == "completed"
    for variant, kind in (("video", "image/png"), ("thumbnail", "image/webp"), ("spritesheet", "image/png")):
        answer = client.get(f"/v1/videos/{made['id']}/content?variant={variant}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)


def test_events_tell_each_step_and_a_cancel_stops_within_one(served: tuple[Server, Client]) -> None:
    server, client = served
    made = client.create(steps=100)["id"]
    steps, deleted = [], False
    with client.stream("GET", f"/v1/videos/{made}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                event = line
            if line.startswith("data: ") and event == "event: video":
                video = json.loads(line.removeprefix("data: "))
                steps.append((video["status"], video["progress"]))
                if video["step"] >= 2 and not deleted:
                    deleted = client.delete(f"/v1/videos/{made}").json()["deleted"]
                    begin = time.monotonic()
    assert event == "event: video.deleted"
    assert [status for status, _ in steps] == ["queued"] * (steps[0][0] == "queued") + ["in_progress"] * (
        len(steps) - (steps[0][0] == "queued")
    )
    assert steps == sorted(steps, key=lambda one: one[1])
    # The worker is free for the next one, and the files are gone.
    other = client.create(steps=1, frames=9)
    client.wait_for_end(other["id"])
    assert time.monotonic() - begin < 15
    assert not (server.folder / "osp-data" / "jobs" / made).exists()
    assert f"{made} was cancelled" in server.said()


def test_a_job_survives_its_workers(served: tuple[Server, Client], tmp_path: Path) -> None:
    """One is killed, as the system does when memory is full, and one stops: the video is that of an
    undisturbed one.
    """
    server, client = served
    made = client.create(steps=LONG)["id"]
    client.wait_for_step(made, 4)
    os.kill(worker_pid(server), signal.SIGKILL)
    server.wait_until(lambda: "was ended by signal 9" in server.said())
    client.wait_for_step(made, 8)
    os.kill(worker_pid(server), signal.SIGSTOP)
    server.wait_until(lambda: "gave no sign of life for 3 s" in server.said())
    video = client.wait_for_end(made)
    assert (video["status"], video["error"]) == ("completed", None)
    assert torch.equal(video_of(server, made), undisturbed(tmp_path, steps=LONG))
    assert (server.folder / "osp-data" / "jobs" / made / "log.txt").read_text().count(
        "resuming after step"
    ) == 2
    assert "osp_retries_total 2.0" in client.get("/metrics").text


def test_jobs_survive_the_server(tmp_path: Path) -> None:
    """It is killed, then workers of another command are told to stop: the job goes on, and the one behind it
    is not forgotten.
    """
    own = ("--devices", "cpu", "--save-every", 1)
    with serving(tmp_path, *own) as (server, client):
        made, waiting = client.create(steps=LONG)["id"], client.create(steps=1, seed=2)["id"]
        client.wait_for_step(made, 3)
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    keys = tmp_path / "keys.txt"
    keys.write_text("# for the test\na key\n")
    with serving(tmp_path, "--devices", "none", "--host", "0.0.0.0", "--keys", keys) as (server, client):
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = "Bearer a key"
        worker = Server(tmp_path, "worker", *own, "--lease", 3)
        try:
            step = step_of(tmp_path, made)
            worker.wait_until(lambda: step_of(tmp_path, made) > step)
            assert client.get("/ready").json() == {"status": "ready", "workers": 1}
            assert worker.stop(signal.SIGTERM) == 0
            assert f"{made} goes back to the queue" in worker.said()
        finally:
            worker.kill()
        assert client.get("/ready").status_code == 503
        assert client.get(f"/v1/videos/{made}").status_code == 404  # it was sent without this key
        assert server.stop(signal.SIGTERM) == 0
    log = (tmp_path / "osp-data" / "jobs" / made / "log.txt").read_text()
    assert f"the latents after step {step_of(tmp_path, made)} of {LONG} are saved" in log
    with serving(tmp_path, *own) as (server, client):
        assert client.video(made)["status"] == "queued"
        for one in (made, waiting):
            assert client.wait_for_end(one)["status"] == "completed"
        assert torch.equal(video_of(server, made), undisturbed(tmp_path, steps=LONG))
        assert server.stop(signal.SIGINT) == 0
