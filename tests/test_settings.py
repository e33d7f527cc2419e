"""Settings that a user writes: unknown keys and wrong values are told by name."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, field_validator, model_validator

from opensoraplan.settings import Settings


class Inner(Settings):
    depth: int = Field(default=2, ge=1)
    names: tuple[str, ...] = ()


class Span(Settings):
    low: int = 0
    high: int = 9

    @model_validator(mode="after")
    def _check(self) -> "Span":
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Outer(Settings):
    size: int
    rate: float = 0.5
    inner: Inner = Inner()
    other: Inner | None = None
    span: Span = Span()
    mode: Literal["fast"] | Annotated[float, Field(gt=0)] | None = None

    @field_validator("rate")
    @classmethod
    def _check_rate(cls, rate: float) -> float:
        if rate > 1:
            raise ValueError(f"the rate is at most 1, not {rate:g}")
        return rate


def test_values() -> None:
    settings = Outer.read({"size": 3, "inner": {"depth": 4, "names": ["a", "b"]}}, where="run.toml")
    assert settings == Outer(size=3, inner=Inner(depth=4, names=("a", "b")))
    with pytest.raises(ValueError, match="frozen"):
        settings.size = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"size": 3, "sise": 4}, "run.toml: unknown key 'sise' (did you mean 'size'?)"),
        ({"size": 3, "qqqq": 4}, "run.toml: unknown key 'qqqq'"),
        (
            {"size": 3, "inner": {"dept": 4}},
            "run.toml: unknown key 'inner.dept' (did you mean 'depth'?)",
        ),
        ({}, "run.toml: size: Field required"),
        ({"size": 3, "rate": 2}, "run.toml: rate: the rate is at most 1, not 2, got 2"),
        (
            {"size": 3, "inner": {"depth": 0}},
            "run.toml: inner.depth: Input should be greater than or equal to 1, got 0",
        ),
        ({"size": 3, "span": {"low": 3, "high": 1}}, "run.toml: span: low 3 is above high 1"),
        (
            {"size": 3, "other": {"dept": 4}},
            "run.toml: unknown key 'other.dept' (did you mean 'depth'?)",
        ),
        ({"size": 3, "mode": -1}, "run.toml: mode: Input should be 'fast' or greater than 0, got -1"),
        (
            {"size": 3, "inner": {"names": ["a", 4]}},
            "run.toml: inner.names.1: Input should be a valid string, got 4",
        ),
    ],
)
def test_mistakes(values: dict, text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole text is compared)
        Outer.read(values, where="run.toml")
    assert str(caught.value) == text


def test_every_mistake_is_told() -> None:
    with pytest.raises(ValueError, match=r"run\.toml: ") as caught:
        Outer.read(
            {"size": "x", "rat": 1, "inner": {"names": [3]}, "other": {"depht": 1}},
            where="run.toml",
        )
    text = str(caught.value)
    assert text.count(";") == 3
    for part in ("size: ", "got 'x'", "'rat' (did you mean 'rate'?)", "inner.names.0: ", "'other.depht'"):
        assert part in text
