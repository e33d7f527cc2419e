"""JSON and TOML from outside, read in one place. Every fault is one ValueError with the file and, where the
parser tells it, the line.
"""

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

# Larger files are no settings or manifests, and would fill memory.
MAX_BYTES = 2 << 30
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|#[^\n]*')


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises ValueError for what is not a regular
    file, cannot be read or is in another encoding.
    """
    try:
        if not path.is_file():
            kind = "is not a file" if path.exists() else "does not exist"
            raise ValueError(f"{path} {kind}")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{path} has {size / 1e9:.1f} GB: text files of more than 2 GB are not read")
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} is not UTF-8: {error.reason} in line {line}") from None


def read_json(path: Path, *, comments: bool = False) -> Any:  # noqa: ANN401 (any JSON value)
    """The value of a JSON file. `comments`: it may have `#` comments, as the guide's files have."""
    text = read_text(path)
    if comments:
        text = _STRING_OR_COMMENT.sub(lambda match: match[0] if match[0].startswith('"') else "", text)
    return parse_json(text, where=str(path))


def read_json_object(path: Path, *, comments: bool = False) -> dict[str, Any]:
    """The same for a file that must hold one JSON object."""
    content = read_json(path, comments=comments)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, got {_kind(content)}")
    return content


def parse_json(text: str, *, where: str) -> Any:  # noqa: ANN401 (any JSON value)
    """The value of a JSON text. Raises ValueError, which begins with `where`, for text that is not JSON: NaN
    and infinities, keys that are there twice, numbers and nesting beyond reason included.
    """
    if not text.strip():
        raise ValueError(f"{where} is not valid JSON: it is empty")
    try:
        return json.loads(
            text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {_short(error)}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file."""
    return parse_toml(read_text(path), where=str(path))


def parse_toml(text: str, *, where: str) -> dict[str, Any]:
    """The content of a TOML text. Raises ValueError, which begins with `where`, for text that is not TOML."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is not valid TOML: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not valid TOML: {_short(error)}") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def _short(error: ValueError) -> str:
    """What Python says, in the words of users for integers beyond its limit of digits."""
    return "an integer has too many digits" if "integer string conversion" in str(error) else str(error)


def _kind(value: Any) -> str:  # noqa: ANN401 (any JSON value)
    """What a JSON value is, for messages."""
    kinds = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
