"""Settings that a user writes, and files of our own format: frozen, with unknown keys as errors that name the
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

# Of a message: faults that are named, and characters of a value.
_NAMED, _SHOWN = 5, 80
# What pydantic says of classes, which no user knows.
_CLASS = re.compile(r" or instance of \w+$")


class Settings(BaseModel):
    """Base of every settings model. Numbers are finite, and neither true nor false is one. `read` instead of
    the constructor gives messages for users.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what pydantic takes for 0 or 1."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, bool) for one in values) and not _may_be_bool(annotation):
            raise ValueError("true or false is given for a number or text")
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
                places.setdefault(_located(cls, problem["loc"]), []).append(problem)
            problems = [_explain(cls, *place, found) for place, found in places.items()]
            more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
            raise ValueError(f"{where}: " + "; ".join(problems[:_NAMED]) + more) from None

    @classmethod
    def unknown_keys(cls, values: Mapping[str, Any], *, also: Sequence[str] = ()) -> dict[str, str]:
        """The keys of a mapping, as a user writes them, that these settings do not have, and what to say of
        each. Values are not looked at, and keys may be missing. `also`: names to suggest besides.
        """
        try:
            cls.model_validate(dict(values))
        except ValidationError as error:
            problems = [problem for problem in error.errors() if problem["type"] == "extra_forbidden"]
            places = [_located(cls, problem["loc"]) for problem in problems]
            return {_dotted(place): _unknown_key(cls, section, place, also) for section, place in places}
        return {}

    @classmethod
    def sections(cls, before: str = "") -> Iterator[tuple[str, list[str]]]:
        """The keys of these settings and of each section in them, whose name ends in a dot."""
        yield before, list(cls.model_fields)
        for key, field in cls.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
                yield from field.annotation.sections(f"{before}{key}.")

    @classmethod
    def read_file(cls, path: Path) -> Self:
        """Settings from a JSON file that holds one object of them. Raises ValueError for anything else."""
        return cls.read(read_json_object(path), where=str(path))


def _located(model: type[BaseModel], location: tuple[Any, ...]) -> tuple[type[BaseModel], tuple[Any, ...]]:
    """The section that a key is in, and the whole key as a user writes it: where a field has several types,
    pydantic's own location goes on with the one that was tried.
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
    """What is wrong at one place: one problem, or one with each type that a field may have."""
    name, first = _dotted(location), problems[0]
    if first["type"] == "extra_forbidden":
        return _unknown_key(model, section, location)
    messages = [_CLASS.sub("", problem["msg"].removeprefix("Value error, ")) for problem in problems]
    message = " or ".join([messages[0], *(text.removeprefix("Input should be ") for text in messages[1:])])
    # What contradicts itself in a section is in the message; the whole section would bury it.
    silent = first["type"] == "missing" or isinstance(first["input"], Mapping)
    got = "" if silent else f", got {shown(first['input'])}"
    return f"{name}: {message}{got}" if name else message


def _unknown_key(
    model: type[Settings], section: type[BaseModel], location: tuple[Any, ...], also: Sequence[str] = ()
) -> str:
    """A key that is unknown, with the section of the model that has it, or the nearest of its own section."""
    key = str(location[-1])
    elsewhere = next((f"{before}{key}" for before, keys in model.sections() if key in keys), None)
    if elsewhere is not None:
        return f"unknown key {_dotted(location)!r} (did you mean {elsewhere!r}?)"
    known = [*section.model_fields, *([] if location[:-1] else also)]
    return f"unknown key {_dotted(location)!r}{did_you_mean(key, known)}"


def _dotted(location: tuple[Any, ...]) -> str:
    return ".".join(map(str, location))


def shown(value: Any) -> str:  # noqa: ANN401 (whatever is given)
    """A value as Python writes it, cut to fit a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a {type(value).__name__} that is too large to show"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _may_be_bool(annotation: Any) -> bool:  # noqa: ANN401 (any type there is)
    """Whether a field of this type takes true or false, or is a model, whose own fields are checked."""
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
