"""A video server under load: many clients at once with good and bad requests, and processes killed at random.

python benchmarks/serve_load.py --clients 100 --seconds 180 python benchmarks/serve_load.py --clients 20
--kills 100 python benchmarks/serve_load.py --clients 20 --kills 20 --store postgresql://USER@HOST/NAME
--worker-commands 2

Videos of the built-in model, 9 frames of 48 x 32. Checks that every accepted job ended once, with the frames
of an undisturbed video, and that no answer was a 5xx; prints how long status calls took and how the server's
memory grew. A client that sees its connection break sends the same request again, with the same idempotency
key.
"""

import argparse
import asyncio
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import select

from opensoraplan import builtin
from opensoraplan.data.video import read_frames
from opensoraplan.generate.session import Session, SessionOptions
from opensoraplan.requests import Request
from opensoraplan.serve.database import WORKERS, Database
from opensoraplan.serve.settings import WorkerSettings

SEEDS, STEPS = 8, 4
GOOD: dict[str, Any] = {
    "prompt": "A small blue ball falls over a green meadow.",
    "frames": 9,
    "height": 32,
    "width": 48,
    "steps": STEPS,
    "guidance": 1.0,
    "fps": 12,
}
BAD: tuple[dict[str, Any], ...] = (
    {"prompt": ""},
    {"frames": 10},
    {"frames": 1001},
    {"prompt": "x" * 100_000},
    {"input_reference": "file:///etc/passwd"},
    {"lora": "../x"},
    {"no_such_field": 1},
    {"steps": 10_000},
)
# Seconds after which a job that has not ended counts as lost, and between looks at memory.
PATIENCE_S, LOOK_S = 600, 5


