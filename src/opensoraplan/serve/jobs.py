"""What a job is: its state in the store, the words of its status, and why it may fail."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# The words of OpenAI's API. A job that is cancelled or removed is gone.
Status = Literal["queued", "in_progress", "completed", "failed"]
# Why a job failed, for programs; the message beside it is for people.
ErrorCode = Literal["invalid_request", "not_finite", "out_of_memory", "worker_died", "internal_error"]

# Percent of the progress that denoising is; the rest is decoding and writing.
DENOISING_PERCENT = 95


@dataclass(frozen=True)
class Failure:
    """Why a job failed, or why it had to be tried again."""

    code: ErrorCode
    message: str


@dataclass(frozen=True)
class Job:
    """One video to make. `owner`: the digest of the key that it was sent with; empty without keys. `request`:
    the fields of its `Request`, with LoRAs and the picture by name. Times are in seconds since 1970.
    `tries`: how many workers took it since latents were last saved. `worker` has it until `lease_until`.
    `error_code`, `error_message`: why it failed, or why the last worker gave it up.
    """

    id: str
    owner: str
    model: str
    request: Mapping[str, Any]
    status: Status
    created_at: float
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    step: int = 0
    progress: int = 0
    step_seconds: float | None = None
    tries: int = 0
    worker: str | None = None
    lease_until: float | None = None
    error_code: str | None = None
    error_message: str | None = None
    idempotency_key: str | None = None
    body_digest: str | None = None


def percent_of_steps(step: int, steps: int) -> int:
    """Progress after so many steps."""
    return DENOISING_PERCENT * step // steps


def percent_of_frames(frames: int, total: int) -> int:
    """Progress after so many decoded frames. Only a finished job is at 100."""
    return min(DENOISING_PERCENT + (100 - DENOISING_PERCENT) * frames // total, 99)
