"""Settings that a user writes: frozen, with unknown keys as errors that name the nearest known one."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Base of every settings model. `read` instead of the constructor gives messages for users."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def read(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """Settings from a mapping; raises one ValueError that names every key of `where` that is wrong and
        why.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            problems = [_explain(cls, problem) for problem in error.errors()]
            raise ValueError(f"{where}: " + "; ".join(problems)) from None

    @classmethod
    def read_file(cls, path: Path) -> Self:
        """Settings from a JSON file that `model_dump_json` wrote. Raises ValueError for anything else."""
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        return cls.read(values, where=str(path))


def _explain(model: type[BaseModel], problem: Any) -> str:  # noqa: ANN401 (pydantic's own dict of details)
    *parents, key = problem["loc"] or ("",)
    for parent in parents:
        inner = model.model_fields[parent].annotation if parent in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    name = ".".join(str(part) for part in (*parents, key))
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(key), list(model.model_fields), n=1)
        return f"unknown key {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
    message = problem["msg"].removeprefix("Value error, ")
    # What contradicts itself in a section is in the message; the whole section would bury it.
    silent = problem["type"] == "missing" or isinstance(problem["input"], Mapping)
    got = "" if silent else f", got {problem['input']!r}"
    return f"{name}: {message}{got}" if name else message