@dataclass
class Seen:
    """What clients and the watch over the server have seen."""

    accepted: dict[str, int] = field(default_factory=dict)
    """The seed of each accepted job."""
    deleted: set[str] = field(default_factory=set)
    answers: Counter[int] = field(default_factory=Counter)
    status_s: list[float] = field(default_factory=list)
    broken: int = 0
    memory: list[float] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Servers:
    """The server's command, and further ones with workers only."""

    def __init__(self, options: argparse.Namespace, data: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        common = ["--data", str(data), "--lease", "5", "--save-every", "1", "--max-tries", "20"]
        common += ["--store", options.store] if options.store else []
        workers = ["--devices", *["cpu"] * options.workers]
        first = ["serve", "--port", str(self.port), "--queue", "100000", *common]
        first += ["--devices", "none"] if options.worker_commands else workers
        self.lines = [first, *([["serve", "worker", *common, *workers]] * options.worker_commands)]
        self.log = (data / "log.txt").open("wb")
        self.running = [self._start(line) for line in self.lines]
        values = {"data": data, "store": options.store}
        url = WorkerSettings.read(values, where="the options").store_url
        self.database = Database(url)

    def _start(self, line: list[str]) -> subprocess.Popen[bytes]:
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-m", "opensoraplan", *line], stderr=self.log, env=variables)

    def kill_one(self, *, what: str) -> None:
        """Kill a worker, or a command, which is started again."""
        if what == "worker":
            with self.database.reading() as connection:
                pids = list(connection.execute(select(WORKERS.c.pid).where(WORKERS.c.ready == 1)).scalars())
            if pids:
                with suppress(ProcessLookupError):
                    os.kill(random.choice(pids), signal.SIGKILL)
            return
        number = random.randrange(len(self.running))
        self.running[number].kill()
        self.running[number].wait()
        self.running[number] = self._start(self.lines[number])

    def memory(self) -> float:
        """Megabytes of the HTTP server's process."""
        return psutil.Process(self.running[0].pid).memory_info().rss / 1e6

    def stop(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait()


class LoadClient:
    """One client of many."""

    def __init__(self, http: httpx.AsyncClient, seen: Seen) -> None:
        self._http, self._seen = http, seen

    async def call(self, method: str, path: str, **options: Any) -> httpx.Response | None:  # noqa: ANN401
        """An answer; None after a connection that broke."""
        begin = time.perf_counter()
        try:
            answer = await self._http.request(method, path, **options)
        except httpx.HTTPError:
            self._seen.broken += 1
            await asyncio.sleep(0.5)
            return None
        self._seen.answers[answer.status_code] += 1
        if method == "GET" and path.startswith("/v1/videos/video_") and "content" not in path:
            self._seen.status_s.append(time.perf_counter() - begin)
        if answer.status_code >= 500 and answer.status_code != 503:
            self._seen.wrong.append(f"{method} {path}: {answer.text[:200]}")
        return answer

    async def send_good(self) -> str | None:
        """A job, sent again until it is accepted or the time is over."""
        seed = random.randrange(SEEDS)
        headers = {"Idempotency-Key": f"{random.getrandbits(64):x}"}
        for _ in range(200):
            answer = await self.call("POST", "/v1/videos", json={**GOOD, "seed": seed}, headers=headers)
            if answer is not None and answer.status_code == 200:
                self._seen.accepted[answer.json()["id"]] = seed
                return answer.json()["id"]
            await asyncio.sleep(0.2)
        return None

    async def delete(self, job_id: str) -> None:
        """Cancel or remove a job, asked again until it is gone."""
        self._seen.deleted.add(job_id)
        while (
            answer := await self.call("DELETE", f"/v1/videos/{job_id}")
        ) is None or answer.status_code == 503:
            await asyncio.sleep(0.2)

    async def run(self, until: float) -> None:
        """Good and bad requests, status calls, downloads, and now and then a cancel."""
        mine: list[str] = []
        while time.monotonic() < until:
            dice = random.random()
            if dice < 0.005 or not mine:
                mine += [job_id] if (job_id := await self.send_good()) else []
            elif dice < 0.12:
                answer = await self.call("POST", "/v1/videos", json={**GOOD, **random.choice(BAD)})
                if answer is not None and not 400 <= answer.status_code < 500 and answer.status_code != 503:
                    self._seen.wrong.append(f"a bad request was answered {answer.status_code}")
            elif dice < 0.125:
                job_id = mine.pop(random.randrange(len(mine)))
                await self.delete(job_id)
            elif dice < 0.15:
                await self.call("GET", f"/v1/videos/{random.choice(mine)}/content")
            elif dice < 0.2:
                await self.call("GET", "/v1/videos", params={"limit": 10})
            else:
                await self.call("GET", f"/v1/videos/{random.choice(mine)}")
            await asyncio.sleep(random.uniform(0.5, 1.5))  # as a client that polls


async def disturb(servers: Servers, seen: Seen, kills: int, until: float) -> None:
    """Kill processes until there were so many kills: two workers for each command."""
    pause = max(until - time.monotonic(), 1) / max(kills, 1)
    for number in range(kills):
        await asyncio.sleep(random.uniform(0.5, 1.5) * pause)
        what = "command" if number % 3 == 2 else "worker"
        servers.kill_one(what=what)
        seen.kills[what] += 1


async def watch_memory(servers: Servers, seen: Seen) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            seen.memory.append(servers.memory())
        except psutil.NoSuchProcess:
            continue


async def settle(client: LoadClient, seen: Seen) -> Counter[str]:
    """Wait until all accepted jobs have ended. How many ended how."""
    end = time.monotonic() + PATIENCE_S
    left, ended = set(seen.accepted) - seen.deleted, Counter[str]()
    while left and time.monotonic() < end:
        for job_id in sorted(left):
            answer = await client.call("GET", f"/v1/videos/{job_id}")
            if answer is None or answer.status_code == 503:
                break
            status = answer.json().get("status", f"answer {answer.status_code}")
            if status in ("queued", "in_progress"):
                break  # later ones wait, too
            ended[status] += 1
            left.remove(job_id)
    if left:
        seen.wrong.append(f"{len(left)} jobs were lost, as {min(left)}")
    return ended


def frames_of(path: Path) -> str:
    return hashlib.sha256(read_frames(path).numpy().tobytes()).hexdigest()


def undisturbed(folder: Path) -> dict[int, str]:
    """The frames of the video of each seed, as one session makes them."""
    from opensoraplan.generate import job

    requests = [Request(**GOOD, solver="adams", seed=seed) for seed in range(SEEDS)]
    paths = [folder / f"{request.seed}.mp4" for request in requests]
    options = SessionOptions(builtin.folder(), device="cpu", dtype="fp32", progress=False)
    with Session.open(options, requests) as session:
        made = job.run(session, requests, paths, resume=False)
    return {seed: frames_of(path) for seed, path in enumerate(made)}


async def load(options: argparse.Namespace, servers: Servers, seen: Seen, data: Path) -> Counter[str]:
    base = f"http://127.0.0.1:{servers.port}"
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=base, timeout=60, limits=limits) as http:
        client = LoadClient(http, seen)
        while (answer := await client.call("GET", "/ready")) is None or answer.status_code != 200:
            await asyncio.sleep(0.5)
        seen.answers.clear()
        seen.broken = 0
        watching = asyncio.create_task(watch_memory(servers, seen))
        until = time.monotonic() + options.seconds
        clients = [LoadClient(http, seen).run(until) for _ in range(options.clients)]
        await asyncio.gather(*clients, disturb(servers, seen, options.kills, until))
        ended = await settle(client, seen)
        watching.cancel()
        assert seen.memory, "the load was too short"
        answer = await client.call("GET", "/metrics")
    expected = undisturbed(data / "undisturbed")
    for job_id, seed in seen.accepted.items():
        folder = data / "jobs" / job_id
        video = folder / "video.mp4"
        if job_id not in seen.deleted and video.exists() and frames_of(video) != expected[seed]:
            seen.wrong.append(f"{job_id} has other frames than an undisturbed video of seed {seed}")
        # Those of a job whose worker was killed before it noticed are removed an hour later.
        if job_id in seen.deleted and folder.exists() and not options.kills:
            seen.wrong.append(f"{job_id} was deleted, but its files are there")
    assert answer is not None
    counted = [line for line in answer.text.splitlines() if line.startswith("osp_videos_total")]
    print("the server counts:", *counted, sep="\n  ")
    print("status calls that the server answered within 50 ms:", under_50_ms(answer.text))
    return ended


def under_50_ms(metrics: str) -> str:
    """The share of status calls that the server itself answered within 50 ms since its last start."""
    route = r'method="GET",route="/v1/videos/{job_id}",status="200"'
    fast, every = (
        next((float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(start)), 0.0)
        for start in (f'osp_http_seconds_bucket{{le="0.05",{route}', f"osp_http_seconds_count{{{route}")
    )
    return f"{fast / max(every, 1):.2%} of {every:.0f}"


def report(seen: Seen, ended: Counter[str]) -> None:
    times = sorted(seen.status_s)
    removed = len(seen.deleted)
    print(f"accepted {len(seen.accepted)} jobs, of which cancelled or removed {removed}; {dict(ended)}")
    print(f"answers {dict(sorted(seen.answers.items()))}, connections that broke {seen.broken}")
    print("kills", dict(seen.kills))
    places = (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
    shown = ", ".join(f"{name} {times[int(len(times) * at)] * 1000:.1f}" for name, at in places)
    print(f"{len(times)} status calls as clients saw them, ms: {shown}, longest {times[-1] * 1000:.1f}")
    first, last = seen.memory[0], seen.memory[-1]
    print(f"MB of the server: {first:.0f} at first, {max(seen.memory):.0f} at most, {last:.0f} at last")
    print("wrong:", *(seen.wrong or ["nothing"]), sep="\n  ")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="worker processes of each command")
    parser.add_argument("--worker-commands", type=int, default=0, help="commands beside the server")
    parser.add_argument("--store", default=None)
    options = parser.parse_args()
    seen = Seen()
    with tempfile.TemporaryDirectory(prefix="serve-load-") as folder:
        data = Path(folder)
        (data / "undisturbed").mkdir()
        servers = Servers(options, data)
        try:
            ended = asyncio.run(load(options, servers, seen, data))
        finally:
            servers.stop()
    report(seen, ended)
    sys.exit(1 if seen.wrong else 0)


if __name__ == "__main__":
    main()
