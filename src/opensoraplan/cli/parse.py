"""Parses a command line into an object of options, or shows --help, or says what is wrong."""

import contextlib
import io
import itertools
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import tyro

from opensoraplan.cli.help import Groups, group_options, ungroup_options
from opensoraplan.names import did_you_mean

Options = TypeVar("Options")
# Suggests what was meant by unknown words of a command line; None if it has no suggestion.
Hint = Callable[[list[str]], str | None]


def no_hint(_words: list[str]) -> str | None:
    return None


def parse_options(
    kind: type[Options],
    words: list[str],
    *,
    program: str,
    groups: Groups = MappingProxyType({}),
    defaults: Mapping[str, Any] = MappingProxyType({}),
    hint: Hint = no_hint,
) -> Options:
    """Parse a command line that passed `check_options`; `groups` and `defaults` as in `group_options`. Raises
    ValueError or SystemExit for options that cannot be read.
    """
    with _wrap_help():
        grammar = group_options(kind, groups, defaults)
        parsed, unknown = tyro.cli(grammar, prog=program, args=words, return_unknown_args=True)
    if unknown:
        raise ValueError(hint(words) or f"{program} does not understand {' '.join(unknown)!r}")
    return ungroup_options(kind, parsed)


def check_options(kind: type, words: list[str], *, program: str, hint: Hint = no_hint) -> None:
    """Raise ValueError for an unknown option, with the one that was probably meant."""
    known = _option_names(kind)
    given = list(itertools.takewhile(lambda word: word != "--", words))
    for index, word in enumerate(given):
        option = word.partition("=")[0].replace("_", "-")
        if not option.startswith("--") or option in (*known, "--help"):
            continue
        near = did_you_mean(option, known, cutoff=0.7)
        meant = f": {said}" if not near and (said := hint(given[index:])) else ""
        raise ValueError(f"{program} has no option {option}{near}{meant}")


def help_width() -> int:
    return max(shutil.get_terminal_size().columns, 40)


def _option_names(options: type) -> list[str]:
    """The options of a verb and of its groups as on the command line: --frames, --tiling, --no-tiling, ..."""
    names: list[str] = []
    for field in fields(options):
        if is_dataclass(field.default):
            names += _option_names(type(field.default))
        else:
            name = field.name.replace("_", "-")
            names += [f"--{name}", f"--no-{name}"] if isinstance(field.default, bool) else [f"--{name}"]
    return names


@contextlib.contextmanager
def _wrap_help() -> Iterator[None]:
    """Wrap the paragraphs of help to the width of the terminal. tyro does so only in its boxes."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            yield
    finally:
        for line in shown.getvalue().splitlines():
            wrapped = textwrap.wrap(line, help_width()) if len(line) > help_width() else [line]
            sys.stdout.write("\n".join(wrapped) + "\n")
