"""Writes settings.md: every key of a run, its default and what it may be, from their own classes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opensoraplan.settings import Settings
from opensoraplan.train.config import TrainSettings, VAETrainSettings

PAGE = Path(__file__).parent / "settings.md"
HEAD = """\
# All settings of a run

Made by `python docs/make_settings.py` from the classes that read them; [training.md](training.md) tells how
they are used. `"none"` is no value. `[section]` heads a table of a TOML file, and `--set section.key=value`
sets one key.
"""


def page() -> str:
    """The whole of settings.md."""
    shown: set[type[Settings]] = set()
    parts = [HEAD, '## The denoiser: method = "flow"\n', *_tables(TrainSettings, shown)]
    parts += ['## The VAE: method = "vae"\n', *_tables(VAETrainSettings, shown)]
    return "\n".join(parts)


def _tables(kind: type[Settings], shown: set[type[Settings]], name: str = "") -> Iterator[str]:
    """A section's description and table, then those of the sections in it; each kind once."""
    if name:
        yield f"### [{name}]\n"
    if kind in shown:
        yield "As for osp train.\n"
        return
    shown.add(kind)
    yield _said(kind) + "\n"
    yield "| key | default | may be | |\n|---|---|---|---|"
    schema = kind.model_json_schema()
    sections: dict[str, type[Settings]] = {}
    for key, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            sections[key] = field.annotation
            continue
        default = "needed" if field.is_required() else f"`{_toml(field.default)}`"
        meaning = _in_toml(field.description)
        yield f"| `{key}` | {default} | {_values(schema['properties'][key])} | {meaning} |"
    yield ""
    for key, section in sections.items():
        yield from _tables(section, shown, f"{name}.{key}" if name else key)


def _said(kind: type[Settings]) -> str:
    """What its classes say of it, the most general one first."""
    classes = [one for one in reversed(kind.__mro__) if issubclass(one, Settings) and one is not Settings]
    return " ".join(_in_toml(one.__doc__) for one in classes)


def _in_toml(text: str | None) -> str:
    """A docstring on one line, with Python's None as these files have it."""
    return re.sub(r"\bNone\b", '`"none"`', " ".join((text or "").split()))


def _toml(value: object) -> str:
    match value:
        case None:
            return '"none"'
        case bool():
            return str(value).lower()
        case tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case str() | Path():
            return f'"{value}"'
    return str(value)


def _values(schema: dict[str, Any]) -> str:
    """What a JSON schema lets a value be, in words."""
    if "anyOf" in schema:
        return " or ".join(_values(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{_toml(value)}`" for value in schema.get("enum", [schema.get("const")]))
    match schema["type"]:
        case "array":
            items = schema.get("items") or schema["prefixItems"][0]
            count = f"{schema['maxItems']} of: " if "maxItems" in schema else "list of: "
            return count + _values(items)
        case "string":
            return "path" if schema.get("format") == "path" else "text"
        case "integer" | "number" as kind:
            return ("whole number" if kind == "integer" else "number") + _bounds(schema)
        case "boolean":
            return "`true`, `false`"
    return "table"


def _bounds(schema: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return f" {', '.join(bounds)}" if bounds else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
