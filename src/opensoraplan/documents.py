"""Reads JSON and TOML files of users. Every error is a ValueError with the file, the reason and, where
possible, the line.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Largest file: settings and manifests are far smaller.
MAX_BYTES = 2 << 30
# Deepest nesting: no document of ours, the guide or transformers comes near it, so code may recurse.
MAX_DEPTH = 64
_STRING = r'"(?:\\.|[^"\\\n])*"'
_STRING_OR_COMMENT = re.compile(rf"{_STRING}|#[^\n]*")
_TOKEN = re.compile(rf"{_STRING}|[\[\]{{}}]|[-+.\w]+")
_TOML_PLACE = re.compile(r"(.*) \(at line (\d+), column (\d+)\)")
# Most digits of an integer, which is Python's own default.
_MAX_DIGITS = 4300


class DocumentError(ValueError):
    """A document that cannot be read. `reason`: what is wrong, without file and line."""

    def __init__(
        self, where: str, kind: str, reason: str, *, line: int | None = None, column: str = ""
    ) -> None:
        self.reason = f"not valid {kind}: {reason}{column and f' at column {column}'}"
        place = "" if line is None else f" in line {line}{column and f', column {column}'}"
        super().__init__(f"{where} is not valid {kind}: {reason}{place}")


def check_file(path: Path) -> None:
    """Raise ValueError unless `path` is a regular file: reading a pipe or a device might never end."""
    try:
        if path.is_file():
            return
        kind = "is a folder" if path.is_dir() else "is not a regular file"
        raise ValueError(f"{path} {kind if path.exists() else 'does not exist'}")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark. Raises ValueError for anything but a
    regular file, and for one that cannot be read or has another encoding.
    """
    check_file(path)
    try:
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
    """Read a JSON file. `comments`: allow `#` comments, which the guide's files have."""
    text = read_text(path)
    if comments:
        text = _STRING_OR_COMMENT.sub(lambda match: match[0] if match[0].startswith('"') else "", text)
    return parse_json(text, where=str(path))


def read_json_object(path: Path, *, comments: bool = False) -> dict[str, Any]:
    """Read a JSON file that must hold one object."""
    return as_object(read_json(path, comments=comments), where=str(path))


def as_object(content: Any, *, where: str) -> dict[str, Any]:  # noqa: ANN401 (any JSON value)
    """Return a JSON value that must be an object. Raises ValueError, starting with `where`, for any other."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold one JSON object, got {kind_of(content)}")
    return content


def parse_json(text: str, *, where: str, line: int = 1) -> Any:  # noqa: ANN401 (any JSON value)
    """Parse a JSON text that starts in `line` of `where`. Raises DocumentError for invalid JSON, and also for
    NaN and infinities, duplicate keys, and too long numbers or too deep nesting.
    """

    def wrong(reason: str, within: int | None, column: str = "") -> DocumentError:
        place = None if within is None else line + within - 1
        return DocumentError(where, "JSON", reason, line=place, column=column)

    if not text.strip():
        raise wrong("it is empty", None)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_refuse_duplicate_keys,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
        )
    except RecursionError:
        raise wrong("it is nested too deeply", _line_of_depth(text)) from None
    except json.JSONDecodeError as error:
        raise wrong(error.msg, error.lineno, str(error.colno)) from None
    except ValueError as error:
        raise wrong(_describe(error), _line_of_number(text)) from None
    if _is_deep(value):
        raise wrong("it is nested too deeply", _line_of_depth(text))
    return value


def read_shard_index(path: Path) -> dict[str, str]:
    """Read the map tensor -> file from a model's `*.index.json`. Raises ValueError for an invalid one, or one
    that names files outside of its folder.
    """
    weights = read_json_object(path).get("weight_map")
    if not isinstance(weights, dict):
        raise ValueError(f"{path} has no weight_map, which says in which file each tensor is")
    for tensor, name in weights.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: the file of {tensor} must be text, got {kind_of(name)}")
        if not name or name in (".", "..") or set(name) & set("/\\\0"):
            raise ValueError(f"{path} names a file outside of its folder, {name!r}: refused")
    return weights


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file."""
    return parse_toml(read_text(path), where=str(path))


def parse_toml(text: str, *, where: str) -> dict[str, Any]:
    """Parse a TOML text. Raises DocumentError for invalid TOML."""
    try:
        content = tomllib.loads(text)
    except RecursionError:
        raise DocumentError(where, "TOML", "it is nested too deeply", line=_line_of_depth(text)) from None
    except ValueError as error:
        if place := _TOML_PLACE.fullmatch(str(error)):
            raise DocumentError(where, "TOML", place[1], line=int(place[2]), column=place[3]) from None
        raise DocumentError(where, "TOML", _describe(error), line=_line_of_number(text)) from None
    if _is_deep(content):
        raise DocumentError(where, "TOML", "it is nested too deeply", line=_line_of_depth(text))
    return content


def kind_of(value: Any) -> str:  # noqa: ANN401 (any JSON value)
    """What a JSON value is, for messages."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r} is given twice")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _parse_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def _describe(error: ValueError) -> str:
    """Python's message, or a plain one for integers with too many digits."""
    return "an integer has too many digits" if "integer string conversion" in str(error) else str(error)


def _is_deep(content: Any) -> bool:  # noqa: ANN401 (any JSON value)
    """Whether lists and objects are nested more than MAX_DEPTH times."""
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    """Yield strings, brackets and words of a document with their lines."""
    line, end = 1, 0
    for match in _TOKEN.finditer(text):
        line, end = line + text.count("\n", end, match.start()), match.start()
        yield match[0], line


def _line_of_depth(text: str) -> int | None:
    depth = 0
    for token, line in _tokens(text):
        depth += (token in "[{") - (token in "]}")
        if depth > MAX_DEPTH:
            return line
    return None  # dotted keys of TOML


def _line_of_number(text: str) -> int | None:
    """The line of the first number that is too long or not finite, if there is one."""
    wrong = (line for token, line in _tokens(text) if not token.startswith('"') and _is_bad_number(token))
    return next(wrong, None)


def _is_bad_number(word: str) -> bool:
    if len(word) > _MAX_DIGITS:
        return True
    try:
        return not math.isfinite(float(word))
    except ValueError:
        return False
