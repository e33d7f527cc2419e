"""Changes of single values, written section.key=value: what every --set takes. The value is TOML or JSON, and
what is neither, such as a path, is text.
"""

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

from opensoraplan.documents import DocumentError, parse_json, parse_toml
from opensoraplan.names import did_you_mean
from opensoraplan.settings import Settings

# What stands for no value, which TOML cannot write otherwise.
NOTHING = ("none", "null")

Values = dict[str, Any]


def apply_changes(
    values: Mapping[str, Any], changes: Iterable[str], *, kind: type[Settings] | None = None
) -> Values:
    """`values` with the changes. `kind`: the settings that they are values of; without it a change must be
    of a section that `values` have.

    Raises ValueError, which names the change, for the first whose key is unknown.
    """
    changed = dict(values)
    for change in changes:
        new = parse_change(change)
        problems = [*kind.unknown_keys(new).values()] if kind else _missing_section(new, changed)
        if problems:
            raise ValueError(f"{change!r}: {'; '.join(problems)}")
        changed = merge(changed, new)
    return changed


def parse_change(change: str) -> Values:
    """A change as nested values: {"section": {"key": value}}. "none" and "null" are None."""
    name, equals, text = change.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"a change is written section.key=value, got {change!r}")
    if not text.strip():
        raise ValueError(f'{change!r} has no value: write none for nothing, "" for empty text')
    nested = _parse_value(text.strip())
    for key in reversed(keys):
        nested = {key: nested}
    return nested


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Values:
    """Tables key by key, anything else as `over` has it."""
    values = dict(base)
    for key, value in over.items():
        below = values.get(key)
        values[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return values


def replace_nothing(values: Mapping[str, Any]) -> Values:
    """None where "none" is written, as deep as tables go."""
    return {
        key: replace_nothing(value) if isinstance(value, dict) else None if _is_nothing(value) else value
        for key, value in values.items()
    }


def _missing_section(new: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """What to say of the first section of `new` that the values do not have, if there is one."""
    for name, inner in new.items():
        if not isinstance(inner, dict):
            continue
        known = [key for key, value in values.items() if isinstance(value, dict)]
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known) or 'none'}"
            return [f"there is no section {name!r}{hint}"]
        return _missing_section(inner, values[name])
    return []


def _parse_value(text: str) -> Any:  # noqa: ANN401 (a TOML or JSON value)
    if _is_nothing(text):
        return None
    try:
        content = replace_nothing(parse_toml(f"value = {text}", where=text))
    except DocumentError:
        try:
            return parse_json(text, where=text)
        except DocumentError:
            return text
    value = content["value"]
    return text if len(content) > 1 or isinstance(value, datetime.date | datetime.time) else value


def _is_nothing(value: object) -> bool:
    return isinstance(value, str) and value.lower() in NOTHING
