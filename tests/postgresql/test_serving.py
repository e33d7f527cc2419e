"""A server without workers, and two commands with workers as on other machines, of which one is killed."""

import signal
from pathlib import Path

import torch
from serving import LONG, Server, serving, undisturbed, video_of


def test_jobs_survive_a_machine(url: str, tmp_path: Path) -> None:
    own = ("--store", url, "--devices", "cpu", "--lease", 3, "--save-every", 1)
    workers = [Server(tmp_path, "worker", *own) for _ in range(2)]
    try:
        with serving(tmp_path, "--store", url, "--devices", "none") as (server, client):
            server.wait_until(lambda: client.get("/ready").json().get("workers") == 2)
            made = [client.create(steps=LONG, seed=seed)["id"] for seed in (1, 2, 3)]
            for job_id in made[:2]:
                assert client.wait_for_step(job_id, 2)["status"] == "in_progress"
            assert client.video(made[2])["status"] == "queued"
            workers[0].stop(signal.SIGKILL)
            for job_id in made:
                assert client.wait_for_end(job_id)["status"] == "completed"
            for seed, job_id in enumerate(made[:2], start=1):
                found = video_of(server, job_id)
                assert torch.equal(found, undisturbed(tmp_path / str(seed), steps=LONG, seed=seed))
            assert 'osp_videos_total{outcome="completed"} 3.0' in client.get("/metrics").text
            assert client.get("/ready").json() == {"status": "ready", "workers": 1}
            assert workers[1].stop() == 0
    finally:
        for worker in workers:
            worker.kill()
