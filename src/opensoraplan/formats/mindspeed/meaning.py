"""What the keys of the guide's JSON files mean, as marks on the fields of table.py: a setting, or nothing and
why. A field without a mark has a fixed value. And files that are read by such a table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

from opensoraplan.data.selection import SelectionSettings
from opensoraplan.settings import Settings


@dataclass(frozen=True)
class Same:
    """All keys of one subject have one value. `left_out`: what a key stands for that is left out, if
    that decides something.
    """

    subject: str
    left_out: Any = None
    remedy: str = "make them equal"


@dataclass(frozen=True)
class To(Same):
    """The key is our setting of the name `subject`, by `convert`; keys of one setting have one value."""

    convert: Callable[[Any], Any] | None = None
    inner: str = ""
    """Of a section: the key in it that is the setting."""
    agree: bool = True
    """If not, the first of the setting's keys with a value goes before the others."""
    default: bool = True
    """Whether the key gives its default if it is left out."""


@dataclass(frozen=True)
class Idle:
    """The key is read and changes nothing."""

    reason: str


@dataclass(frozen=True)
class Own:
    """The key has code of its own, which does `what`."""

    what: str


Meaning = Same | Idle | Own


def find_rows(table: type[Settings], before: str = "") -> Iterator[tuple[str, Meaning | None]]:
    """Each key, with its sections, and what it means; None for one with a fixed value. A field that is marked
    with a dict is a section that models/original.py checks; the dict has its keys that mean more.
    """
    for name, field in table.model_fields.items():
        key, kind = before + name, field.annotation
        rows: list[tuple[str, Meaning | None]] = []
        for mark in field.metadata:
            if isinstance(mark, dict):
                rows += [(f"{key}.{inner}", meaning) for inner, meaning in mark.items()]
            elif isinstance(mark, Meaning):
                inner = isinstance(mark, To) and mark.inner
                rows.append((f"{key}.{inner}" if inner else key, mark))
        if isinstance(kind, type) and issubclass(kind, Settings):
            known = {row[0] for row in rows}
            rows += [row for row in find_rows(kind, f"{key}.") if row[0] not in known]
        elif not rows and name in SelectionSettings.model_fields and issubclass(table, SelectionSettings):
            rows.append((key, To(f"data.selection.{name}", default=False)))
        yield from rows or [(key, None)]


File = TypeVar("File", bound=Settings)


class Document(Generic[File]):
    """A file by its table: `content` as it is written, `file` checked, `values` of it with defaults."""

    def __init__(self, table: type[File], content: dict[str, Any], path: Path) -> None:
        self.path, self.content = path, content
        self.file = table.read(content, where=str(path))
        self.values = self.file.model_dump()
        self.given = self.file.model_dump(exclude_unset=True)
        self.rows = [(key, meaning) for key, meaning in find_rows(table) if meaning]

    def get(self, key: str) -> Any:  # noqa: ANN401 (a JSON value)
        """The value as it is written; None if there is none."""
        return _find(self.content, key)

    def has(self, key: str) -> bool:
        section, _, name = key.rpartition(".")
        inside = _find(self.given, section) if section else self.given
        return isinstance(inside, dict) and name in inside

    def name(self, key: str) -> str:
        return f"{key} in {self.path}"

    def tell(self, key: str) -> str:
        return f"{self.name(key)} is {self.get(key)!r}"

    def note(self, keys: list[str], reason: str) -> list[str]:
        """At most one note, of those of the keys that are there."""
        given = ", ".join(key for key in keys if self.has(key))
        return [f"{self.path.name}: without meaning here: {given} ({reason})"] if given else []

    def idle_notes(self) -> list[str]:
        """The notes of all keys that change nothing, one for each reason."""
        reasons: dict[str, list[str]] = {}
        for key, meaning in self.rows:
            if isinstance(meaning, Idle):
                reasons.setdefault(meaning.reason, []).append(key)
        return [note for reason, keys in reasons.items() for note in self.note(keys, reason)]


def _group(documents: tuple[Document, ...]) -> Iterator[tuple[str, list[tuple[Document, str, Same]]]]:
    """Each subject with its keys, in the order of files and tables."""
    groups: dict[str, list[tuple[Document, str, Same]]] = {}
    for document in documents:
        for key, meaning in document.rows:
            if isinstance(meaning, Same):
                groups.setdefault(meaning.subject, []).append((document, key, meaning))
    yield from groups.items()


def translate(*documents: Document) -> dict[str, Any]:
    """Our settings, in their sections; None where no key says anything."""
    settings: dict[str, Any] = {}
    for subject, group in _group(documents):
        given: list[Any] = []
        usual: list[Any] = []
        for document, key, meaning in group:
            if isinstance(meaning, To) and (document.has(key) or meaning.default):
                value = _find(document.values, key)
                converted = value if value is None or meaning.convert is None else meaning.convert(value)
                (given if document.has(key) else usual).append(converted)
        if given or usual:
            *sections, name = subject.split(".")
            inside = settings
            for section in sections:
                inside = inside.setdefault(section, {})
            inside[name] = next((value for value in [*given, *usual] if value is not None), None)
    return settings


def find_contradictions(*documents: Document) -> list[str]:
    """What to say of each subject that keys give different values."""
    problems: list[str] = []
    for _, group in _group(documents):
        places = [place for place in group if not isinstance(place[2], To) or place[2].agree]
        told = {document.tell(key): document.get(key) for document, key, _ in places if document.has(key)}
        left_out = next((same.left_out for _, _, same in places if same.left_out is not None), None)
        if told and left_out is not None:
            without = [document.name(key) for document, key, _ in places if not document.has(key)]
            told |= {f"{name} is left out": left_out for name in without}
        if any(value != other for value, other in pairwise(told.values())):
            problems.append(f"{', '.join(told)}: {places[0][2].remedy}")
    return problems


def _find(values: Any, key: str) -> Any:  # noqa: ANN401 (a JSON value)
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
