"""Hostile requests: each is answered with a 4xx and a message, and leaves nothing behind."""

import base64
import json
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serving import PROMPT, app_of

PATHS = (
    "/etc/passwd",
    "../../../etc/passwd",
    "..\\..\\secret",
    "file:///etc/passwd",
    "http://127.0.0.1:1/x.png",
    "http://169.254.169.254/latest/meta-data",
    "\\\\host\\share\\x",
    "~/.ssh/id_rsa",
    "/dev/zero",
    "/proc/self/environ",
)
# Values of JSON that no field takes.
JUNK = ([], {}, "x" * 30_000, {"a": {"b": []}}, [1, 2, 3])
# Of pictures: of this machine, of other kinds, with more, and what is no picture.
URLS = (
    {"image_url": "file:///etc/passwd"},
    {"image_url": "/etc/passwd"},
    {"image_url": "https://example.com/x.png"},
    {"image_url": "data:text/plain;base64,eA=="},
    {"image_url": "data:image/png,x"},
    {"image_url": "data:image/png;base64,%%%"},
    {"image_url": "data:image/png;base64,eA=="},
    {"image_url": "data:image/svg+xml;base64,PHN2Zy8+"},
    {"image_url": ["data:image/png;base64,eA=="]},
    {"image_url": "data:image/png;base64,eA==", "file_id": "x"},
    {},
    [],
)
FIELDS: dict[str, tuple[Any, ...]] = {
    "prompt": ("", "   ", 7, None, True, "a\0b", "a" * 20_001, "x" * 1_000_000, *JUNK[:2]),
    "frames": (0, -1, 10, 1e9, "many", 26, 1.5, True, 10**30, *JUNK),
    "height": (0, -96, 100, 1 << 40, "96px", True, *JUNK),
    "width": (0, 7, 16_400, "²", *JUNK[:2]),
    "fps": (0, -1, 1e-9, "fast", 1e308, *JUNK[:2]),
    "steps": (0, -3, 101, 1_000_000, "all", 2.5, *JUNK[:2]),
    "guidance": (-1, 1e9, "strong", *JUNK[:2]),
    "guidance_interval": ([1, 0], [0], "a b", [0, 2], [-1, 1], {"from": 0}),
    "seed": (-1, 2**62, "lucky", 1.5, *JUNK[:2]),
    "solver": ("runge-kutta", "", 5, *JUNK[:2]),
    "shift": (-1, 0, "x", 1e9),
    "step_cache": (-1, "x", 1e9),
    "negative_prompt": ("\0", 5, "x" * 20_001, *JUNK[:2]),
    "seconds": ("0", "-4", "long", "nan", "inf", "1e99", "3601", 4000, *JUNK[:2]),
    "size": ("1280x", "x", "128 x 96", "0x0", "-128x96", "100x100", "99999x99999", "1280X720", 5, *JUNK[:2]),
    "model": ("sora-2", "../builtin", "", 5, *JUNK[:2]),
    "lora": (*PATHS, "none-there", ":1", "a:b:c", 5, {"a": 1}, [["a"]]),
    "input_reference": (*PATHS, {"image_url": "http://127.0.0.1:1/x.png"}, {"file_id": "../x"}, *URLS),
    "image": PATHS[:3],
    "last_image": PATHS[:1],
    "video": PATHS[:1],
    "extend": (8, 100_000),
    "overlap": (9,),
    "output_path": PATHS[:2],
    "prompt ": ("a",),
    "__class__": ("a",),
    "n": (2,),
    "x" * 5_000: (1,),
}
IDS = (
    "video_",
    "video_0",
    "..",
    "%2e%2e",
    "..%2f..%2fetc%2fpasswd",
    "video_" + "0" * 32,
    "video_" + "A" * 32,
    "video_" + "0" * 31 + "%00",
    "video_" + "0" * 32 + "%2f..%2f..",
    "' OR 1=1 --",
    "a" * 5_000,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    (folder / "loras").mkdir()
    with app_of(folder / "data", loras=folder / "loras", max_upload=2) as app:
        yield TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture(autouse=True)
def emptied(client: TestClient) -> Iterator[None]:
    """What one test leaves behind is no fault of the next."""
    yield
    for video in client.get("/v1/videos?limit=100").json()["data"]:
        client.delete(f"/v1/videos/{video['id']}")


def refused(answer: Any, folder: Path) -> str:  # noqa: ANN401 (a response)
    """The message of an answer that refuses a request, which left nothing behind."""
    assert 400 <= answer.status_code < 500, answer.text
    message = answer.json()["error"]["message"]
    assert 5 < len(message) < 1000
    assert not list((folder / "data" / "jobs").iterdir())
    assert {one.name.partition(".")[0] for one in folder.iterdir()} == {"data", "loras"}
    return message


CASES = [(name, value) for name, values in FIELDS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{n[:20]}-{str(v)[:20]!a}" for n, v in CASES])
def test_fields(client: TestClient, folder: Path, name: str, value: object) -> None:
    fields = {"prompt": PROMPT, name: value}
    refused(client.post("/v1/videos", json=fields), folder)
    if isinstance(value, str | int | float):
        form = {key: (None, str(one).encode()) for key, one in fields.items()}
        answer = client.post("/v1/videos", files=form)
        if not (isinstance(value, int | float) and name in ("prompt", "negative_prompt")):  # text in a form
            refused(answer, folder)
        elif answer.status_code == 200:
            client.delete(f"/v1/videos/{answer.json()['id']}")


JSONS = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"7",
    b'"prompt"',
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": NaN}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"seed": ' + b"9" * 5_000 + b', "prompt": "a"}',
    b'{"seed": 1e999, "prompt": "a"}',
    b"[" * 100_000,
    b'{"a":' * 70 + b"1" + b"}" * 70,
    b'{"__proto__": {"prompt": "a"}}',
    b'\xef\xbb\xbf{"prompt": "a"}',
    '{"prompt": "a"}'.encode("utf-16"),
)


@pytest.mark.parametrize("body", JSONS, ids=[ascii(body[:20]) for body in JSONS])
def test_json(client: TestClient, folder: Path, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    refused(client.post("/v1/videos", content=body, headers=headers), folder)


PART = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
FILE = b'--x\r\nContent-Disposition: form-data; name="%b"; filename="%b"\r\n\r\n%b\r\n--x--\r\n'
FORMS = (
    b"",
    b"x",
    PART,
    b"--x",
    b"--x\r\n\r\n--x--\r\n",
    b"--y\r\n" + PART,
    b'--x\r\nContent-Disposition: form-data; name=prompt"\r\n\r\na\r\n--x--\r\n'[:40],
    b"--x\r\nContent-Disposition: nothing\r\n\r\na\r\n--x--\r\n",
    b"--x\r\n" + b"A: b\r\n" * 20_000,
    PART + PART + b"--x--\r\n",
    PART * 200 + b"--x--\r\n",
    FILE % (b"prompt", b"a.txt", b"a cat"),
    *(PART + FILE % (b"input_reference", name.encode(), b"no picture") for name in PATHS),
    PART + FILE % (b"input_reference", b"a.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 100),
    PART + FILE % (b"video", b"a.mp4", b"x"),
    PART + FILE % (b"one", b"a", b"x") + FILE % (b"two", b"b", b"y"),
)


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_forms(client: TestClient, folder: Path, number: int) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    refused(client.post("/v1/videos", content=FORMS[number], headers=headers), folder)


def drawn(kind: str, width: int, height: int, mode: str = "RGB") -> bytes:
    file = BytesIO()
    Image.new(mode, (width, height)).save(file, format=kind)
    return file.getvalue()


PICTURES = (
    (lambda: b"", "is not a picture of JPEG, PNG, WEBP"),
    (lambda: b"GIF89a" + b"\0" * 100, "is not a picture of JPEG, PNG, WEBP"),
    (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "is not a picture of JPEG, PNG, WEBP"),
    (lambda: drawn("BMP", 64, 64), "is not a picture of JPEG, PNG, WEBP"),
    (lambda: drawn("PNG", 1, 64), "has 1 x 64 pixels: a side needs 16 at least"),
    (lambda: drawn("JPEG", 64, 15), "has 64 x 15 pixels: a side needs 16 at least"),
    (lambda: drawn("PNG", 64, 64)[:-30], "cannot be read as a picture"),
    (lambda: drawn("JPEG", 64, 64)[:-200], "cannot be read as a picture"),
    (lambda: drawn("PNG", 10_000, 10_000, "1"), "has 10000 x 10000 pixels, at most 89,478,485 are read"),
    (lambda: drawn("PNG", 20_000, 20_000, "1"), "could be decompression bomb"),
)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("number", range(len(PICTURES)))
def test_pictures(client: TestClient, folder: Path, number: int) -> None:
    draw, said = PICTURES[number]
    content = draw()
    form = {"prompt": (None, PROMPT), "input_reference": ("a.png", content)}
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    body = {"prompt": PROMPT, "input_reference": {"image_url": url}}
    for answer in (client.post("/v1/videos", files=form), client.post("/v1/videos", json=body)):
        assert said in refused(answer, folder)
        assert answer.json()["error"]["param"] == "input_reference"


def test_a_picture_that_begins_with_a_picture(client: TestClient, folder: Path) -> None:
    form = {"prompt": (None, PROMPT), "frames": (None, "1"), "input_reference": drawn("PNG", 64, 64)}
    assert "cannot begin with another picture" in refused(client.post("/v1/videos", files=form), folder)


def zipped() -> bytes:
    """Megabytes that are kilobytes here."""
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"\0" * 10_000_000)
    return packed.getvalue()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "multipart/form-data"},
        {"Content-Type": "multipart/form-data; boundary="},
        {"Content-Type": "application/zip"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {"Content-Type": "é".encode("latin-1")},
    ],
)
def test_other_bodies(client: TestClient, folder: Path, headers: dict[str, Any]) -> None:
    refused(client.post("/v1/videos", content=zipped(), headers=headers), folder)


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
def test_too_large_bodies(client: TestClient, folder: Path, kind: str, told: bool) -> None:
    """Whether their length is told at first or not."""
    body = PART + FILE % (b"input_reference", b"a.png", b"x" * 3_000_000)
    parts = (body[start : start + 65_536] for start in range(0, len(body), 65_536))
    answer = client.post("/v1/videos", content=body if told else parts, headers={"Content-Type": kind})
    assert answer.status_code == 413
    assert refused(answer, folder) == "a request may have 2 MB"


