"""Base class of settings and of our own JSON files: frozen models, whose errors for unknown keys name the
nearest known one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from opensoraplan.documents import read_json_object
from opensoraplan.names import did_you_mean

# Most faults that a message names, and most characters of a value that it shows.
_NAMED, _SHOWN = 5, 80
# Part of pydantic's messages that names classes, which users do not know.
_CLASS = re.compile(r" or instance of \w+$")


class Settings(BaseModel):
    """Base class of all settings. Numbers must be finite, and true and false are not numbers. Use `read`
    instead of the constructor for messages that users understand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bools(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and false where pydantic would read them as 1 and 0."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, bool) for one in values) and not _may_be_bool(annotation):
            raise ValueError("true and false are neither numbers nor text")
        return value

    @classmethod
    def read(
        cls, values: Mapping[str, Any], *, where: str, strict: bool = False, context: object = None
    ) -> Self:
        """Settings from a mapping; raises one ValueError that names the keys of `where` that are wrong, five
        at most, and why. `strict`: numbers that are written as text are wrong, too. `context`: what a model's
        own checks ask for.
        """
        try:
            return cls.model_validate(dict(values), strict=strict or None, context=context)
        except ValidationError as error:
            places: dict[tuple[type[BaseModel], tuple[Any, ...]], list[Any]] = {}
            for problem in error.errors():
                places.setdefault(_find_section(cls, problem["loc"]), []).append(problem)
            problems = [_explain(cls, *place, found) for place, found in places.items()]
            more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
            raise ValueError(f"{where}: " + "; ".join(problems[:_NAMED]) + more) from None

    @classmethod
    def unknown_keys(cls, values: Mapping[str, Any], *, also: Sequence[str] = ()) -> dict[str, str]:
        """The keys of a mapping that these settings do not have, each with a message. Values are not checked,
        and keys may be missing. `also`: further names to suggest.
        """
        try:
            cls.model_validate(dict(values))
        except ValidationError as error:
            problems = [problem for problem in error.errors() if problem["type"] == "extra_forbidden"]
            places = [_find_section(cls, problem["loc"]) for problem in problems]
            return {_join_keys(place): _unknown_key(cls, section, place, also) for section, place in places}
        return {}

    @classmethod
    def sections(cls, before: str = "") -> Iterator[tuple[str, list[str]]]:
        """Yield each section, as a prefix ending in a dot, with its keys; the
        prefix of the top level is "".
        """
        yield before, list(cls.model_fields)
        for key, field in cls.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
                yield from field.annotation.sections(f"{before}{key}.")

    @classmethod
    def read_file(cls, path: Path) -> Self:
        """Read settings from a JSON file with one object. Raises ValueError for anything else."""
        return cls.read(read_json_object(path), where=str(path))


def _find_section(
    model: type[BaseModel], location: tuple[Any, ...]
) -> tuple[type[BaseModel], tuple[Any, ...]]:
    """The section that a key is in, and its full path as a user writes it. For a field with several types,
    pydantic's location also has the type that it tried.
    """
    for depth, part in enumerate(location[:-1]):
        if isinstance(part, int):
            continue  # an entry of a list
        kinds = _kinds(model.model_fields[part].annotation) if part in model.model_fields else []
        if len(kinds) == 1 and get_origin(kinds[0]) is list:
            kinds = list(get_args(kinds[0]))
        if len(kinds) > 1:
            return model, location[: depth + 1]
        if not kinds or not (isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel)):
            break
        model = kinds[0]
    return model, location


def _explain(
    model: type[Settings], section: type[BaseModel], location: tuple[Any, ...], problems: list[Any]
) -> str:
    """The message for one key: one problem, or one for each type that the field may have."""
    name, first = _join_keys(location), problems[0]
    if first["type"] == "extra_forbidden":
        return _unknown_key(model, section, location)
    messages = [_CLASS.sub("", problem["msg"].removeprefix("Value error, ")) for problem in problems]
    message = " or ".join([messages[0], *(text.removeprefix("Input should be ") for text in messages[1:])])
    # For a contradiction within a section, the message has the values; the whole section would be too long.
    silent = first["type"] == "missing" or isinstance(first["input"], Mapping)
    got = "" if silent else f", got {shown(first['input'])}"
    return f"{name}: {message}{got}" if name else message


def _unknown_key(
    model: type[Settings], section: type[BaseModel], location: tuple[Any, ...], also: Sequence[str] = ()
) -> str:
    """The message for an unknown key: suggests the section that has it, or the nearest key of its section."""
    key = str(location[-1])
    elsewhere = next((f"{before}{key}" for before, keys in model.sections() if key in keys), None)
    if elsewhere is not None:
        return f"unknown key {_join_keys(location)!r} (did you mean {elsewhere!r}?)"
    known = [*section.model_fields, *([] if location[:-1] else also)]
    return f"unknown key {_join_keys(location)!r}{did_you_mean(key, known)}"


def _join_keys(location: tuple[Any, ...]) -> str:
    return ".".join(map(str, location))


def shown(value: Any) -> str:  # noqa: ANN401 (whatever is given)
    """A value as Python writes it, shortened for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _may_be_bool(annotation: Any) -> bool:  # noqa: ANN401 (any type there is)
    """Whether a field of this type may be true or false, or is a model, which checks its own fields."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return (
        annotation in (bool, object, Any)
        or isinstance(annotation, bool)
        or any(_may_be_bool(part) for part in get_args(annotation))
    )


def _kinds(annotation: Any) -> list[Any]:  # noqa: ANN401 (any type there is)
    """The alternatives of a field's type, without None."""
    union = get_origin(annotation) in (Union, UnionType)
    return [kind for kind in get_args(annotation) if kind is not type(None)] if union else [annotation]
