"""What a supervisor starts in a new process. The server's process imports this, but not what workers need."""

from dataclasses import dataclass

from opensoraplan.serve.settings import WorkerSettings


@dataclass(frozen=True)
class Identity:
    """What a supervisor calls a worker, itself, and the worker's device."""

    id: str
    supervisor: str
    device: str


def run_worker(settings: WorkerSettings, identity: Identity) -> None:
    """The process of a worker."""
    from opensoraplan.serve.worker import main

    main(settings, identity)
