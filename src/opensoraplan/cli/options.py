"""Types and checks that the options of several verbs share."""

from collections.abc import Collection, Mapping
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from opensoraplan.cli.help import HELP
from opensoraplan.settings import Settings

Dtype = Literal["bf16", "fp16", "fp32"]
# One --set for several values, or one for each.
Changes = UseAppendAction[tuple[tuple[str, ...], ...]]


def optional(metavar: str, hint: str = "") -> Any:  # noqa: ANN401 (a marker for Annotated)
    """Show an option in --help without its default None, but with `hint`."""
    return arg(metavar=metavar, help_behavior_hint=hint)


OptionalPath = Annotated[Path | None, optional("PATH")]
OptionalDevice = Annotated[
    str | None, optional("NAME", "(default: the first accelerator there is, else cpu)")
]


def options_of(kind: type[Settings], *, without: Collection[str], shown: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """A dataclass with the fields of `kind` as options, but for those `without`: with their descriptions and
    defaults, and not checked. `shown`: what `optional` says of some of them.
    """
    entries = []
    for name, one in kind.model_fields.items():
        if name not in without:
            option = Annotated[one.annotation, shown[name]] if name in shown else one.annotation
            description = " ".join(str(one.description).split())
            entries.append((name, option, field(default=one.default, metadata={HELP: description})))
    return make_dataclass(f"{kind.__name__}Options", entries, frozen=True)


def check_exists(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
