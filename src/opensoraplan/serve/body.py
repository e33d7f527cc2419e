"""The body of a request for a video, multipart or JSON, as a `Request`. Its fields are OpenAI's `model`,
`seconds`, `size` and `input_reference`, and those of `Request` that name no file.
"""

import math
import re
import secrets
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from starlette.datastructures import UploadFile
from starlette.requests import Request as HttpRequest

from opensoraplan.documents import as_object, parse_json
from opensoraplan.names import did_you_mean
from opensoraplan.requests import Request
from opensoraplan.serve.artefacts import PICTURE
from opensoraplan.serve.errors import ApiError
from opensoraplan.serve.loras import check_names
from opensoraplan.serve.reference import FIELD
from opensoraplan.serve.settings import ServeSettings
from opensoraplan.shapes import TEMPORAL_STRIDE

# Text of a request that is no file's name. Any other field of a `Request` with text might be a path of this
# machine.
_TEXTS = ("prompt", "negative_prompt")
# Of videos that go on and on, which the server does not make.
_OF_EXTENSION = ("overlap", "extend")
# Fields that are not those of a `Request`, or mean something else.
_OWN = ("model", "seconds", "size", FIELD, "lora")
# Most characters of a prompt, and fields of a form.
MOST_CHARACTERS, _MOST_FIELDS = 20_000, 100
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
# The key that a message of `Request.read` is about.
_PARAM = re.compile(r"^the request: (?:unknown key ')?(\w+)")


def client_fields() -> frozenset[str]:
    """The fields of a `Request` that clients set by themselves: numbers, switches and words of a list, and
    text that names no file.
    """
    fields = {name: one for name, one in Request.model_fields.items() if name not in _OF_EXTENSION}
    return frozenset(name for name, one in fields.items() if name in _TEXTS or _is_harmless(one.annotation))


def _is_harmless(kind: Any) -> bool:  # noqa: ANN401 (any type there is)
    """Whether values of a type can be no path."""
    if get_origin(kind) in (Union, types.UnionType, tuple):
        return all(_is_harmless(part) for part in get_args(kind))
    return get_origin(kind) is Literal or kind in (int, float, bool, type(None))


async def read_body(request: HttpRequest) -> dict[str, Any]:
    """The fields of a body; an uploaded file is bytes. Raises ApiError for one that cannot be read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            text = (await request.body()).decode()
            fields = as_object(parse_json(text, where="the body"), where="the body")
        except ValueError as error:
            raise ApiError(400, f"{error}") from None
        return {name: value for name, value in fields.items() if value is not None}
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        message = f"the body is multipart/form-data or application/json, got {kind or 'no content type'}"
        raise ApiError(415, message)
    fields = {}
    async with request.form(max_files=1, max_fields=_MOST_FIELDS) as form:
        for name in form:
            values = [await one.read() if isinstance(one, UploadFile) else one for one in form.getlist(name)]
            if len(values) > 1 and name != "lora":
                raise ApiError(400, f"{name} is given {len(values)} times", param=name)
            fields[name] = values if name == "lora" else values[0]
    return fields


def read_request(
    fields: Mapping[str, Any],
    settings: ServeSettings,
    *,
    loras: dict[str, Path],
    broken_loras: dict[str, str],
) -> Request:
    """The request of a body's fields, with LoRAs by name; the picture is checked elsewhere. Raises ApiError,
    which names the field that is wrong.
    """
    _check_fields(fields)
    if fields.get("model", settings.model_id) != settings.model_id:
        message = f"this server has the model {settings.model_id!r}, not {fields['model']!r}"
        raise ApiError(400, message, param="model")
    own = {name: value for name, value in fields.items() if name not in _OWN}
    defaults = settings.defaults()
    values = {**defaults, **own, **_size_of(fields), **_frames_of(fields, defaults)}
    values.setdefault("seed", secrets.randbelow(2**31))
    if FIELD in fields:
        values["image"] = PICTURE
    if "lora" in fields:
        values["lora"] = _loras_of(fields["lora"], loras, broken_loras)
    try:
        request = Request.read(values, where="the request")
    except ValueError as error:
        named = _PARAM.match(str(error))
        param = named[1] if named and named[1] in Request.model_fields else None
        raise ApiError(400, str(error), param=param) from None
    if request.steps > settings.max_steps:
        message = f"steps: this server makes at most {settings.max_steps}, got {request.steps}"
        raise ApiError(400, message, param="steps")
    return request


def _check_fields(fields: Mapping[str, Any]) -> None:
    known = {*client_fields(), *_OWN}
    for name, value in fields.items():
        if name not in known:
            if name in _OF_EXTENSION:
                raise ApiError(400, f"{name}: this server does not extend videos", param=name)
            if name in Request.model_fields:
                raise ApiError(400, f"{name}: a client cannot name files of the server", param=name)
            raise ApiError(
                400, f"there is no field {name[:80]!r}{did_you_mean(name[:80], known)}", param=name[:80]
            )
        if isinstance(value, bytes) and name != FIELD:
            raise ApiError(400, f"{name} is a value, not a file", param=name)
        if isinstance(value, str) and len(value) > MOST_CHARACTERS:
            message = f"{name} has {len(value):,} characters, at most {MOST_CHARACTERS:,} are allowed"
            raise ApiError(400, message, param=name)


def _size_of(fields: Mapping[str, Any]) -> dict[str, int]:
    """Width and height of OpenAI's `size`."""
    if "size" not in fields:
        return {}
    if clash := [name for name in ("width", "height") if name in fields]:
        raise ApiError(400, f"size and {clash[0]} say the same: give one of them", param="size")
    match = _SIZE.fullmatch(str(fields["size"]))
    if match is None:
        raise ApiError(400, f"size is WIDTHxHEIGHT, as in 1024x576, got {fields['size']!r}", param="size")
    return {"width": int(match[1]), "height": int(match[2])}


def _frames_of(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, int]:
    """The number of frames nearest to OpenAI's `seconds`."""
    if "seconds" not in fields:
        return {}
    if "frames" in fields:
        raise ApiError(400, "seconds and frames say the same: give one of them", param="seconds")
    fps = fields.get("fps", defaults.get("fps", Request.model_fields["fps"].default))
    try:
        seconds, rate = float(fields["seconds"]), float(fps)
    except (TypeError, ValueError):
        seconds = rate = math.nan
    if not (0 < seconds <= 3600 and 0 < rate <= 1000):
        message = f"seconds is a number up to 3600, got {fields['seconds']!r} at fps {fps!r}"
        raise ApiError(400, message, param="seconds")
    return {"frames": round(seconds * rate / TEMPORAL_STRIDE) * TEMPORAL_STRIDE + 1}


def _loras_of(given: Any, loras: dict[str, Path], broken: dict[str, str]) -> list[str]:  # noqa: ANN401 (a value)
    wanted = given.split() if isinstance(given, str) else given
    if isinstance(wanted, list) and all(isinstance(one, str) for one in wanted):
        wanted = [name for one in wanted for name in one.split()]
        try:
            check_names(wanted, loras, broken)
        except ValueError as error:
            raise ApiError(400, str(error), param="lora") from None
        return wanted
    raise ApiError(400, f"lora is a list of NAME or NAME:STRENGTH, got {str(given)[:80]}", param="lora")
