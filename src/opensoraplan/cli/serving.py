"""`osp serve` and `osp serve worker`: options, and checks before anything is started."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from opensoraplan.cli.options import check_exists, optional, options_of
from opensoraplan.cli.parts import check_model
from opensoraplan.disk import make_folder
from opensoraplan.serve.settings import ServeSettings, WorkerSettings

Kind = TypeVar("Kind", bound=WorkerSettings)

_SHOWN = {
    "model": optional("PATH", "(default: the small built-in model)"),
    "name": optional("NAME", "(default: that of the model's folder)"),
    "store": optional("URL", "(default: a file of SQLite in the data folder; or the variable OSP_STORE)"),
    "devices": optional("NAME ...", "(default: all accelerators there are, else cpu)"),
    "largest": optional("FRAMES HEIGHT WIDTH", "(default: the usual size of the model)"),
    "loras": optional("PATH"),
    "dtype": optional("{bf16,fp16,fp32}", "(default: the model's, or bf16)"),
    "vae_dtype": optional("{bf16,fp16,fp32}", "(default: that of --dtype)"),
    "attention": optional("NAME", "(default: torch's own)"),
    "keys": optional("PATH"),
}
_WorkerOptions = options_of(WorkerSettings, without=(), shown=_SHOWN)
_ServeOptions = options_of(ServeSettings, without=(), shown=_SHOWN)

GROUPS = {
    "API": ("host", "port", "keys", "queue", "max_steps", "max_upload", "keep_hours"),
    "memory and speed": ("dtype", "vae_dtype", "memory", "weights", "attention", "compile", "tiling"),
    "when workers fail": ("save_every", "max_tries", "lease", "hang", "drain"),
}
WORKER_GROUPS = {**GROUPS, "API": ("keep_hours",)}


@dataclass(frozen=True)
class Serve(_ServeOptions):
    """Serve a model: an HTTP API in the shape of OpenAI's videos, with a queue that survives restarts.

    Only this machine can reach it, unless --host is another address, which needs a key in OSP_API_KEY or in
    --keys. Jobs continue at their step after a worker or the server is stopped or killed. The API is in
    docs/serving.md, with curl lines.
    """


@dataclass(frozen=True)
class ServeWorker(_WorkerOptions):
    """Make videos for a server on another machine, with its --store and --data."""


def serve(options: Serve) -> None:
    """`osp serve`."""
    settings = _check(options, ServeSettings, "osp serve")
    from opensoraplan.serve import server

    with _data_folder(settings.data):
        server.serve(settings)


def serve_worker(options: ServeWorker) -> None:
    """`osp serve worker`."""
    settings = _check(options, WorkerSettings, "osp serve worker")
    from opensoraplan.serve import server

    with _data_folder(settings.data):
        server.work(settings)


@contextmanager
def _data_folder(folder: Path) -> Iterator[None]:
    """Make the data folder, if it is not there, for this user only: it has everybody's prompts and videos."""
    is_new = not folder.exists()
    with make_folder(folder):
        if is_new:
            folder.chmod(0o700)
        yield


def _check(options: Any, kind: type[Kind], verb: str) -> Kind:  # noqa: ANN401 (options made of a class)
    """The settings, checked without any heavy import."""
    given = {one.name: getattr(options, one.name) for one in fields(options)}
    settings = kind.read(given, where=verb)
    check_model(settings.folder)
    settings.largest_request()
    paths: list[Path | None] = [settings.loras, getattr(settings, "keys", None)]
    for path in paths:
        if path is not None:
            check_exists(path)
    if missing := [
        name for name in ("fastapi", "sqlalchemy", "uvicorn") if importlib.util.find_spec(name) is None
    ]:
        raise ValueError(f"{verb} needs {', '.join(missing)}: pip install 'opensoraplan[serve]'")
    return settings