@pytest.mark.parametrize("job_id", IDS, ids=[ascii(one[:20]) for one in IDS])
def test_ids(client: TestClient, folder: Path, job_id: str) -> None:
    for path in ("", "/content", "/content?variant=spritesheet", "/events"):
        refused(client.get(f"/v1/videos/{job_id}{path}"), folder)
    refused(client.delete(f"/v1/videos/{job_id}"), folder)
    refused(client.get("/v1/videos", params={"after": job_id}), folder)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/docs"),
        ("GET", "/v1/videos/../../etc/passwd"),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd"),
        ("GET", "/jobs.sqlite"),
        ("PUT", "/v1/videos"),
        ("PATCH", "/v1/videos/video_" + "0" * 32),
        ("DELETE", "/v1/videos"),
        ("POST", "/v1/videos/video_" + "0" * 32 + "/remix"),
        ("TRACE", "/v1/videos"),
    ],
)
def test_other_paths(client: TestClient, folder: Path, method: str, path: str) -> None:
    refused(client.request(method, path), folder)


def test_a_body_that_says_the_same_twice(client: TestClient, folder: Path) -> None:
    for fields in ({"size": "128x96", "width": 128}, {"seconds": "1", "frames": 9}):
        said = refused(client.post("/v1/videos", content=json.dumps({"prompt": "a", **fields}),
                                   headers={"Content-Type": "application/json"}), folder)  # fmt: skip
        assert "say the same: give one of them" in said
