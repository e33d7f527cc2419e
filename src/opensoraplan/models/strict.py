"""Configs and weights that are taken whole or not at all: unknown keys, missing or mis-shaped
tensors are errors.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import Field, create_model

from opensoraplan.documents import read_json_object, read_shard_index
from opensoraplan.names import did_you_mean
from opensoraplan.settings import Settings

TensorShape = tuple[int, ...]

# What constructors declare. The bounds are far beyond any model that there is, and keep a file from asking
# for one that no machine can build.
Whole = Annotated[int, Field(strict=True, ge=1, le=65_536)]
Depth = Annotated[int, Field(strict=True, ge=1, le=128)]
Depths = Annotated[Sequence[Depth], Field(min_length=1, max_length=15)]
Rates = Annotated[Sequence[Whole], Field(min_length=1, max_length=15)]
Epsilon = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]
Numbers = Sequence[Annotated[float, Field(strict=True, allow_inf_nan=False)]]
PositiveNumbers = Sequence[Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]]


class StrictMixin:
    """Comes before ModelMixin and ConfigMixin: a diffusers model that is loaded whole or not at all.

    diffusers only warns of config keys that the constructor does not take, of tensors that are missing (they
    stay without values) and of tensors that have no place; here each raises ValueError.
    """

    config_name = "config.json"

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:  # noqa: ANN401
        given = {
            key: value
            for key, value in config_dict.items()
            if not key.startswith("_") and key != "quantization_config"
        }
        cls.check_config(given, where=f"the config of {cls.__name__}")
        return super().extract_init_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, path: Any, *, output_loading_info: bool = False, **kwargs: Any) -> Any:  # noqa: ANN401
        """As in diffusers, but ValueError that names every tensor that is missing or has no place, and every
        JSON file that is damaged.
        """
        folder = Path(path, kwargs.get("subfolder") or "")
        for file in folder.glob("*.json"):
            read_shard_index(file) if file.name.endswith(".index.json") else read_json_object(file)
        model, info = super().from_pretrained(path, output_loading_info=True, **kwargs)  # type: ignore[misc]
        problems = [f"missing {name}" for name in info["missing_keys"]]
        problems += [f"unexpected {name}" for name in info["unexpected_keys"]]
        if problems:
            raise ValueError(f"the weights in {path} do not fit its config:\n  " + "\n  ".join(problems))
        return (model, info) if output_loading_info else model

    @classmethod
    def check_config(cls, config: Mapping[str, Any], *, where: str) -> None:
        """Raise ValueError, which begins with `where`, naming each key of `config` that the constructor does
        not take, and each value that is not of the type and within the bounds that it declares.
        """
        arguments = _arguments_of(cls)
        check_known_keys(config, arguments.model_fields, where=where)
        arguments.read(config, where=where)


@cache
def _arguments_of(model: type) -> type[Settings]:
    """The arguments of a model's constructor, as settings."""
    hints = get_type_hints(model.__init__, include_extras=True)
    parameters = signature(model.__init__).parameters.values()
    fields: dict[str, Any] = {p.name: (hints[p.name], p.default) for p in parameters if p.name != "self"}
    return create_model(model.__name__, __base__=Settings, **fields)


@contextmanager
def name_wrong_types(where: str) -> Iterator[None]:
    """Turn a constructor's TypeError for a value of the wrong type into a ValueError that names `where`."""
    try:
        yield
    except TypeError as error:
        raise ValueError(f"{where} has a value of the wrong type: {error}") from None


def check_known_keys(given: Iterable[str], known: Iterable[str], *, where: str) -> None:
    """Raise ValueError naming each key of `given` that is not in `known`, with the nearest that is."""
    known = sorted(known)
    problems = []
    for key in given:
        if key not in known:
            problems.append(f"{key!r}{did_you_mean(key, known)}")
    if problems:
        raise ValueError(f"unknown key in {where}: {', '.join(problems)}")


def check_tensors(
    expected: Mapping[str, TensorShape], given: Mapping[str, TensorShape], *, what: str
) -> None:
    """Raise ValueError naming every tensor of `given` that is missing, unexpected or of another shape."""
    lines = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in given]
    lines += [f"unexpected {name} {list(shape)}" for name, shape in given.items() if name not in expected]
    lines += [
        f"{name} is {list(given[name])}, the config needs {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    if lines:
        count = "1 tensor does" if len(lines) == 1 else f"{len(lines)} tensors do"
        raise ValueError(f"{count} not fit {what}:\n  " + "\n  ".join(lines))


def plain_config(model: Any) -> dict[str, Any]:  # noqa: ANN401 (any model with a diffusers config)
    """A model's config as its constructor's arguments, without what diffusers adds."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}
