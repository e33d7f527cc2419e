"""The HTTP API, in the shape of OpenAI's videos: routes, and what they answer. service.py does the work."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from opensoraplan.serve.access import Guard, Keys
from opensoraplan.serve.artefacts import Variant
from opensoraplan.serve.body import read_body
from opensoraplan.serve.errors import ApiError, answer_errors
from opensoraplan.serve.jobs import Job
from opensoraplan.serve.metrics import Metrics
from opensoraplan.serve.service import Service

# Seconds between looks at a job whose events are sent, and between comments that keep a connection open.
_LOOK_S, _KEEP_ALIVE_S = 0.25, 15.0
_MEDIA = {".mp4": "video/mp4", ".png": "image/png", ".webp": "image/webp"}

router = APIRouter()


def make_app(service: Service, keys: Keys) -> FastAPI:
    """The app of a server. Its description is at /openapi.json; pages with code of other sites are off."""
    app = FastAPI(title="opensoraplan", docs_url=None, redoc_url=None)
    app.state.service, app.state.metrics = service, Metrics(service)
    app.include_router(router)
    answer_errors(app)
    app.add_middleware(Guard, keys=keys, most_bytes=service.settings.max_upload * 1e6)
    app.add_middleware(app.state.metrics.timing)
    return app


async def _service(request: Request) -> Service:
    return request.app.state.service


async def _owner(request: Request) -> str:
    return request.state.owner


# The two are async, since others would take a thread each.
WithService = Annotated[Service, Depends(_service)]
WithOwner = Annotated[str, Depends(_owner)]


@router.post("/v1/videos")
async def create(request: Request, service: WithService, owner: WithOwner) -> JSONResponse:
    fields = await read_body(request)
    key = request.headers.get("idempotency-key")
    job = await run_in_threadpool(service.submit, owner, fields, key)
    return await run_in_threadpool(_answer, service, job)


@router.get("/v1/videos")
def page(
    service: WithService,
    owner: WithOwner,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> JSONResponse:
    last = None if after is None else service.job(owner, after)
    jobs, has_more = service.store.page(owner, after=last, limit=limit, order=order)
    ends = {"first_id": jobs[0].id, "last_id": jobs[-1].id} if jobs else {"first_id": None, "last_id": None}
    data = service.videos(jobs)
    return JSONResponse({"object": "list", "data": data, **ends, "has_more": has_more})


@router.get("/v1/videos/{job_id}")
def retrieve(job_id: str, service: WithService, owner: WithOwner) -> JSONResponse:
    return _answer(service, service.job(owner, job_id))


@router.delete("/v1/videos/{job_id}")
def delete(job_id: str, service: WithService, owner: WithOwner) -> dict[str, Any]:
    service.remove(owner, job_id)
    return {"id": job_id, "object": "video.deleted", "deleted": True}


@router.get("/v1/videos/{job_id}/content")
def content(job_id: str, service: WithService, owner: WithOwner, variant: Variant = "video") -> FileResponse:
    job = service.job(owner, job_id)
    if job.status != "completed":
        wait = {"openai-poll-after-ms": str(service.poll_after_ms(job))}
        raise ApiError(409, f"{job_id} is {job.status}: it has no {variant} yet", headers=wait)
    path = service.artefacts.file(job_id, job.request["frames"], variant)
    if not path.is_file():
        raise ApiError(404, f"the {variant} of {job_id} was removed")
    return FileResponse(path, media_type=_MEDIA[path.suffix], filename=f"{job_id}{path.suffix}")


@router.get("/v1/videos/{job_id}/events")
async def events(job_id: str, service: WithService, owner: WithOwner) -> StreamingResponse:
    await run_in_threadpool(service.job, owner, job_id)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        _changes(service, owner, job_id), media_type="text/event-stream", headers=headers
    )


async def _changes(service: Service, owner: str, job_id: str) -> AsyncIterator[str]:
    """Server-sent events: the job whenever it has changed, until it has ended."""
    before, quiet = "", 0.0
    while True:
        job = await run_in_threadpool(service.store.get, job_id, owner)
        if job is None:
            deleted = {"id": job_id, "object": "video.deleted", "deleted": True}
            yield f"event: video.deleted\ndata: {json.dumps(deleted)}\n\n"
            return
        now = json.dumps(await run_in_threadpool(service.video, job))
        if now != before:
            yield f"event: video\ndata: {now}\n\n"
            before, quiet = now, 0.0
        elif quiet >= _KEEP_ALIVE_S:
            yield ": still there\n\n"
            quiet = 0.0
        if job.status in ("completed", "failed") or service.draining.is_set():
            return
        await asyncio.sleep(_LOOK_S)
        quiet += _LOOK_S


def _answer(service: Service, job: Job) -> JSONResponse:
    wait = {"openai-poll-after-ms": str(service.poll_after_ms(job))}
    return JSONResponse(service.video(job), headers=wait)


@router.get("/v1/models")
def models(service: WithService) -> dict[str, Any]:
    return {"object": "list", "data": [_model(service)]}


@router.get("/v1/models/{model}")
def model(model: str, service: WithService) -> dict[str, Any]:
    if model != service.settings.model_id:
        raise ApiError(404, f"this server has the model {service.settings.model_id!r}, not {model[:80]!r}")
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    """The model, with its largest video and the values of what a request leaves out."""
    most = service.settings.largest_request()
    largest = {name: getattr(most, name) for name in ("frames", "height", "width")}
    return {
        "id": service.settings.model_id,
        "object": "model",
        "created": int((service.settings.folder / "model_index.json").stat().st_mtime),
        "owned_by": "opensoraplan",
        "largest": largest,
        "defaults": service.settings.defaults(),
    }


@router.get("/v1/loras")
def loras(service: WithService) -> dict[str, Any]:
    names, broken = service.loras()
    data = [{"id": name, "object": "lora", "error": broken.get(name)} for name in names]
    return {"object": "list", "data": data}


@router.get("/health")
def health(service: WithService) -> dict[str, Any]:
    """Whether the server and its store work."""
    service.store.counts()
    return {"status": "ok"}


@router.get("/ready")
def ready(service: WithService) -> dict[str, Any]:
    """Whether a job that is sent now is made soon."""
    if service.draining.is_set():
        raise ApiError(503, "the server is stopping")
    workers = len(service.ready_workers())
    if not workers:
        raise ApiError(503, "no worker is ready")
    return {"status": "ready", "workers": workers}


@router.get("/metrics")
def metrics(request: Request) -> Response:
    text, media_type = request.app.state.metrics.text()
    return Response(text, media_type=media_type)
