"""The API without workers: what is admitted, told and refused. test_serving.py makes videos."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types import Video
from PIL import Image
from serving import JSON, PROMPT, app_of

from opensoraplan.requests import Request
from opensoraplan.serve.body import client_fields
from opensoraplan.serve.jobs import Failure
from opensoraplan.serve.roster import Worker

ALONE = "http://localhost:8000"


def client_of(app: Any, **headers: str) -> TestClient:  # noqa: ANN401
    return TestClient(app, base_url=ALONE, headers=headers, raise_server_exceptions=False)


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Any]:
    with app_of(tmp_path / "data", queue=5) as made:
        yield made


@pytest.fixture
def client(app: Any) -> TestClient:  # noqa: ANN401
    return client_of(app)


def message_of(answer: Any, status: int, param: str | None = None) -> str:  # noqa: ANN401 (a response)
    """The message of an answer that is an error, as it should be."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    return error["message"]


def check_shape(video: dict[str, Any]) -> None:
    """As OpenAI's client has it, which knows four sizes only."""
    Video.model_validate({**video, "size": "1280x720"}, strict=True)


def test_a_video_is_queued_with_the_values_of_the_model(client: TestClient) -> None:
    answer = client.post("/v1/videos", json={"prompt": PROMPT, "seed": 7})
    assert answer.status_code == 200
    assert int(answer.headers["openai-poll-after-ms"]) >= 250
    video = answer.json()
    check_shape(video)
    expected = {"object": "video", "model": "builtin", "progress": 0, "prompt": PROMPT, "error": None}
    expected |= {"size": "128x96", "seconds": "2", "frames": 25, "steps": 20, "fps": 12.0, "solver": "adams"}
    expected |= {"seed": 7, "queue_place": 0, "completed_at": None}
    assert {name: video[name] for name in expected} == expected
    assert client.get(f"/v1/videos/{video['id']}").json() == video


