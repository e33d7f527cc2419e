"""Types and checks that the options of several verbs share."""

from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

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


def check_exists(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
