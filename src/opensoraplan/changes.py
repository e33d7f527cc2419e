"""Changes of single values, section.key=value, as every --set takes them. The value is TOML or JSON; anything
else, such as a path, is text.
"""

import datetime
from collections.abc import Iterable, Mapping
from typing import Any

from opensoraplan.documents import DocumentError, parse_json, parse_toml
from opensoraplan.names import did_you_mean
from opensoraplan.settings import Settings

# Words for None, which TOML lacks.
NONE_WORDS = ("none", "null")

Values = dict[str, Any]


def apply_changes(
    values: Mapping[str, Any], changes: Iterable[str], *, kind: type[Settings] | None = None
) -> Values:
    """Apply changes to `values`. `kind`: the settings class, which knows the keys; without it, a change must
    be in a section that `values` has.

    Raises ValueError for the first change whose key is unknown.
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
    """Parse a change to nested values, {"section": {"key": value}}. "none" and "null" are None."""
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
    """Merge tables key by key; other values of `over` replace those of `base`."""
    values = dict(base)
    for key, value in over.items():
        below = values.get(key)
        values[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return values


def replace_none_words(values: Mapping[str, Any]) -> Values:
    """Replace "none" and "null" by None in all tables."""
    return {
        key: replace_none_words(value) if isinstance(value, dict) else None if _is_none_word(value) else value
        for key, value in values.items()
    }


def _missing_section(new: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """A message for the first section of `new` that `values` does not have, if there is one."""
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
    if _is_none_word(text):
        return None
    try:
        content = replace_none_words(parse_toml(f"value = {text}", where=text))
    except DocumentError:
        try:
            return parse_json(text, where=text)
        except DocumentError:
            return text
    value = content["value"]
    return text if len(content) > 1 or isinstance(value, datetime.date | datetime.time) else value


def _is_none_word(value: object) -> bool:
    return isinstance(value, str) and value.lower() in NONE_WORDS