def test_seeds_differ_unless_they_are_given(client: TestClient) -> None:
    seeds = {client.post("/v1/videos", json={"prompt": PROMPT}).json()["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_multipart_forms_say_the_same_as_json(client: TestClient) -> None:
    fields = {"prompt": PROMPT, "size": "64x48", "seconds": "1", "seed": 3, "batched_guidance": False}
    fields |= {"guidance_interval": [0, 0.5], "guidance": 2.5}
    one = client.post("/v1/videos", json=fields).json()
    form = {name: (None, str(value).strip("[]")) for name, value in fields.items()}
    other = client.post("/v1/videos", files=form).json()
    for name in ("id", "created_at", "queue_place"):
        one.pop(name), other.pop(name)
    assert one == other
    assert (one["frames"], one["width"], one["height"], one["seconds"]) == (17, 64, 48, "1.33333")


def test_fields_of_requests_that_may_be_paths_are_no_fields_of_the_api() -> None:
    """Whatever a Request will have: text may be a path, but for the prompts."""
    others = set(Request.model_fields) - client_fields()
    assert "lora" in others
    for name, one in Request.model_fields.items():
        is_text = "str" in str(one.annotation) or "Path" in str(one.annotation)
        is_path = is_text and name not in ("prompt", "negative_prompt")
        assert (name in others) == (is_path or name in ("overlap", "extend")), name


def drawn(kind: str = "PNG", *, width: int = 64, height: int = 48) -> bytes:
    """The file of a picture."""
    file = BytesIO()
    Image.new("RGB", (width, height), "orange").save(file, format=kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_to_begin_with(client: TestClient, tmp_path: Path, kind: str) -> None:
    """As an upload, whatever its name, and in JSON: kept under the server's name, until it is removed."""
    content = drawn(kind)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"
    form = {name: (None, str(value)) for name, value in JSON.items()}
    for body in (
        {"files": {**form, "input_reference": ("../../evil.png", content)}},
        {"json": {**JSON, "input_reference": {"image_url": url}}},
    ):
        headers = {"Idempotency-Key": f"{[*body]}"}
        answers = [client.post("/v1/videos", **body, headers=headers) for _ in range(2)]  # type: ignore[arg-type]
        assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
        video, again = (answer.json() for answer in answers)
        check_shape(video)
        assert video["id"] == again["id"]
        assert video["image"] == "picture"
        assert str(tmp_path) not in answers[0].text
        folder = tmp_path / "data" / "jobs" / video["id"]
        assert sorted(one.name for one in folder.iterdir()) == ["picture", "request.json"]
        assert (folder / "picture").read_bytes() == content
        other = {"files": {**form, "input_reference": ("evil.png", drawn(kind, width=80))}}
        assert message_of(client.post("/v1/videos", **other, headers=headers), 422)  # type: ignore[arg-type]
        client.delete(f"/v1/videos/{video['id']}")
        assert not folder.exists()
    assert {one.name.partition(".")[0] for one in tmp_path.rglob("*")} == {"data", "jobs"}


def test_the_server_checks_pictures_without_torch() -> None:
    code = (
        "import sys, opensoraplan.serve.app; assert 'PIL' in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_list_has_pages(client: TestClient) -> None:
    ids = [client.post("/v1/videos", json=JSON).json()["id"] for _ in range(5)]
    page = client.get("/v1/videos", params={"limit": 2}).json()
    assert [one["id"] for one in page["data"]] == ids[:2:-1]
    assert (page["object"], page["first_id"], page["last_id"]) == ("list", ids[4], ids[3])
    assert page["has_more"]
    rest = client.get("/v1/videos", params={"after": ids[3]}).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (ids[2::-1], False)
    oldest = client.get("/v1/videos", params={"order": "asc", "limit": 1}).json()
    assert oldest["data"][0]["id"] == ids[0]
    assert [one["queue_place"] for one in client.get("/v1/videos").json()["data"]] == [4, 3, 2, 1, 0]
    message_of(client.get("/v1/videos?limit=0"), 400, "limit")
    message_of(client.get("/v1/videos?order=up"), 400, "order")
    message_of(client.get("/v1/videos?after=video_x"), 404)


def test_a_full_queue(client: TestClient) -> None:
    for _ in range(5):
        assert client.post("/v1/videos", json=JSON).status_code == 200
    answer = client.post("/v1/videos", json=JSON)
    assert message_of(answer, 429) == "5 jobs wait already, which is the most of this server"
    assert int(answer.headers["retry-after"]) >= 1


def test_a_job_that_waits_is_cancelled(client: TestClient, tmp_path: Path) -> None:
    made = client.post("/v1/videos", json=JSON).json()["id"]
    assert (tmp_path / "data" / "jobs" / made / "request.json").exists()
    answer = client.delete(f"/v1/videos/{made}")
    assert answer.json() == {"id": made, "object": "video.deleted", "deleted": True}
    assert not (tmp_path / "data" / "jobs" / made).exists()
    message_of(client.get(f"/v1/videos/{made}"), 404)
    message_of(client.delete(f"/v1/videos/{made}"), 404)


def test_an_idempotency_key_makes_one_job(client: TestClient, tmp_path: Path) -> None:
    headers = {"Idempotency-Key": "once"}
    first, second = (client.post("/v1/videos", json={"prompt": PROMPT}, headers=headers) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert len(list((tmp_path / "data" / "jobs").iterdir())) == 1
    message_of(client.post("/v1/videos", json={"prompt": "another"}, headers=headers), 422)
    message_of(client.post("/v1/videos", json=JSON, headers={"Idempotency-Key": "k" * 256}), 400)


def test_content_before_the_video_is_made(client: TestClient) -> None:
    made = client.post("/v1/videos", json=JSON).json()["id"]
    answer = client.get(f"/v1/videos/{made}/content")
    assert message_of(answer, 409) == f"{made} is queued: it has no video yet"
    message_of(client.get(f"/v1/videos/{made}/content?variant=latents"), 400, "variant")


def test_how_a_job_fails_is_told(app: Any, client: TestClient) -> None:  # noqa: ANN401
    made = client.post("/v1/videos", json=JSON).json()["id"]
    store = app.state.service.store
    job = store.claim("w", "builtin", lease=60)
    store.report(job, lease=60, step=2, progress=47, step_seconds=2.5)
    answer = client.get(f"/v1/videos/{made}")
    assert (answer.json()["status"], answer.json()["progress"]) == ("in_progress", 47)
    assert answer.headers["openai-poll-after-ms"] == "2500"
    store.fail(job, Failure("out_of_memory", "no room"), keep=60)
    video = client.get(f"/v1/videos/{made}").json()
    assert (video["status"], video["error"]) == ("failed", {"code": "out_of_memory", "message": "no room"})
    assert video["expires_at"] == pytest.approx(video["completed_at"] + 60, abs=1)
    check_shape(video)


def test_events_until_the_end(app: Any, client: TestClient) -> None:  # noqa: ANN401
    made = client.post("/v1/videos", json=JSON).json()["id"]
    store = app.state.service.store
    store.fail(store.claim("w", "builtin", lease=60), Failure("not_finite", "NaN"), keep=0)
    answer = client.get(f"/v1/videos/{made}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    event, data = answer.text.strip().split("\n")
    assert event == "event: video"
    assert json.loads(data.removeprefix("data: "))["status"] == "failed"
    message_of(client.get(f"/v1/videos/video_{'0' * 32}/events"), 404)


def test_sizes_that_no_worker_makes(app: Any, client: TestClient) -> None:  # noqa: ANN401
    for changes in ({"seconds": "4"}, {"size": "1280x720"}, {"frames": 25, "batched_guidance": True}):
        said = message_of(client.post("/v1/videos", json={**JSON, **changes}), 400, "size")
        assert "are more than the largest video of this server, 25 frames of 128 x 96" in said
    roster = app.state.service.roster
    roster.join(Worker("w", "host-0", "cuda:0", "builtin", 1))
    facts = {"device": "cuda:0", "predicted_bytes": 28.4e9, "total_bytes": 32e9}
    roster.tell("w", ready=1, facts=facts)
    said = message_of(client.post("/v1/videos", json={**JSON, "frames": 33}), 400, "size")
    assert said == (
        "33 frames of 128 x 96 are more than the largest video of this server, 25 frames of 128 x 96, which "
        "is predicted to take 28.4 of the 32 GB of cuda:0"
    )


def test_keys_and_owners(tmp_path: Path) -> None:
    with app_of(tmp_path / "data", keys=("first key", "second key")) as app:
        one, two = (client_of(app, Authorization=f"Bearer {key} key") for key in ("first", "second"))
        made = one.post("/v1/videos", json=JSON).json()["id"]
        assert one.get(f"/v1/videos/{made}").status_code == 200
        for answer in (
            two.get(f"/v1/videos/{made}"),
            two.delete(f"/v1/videos/{made}"),
            two.get(f"/v1/videos/{made}/content"),
            two.get(f"/v1/videos/{made}/events"),
            two.get(f"/v1/videos?after={made}"),
        ):
            message_of(answer, 404)
        assert two.get("/v1/videos").json()["data"] == []
        same = {"Idempotency-Key": "k"}
        assert (
            one.post("/v1/videos", json=JSON, headers=same).json()["id"]
            != two.post("/v1/videos", json=JSON, headers=same).json()["id"]
        )
        for header in (
            "",
            "Bearer third key",
            "Bearer",
            "Bearer first",
            "Basic first key",
            "first key",
            "Bearer é",
        ):
            other = client_of(app)
            headers = {"Authorization": header.encode()} if header else {}
            for path in ("/v1/videos", "/v1/models", "/v1/loras", "/metrics", "/openapi.json", "/nowhere"):
                answer = other.get(path, headers=headers)
                message_of(answer, 401)
                assert answer.headers["www-authenticate"] == "Bearer"
        assert client_of(app).get("/health").status_code == 200
        assert client_of(app).get("/ready").status_code == 503
        stranger = client_of(app, Authorization="Bearer first key", Host="videos.example")
        assert stranger.get("/v1/models").status_code == 200


def test_without_keys_pages_of_other_sites_are_refused(client: TestClient) -> None:
    for headers in (
        {"Host": "attacker.example"},
        {"Host": "localhost.attacker.example:8000"},
        {"Host": "[::1"},
        {"Origin": "http://attacker.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:9000"},
    ):
        message_of(client.post("/v1/videos", json=JSON, headers=headers), 403)
    for headers in ({"Host": "127.0.0.1:1"}, {"Host": "[::1]:8000"}, {"Origin": ALONE}):
        assert client.post("/v1/videos", json=JSON, headers=headers).status_code == 200


def test_while_the_server_stops(app: Any, client: TestClient) -> None:  # noqa: ANN401
    made = client.post("/v1/videos", json=JSON).json()["id"]
    app.state.service.draining.set()
    answer = client.post("/v1/videos", json=JSON)
    message_of(answer, 503)
    assert answer.headers["retry-after"]
    message_of(client.get("/ready"), 503)
    assert client.get(f"/v1/videos/{made}").json()["status"] == "queued"


def test_models_and_health(app: Any, client: TestClient) -> None:  # noqa: ANN401
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("builtin", "model")
    assert model["largest"] == {"frames": 25, "height": 96, "width": 128}
    assert client.get("/v1/models/builtin").json() == model
    message_of(client.get("/v1/models/sora-2"), 404)
    assert client.get("/health").json() == {"status": "ok"}
    assert message_of(client.get("/ready"), 503) == "no worker is ready"
    roster = app.state.service.roster
    roster.join(Worker("w", "host-0", "cpu", "builtin", 1))
    assert client.get("/ready").status_code == 503
    roster.tell("w", ready=1)
    assert client.get("/ready").json() == {"status": "ready", "workers": 1}


def test_metrics(app: Any, client: TestClient) -> None:  # noqa: ANN401
    store = app.state.service.store
    for _ in range(3):
        client.post("/v1/videos", json=JSON)
    store.complete(store.claim("w", "builtin", lease=60), keep=0)
    store.claim("w", "builtin", lease=60)
    said = client.get("/metrics").text
    for line in (
        "osp_queue 1.0",
        "osp_running 1.0",
        'osp_videos_total{outcome="completed"} 1.0',
        "osp_video_seconds_count 1.0",
        'osp_http_seconds_count{method="POST",route="/v1/videos",status="200"} 3.0',
    ):
        assert line in said.splitlines()


def test_loras_are_named(tmp_path: Path) -> None:
    loras = tmp_path / "loras"
    (loras / "peft").mkdir(parents=True)
    (loras / "peft" / "adapter_config.json").write_text("{}")
    for name in ("style.safetensors", "broken.safetensors", "notes.txt", ".hidden.safetensors"):
        (loras / name).touch()
    with app_of(tmp_path / "data", loras=loras) as app:
        client, roster = client_of(app), app.state.service.roster
        roster.join(Worker("w", "host-0", "cpu", "builtin", 1))
        roster.tell("w", ready=1, facts={"broken_loras": {"broken": "it is empty"}})
        found = {one["id"]: one["error"] for one in client.get("/v1/loras").json()["data"]}
        assert found == {"broken": "it is empty", "peft": None, "style": None}
        for lora in (["style:0.5", "peft"], "style:0.5 peft"):
            video = client.post("/v1/videos", json={**JSON, "lora": lora}).json()
            assert video["lora"] == ["style:0.5", "peft"]
        form = client.post("/v1/videos", files=[("prompt", (None, "a")), ("lora", (None, "style"))])
        assert form.json()["lora"] == ["style"]
        for lora, said in (
            ("styel", "this server has no LoRA 'styel' (did you mean 'style'?)"),
            ("broken", "the LoRA 'broken' does not fit this model: it is empty"),
            ("../style", "lora takes names of this server's LoRAs, not paths, got '../style'"),
            (f"{loras}/style.safetensors", "not paths"),
            ("style:x", "the strength of a LoRA is a number from -100 to 100"),
            ("style style:2", "style is named twice"),
            ([1], "lora is a list of NAME or NAME:STRENGTH, got [1]"),
        ):
            assert said in message_of(client.post("/v1/videos", json={**JSON, "lora": lora}), 400, "lora")
