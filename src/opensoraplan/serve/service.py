"""What the API does, without HTTP: admits requests, tells what jobs there are and how far they are."""

import hashlib
import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opensoraplan.requests import Request
from opensoraplan.serve.artefacts import Artefacts, is_id
from opensoraplan.serve.body import client_fields, read_request
from opensoraplan.serve.errors import ApiError
from opensoraplan.serve.jobs import Job
from opensoraplan.serve.loras import find_loras
from opensoraplan.serve.reference import FIELD, read_reference
from opensoraplan.serve.roster import Roster, Worker
from opensoraplan.serve.settings import ServeSettings
from opensoraplan.serve.store import NewJob, OtherRequestError, QueueFullError, Store, new_id

_MOST_KEY_CHARACTERS = 255
# Bounds of openai-poll-after-ms, and of Retry-After in seconds.
_LEAST_POLL_MS, _MOST_POLL_MS = 250, 10_000
_MOST_RETRY_S = 600


@dataclass
class Service:
    """The server's state: `draining` is set when it is to end, and takes no further jobs."""

    settings: ServeSettings
    store: Store
    roster: Roster
    artefacts: Artefacts
    draining: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.prompts = self.settings.prompt_settings()

    def submit(self, owner: str, fields: Mapping[str, Any], idempotency_key: str | None) -> Job:
        """Queue the video that a body asks for. Raises ApiError."""
        if self.draining.is_set():
            raise ApiError(503, "the server is stopping, try again", headers={"Retry-After": "10"})
        if idempotency_key is not None and not 0 < len(idempotency_key) <= _MOST_KEY_CHARACTERS:
            raise ApiError(400, f"Idempotency-Key has 1 to {_MOST_KEY_CHARACTERS} characters")
        request = self._admit(fields)
        picture = read_reference(fields[FIELD]) if FIELD in fields else None
        shown = {*client_fields(), "lora"} if picture is None else {*client_fields(), "lora", "image"}
        values = request.model_dump(mode="json", include=shown)
        body = json.dumps(fields, sort_keys=True, default=_digest)
        new = NewJob(owner, self.settings.model_id, values, idempotency_key, _digest(body.encode()))
        job_id, kept = new_id(), ""
        try:
            self.artefacts.create(job_id, values, picture)
            job = self.store.add(new, job_id=job_id, most_queued=self.settings.queue)
            kept = job.id
            return job
        except QueueFullError:
            message = f"{self.settings.queue} jobs wait already, which is the most of this server"
            raise ApiError(429, message, headers={"Retry-After": str(self._retry_after())}) from None
        except OtherRequestError:
            raise ApiError(422, "this Idempotency-Key was used with another request") from None
        finally:
            if kept != job_id:
                self.artefacts.remove(job_id)

    def job(self, owner: str, job_id: str) -> Job:
        """The owner's job of that id. Raises ApiError if there is none."""
        job = self.store.get(job_id, owner) if is_id(job_id) else None
        if job is None:
            raise ApiError(404, f"there is no video {job_id[:80]!r}")
        return job

    def remove(self, owner: str, job_id: str) -> None:
        """Cancel or remove a job. The worker that has it removes its files."""
        self.job(owner, job_id)
        job = self.store.remove(job_id, owner)
        if job is not None and job.status != "in_progress":
            self.artefacts.remove(job_id)

    def video(self, job: Job) -> dict[str, Any]:
        """A job as clients see it, see `videos`."""
        return self.videos([job])[0]

    def videos(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Jobs as clients see them: OpenAI's object, the place in the queue, the step, and the settings."""
        places = self.store.places(jobs)
        return [_video(job, places.get(job.id)) for job in jobs]

    def poll_after_ms(self, job: Job) -> int:
        """When it is worth asking for a job again: after its next step."""
        milliseconds = _LEAST_POLL_MS if job.step_seconds is None else 1000 * job.step_seconds
        if job.status == "queued":
            milliseconds = max(milliseconds, 1000)
        return round(min(max(milliseconds, _LEAST_POLL_MS), _MOST_POLL_MS))

    def ready_workers(self) -> list[Worker]:
        """Workers that make videos of this server's model now."""
        silent = self.roster.silent(self.settings.lease)
        model = self.settings.model_id
        return [
            one for one in self.roster.workers() if one.ready and one.model == model and one.id not in silent
        ]

    def loras(self) -> tuple[list[str], dict[str, str]]:
        """The names of all LoRAs, and why the workers cannot use some."""
        return [*find_loras(self.settings.loras)], self._broken_loras()

    def _broken_loras(self) -> dict[str, str]:
        broken: dict[str, str] = {}
        for worker in self.ready_workers() if self.settings.loras is not None else ():
            broken |= worker.facts.get("broken_loras", {})
        return broken

    def _check_prompts(self, request: Request) -> None:
        """Refuse prompts of which cleaning leaves almost nothing."""
        negatives = [request.negative_prompt] if request.guidance > 1 else []
        for param, texts in (("prompt", ([request.prompt], [])), ("negative_prompt", ([], negatives))):
            try:
                self.prompts.check_all(*texts)
            except ValueError as error:
                raise ApiError(400, str(error), param=param) from None

    def _admit(self, fields: Mapping[str, Any]) -> Request:
        """The request of a body, if the workers can make its video."""
        known, broken = find_loras(self.settings.loras), self._broken_loras()
        request = read_request(fields, self.settings, loras=known, broken_loras=broken)
        self._check_prompts(request)
        most = self.settings.largest_request()
        area, volume = request.positions()
        most_area, most_volume = most.positions()
        if area > most_area or volume > most_volume:
            facts = next((one.facts for one in self.ready_workers()), {})
            room = ""
            if "predicted_bytes" in facts:
                predicted, total = facts["predicted_bytes"] / 1e9, facts["total_bytes"] / 1e9
                room = (
                    f", which is predicted to take {predicted:.3g} of the {total:.3g} GB of {facts['device']}"
                )
            twice = " with batched guidance" if request.batched_guidance else ""
            raise ApiError(
                400,
                f"{request.describe_size()}{twice} are more than the largest video of this server, "
                f"{most.describe_size()}{room}",
                param="size",
            )
        if request.step_cache and not most.step_cache:
            raise ApiError(
                400, "step_cache: the model of this server is not calibrated for it", param="step_cache"
            )
        return request

    def _retry_after(self) -> int:
        """Seconds until a place in the queue is free: what a job takes on average."""
        totals = self.store.totals()
        waited = (
            totals["seconds"] / max(totals["completed"], 1) / max(self.store.counts().get("queued", 0), 1)
        )
        return min(max(math.ceil(waited), 1), _MOST_RETRY_S)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _video(job: Job, place: int | None) -> dict[str, Any]:
    request = Request.model_construct(**job.request)
    settings = {name: value for name, value in job.request.items() if name != "prompt"}
    failed = job.status == "failed"
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": None if job.expires_at is None else int(job.expires_at),
        "prompt": request.prompt,
        "size": f"{request.width}x{request.height}",
        "seconds": f"{(request.frames - 1) / request.fps:g}",
        "remixed_from_video_id": None,
        "error": {"code": job.error_code, "message": job.error_message} if failed else None,
        "queue_place": place,
        "step": job.step,
        **settings,
    }
