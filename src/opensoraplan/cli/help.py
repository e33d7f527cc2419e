"""Groups a verb's options in --help and wraps their descriptions. tyro, which parses them, takes groups only
as nested dataclasses, and keeps the line breaks of docstrings.
"""

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import Field, field, fields, is_dataclass, make_dataclass
from types import MappingProxyType
from typing import Annotated, Any, TypeVar, get_type_hints

from tyro.conf import OmitArgPrefixes, arg

Options = TypeVar("Options")
# In the metadata of a field that has no docstring: its description.
HELP = "help"
# Titles of groups and the options in each.
Groups = Mapping[str, Sequence[str]]


def group_options(kind: type, groups: Groups, defaults: Mapping[str, Any] = MappingProxyType({})) -> type:
    """The class of options that tyro parses: the fields of `kind`, with a nested dataclass for each of
    `groups`. `defaults` go before the class's own. `ungroup_options` reverses this.
    """
    descriptions, types = attribute_docs(kind), get_type_hints(kind, include_extras=True)

    def entry(one: Field) -> tuple[str, Any, Any]:
        value = defaults.get(one.name, one.default)
        if is_dataclass(value):
            values = {inner.name: getattr(value, inner.name) for inner in fields(value)}
            return _group(
                one.name, descriptions.get(one.name, one.name), group_options(type(value), {}, values)
            )
        shown = types[one.name]
        if (description := descriptions.get(one.name, one.metadata.get(HELP))) is not None:
            shown = Annotated[shown, arg(help=description)]
        return one.name, shown, field(default=value)

    every = {one.name: one for one in fields(kind)}
    inside = {name for names in groups.values() for name in names}
    entries = [entry(one) for name, one in every.items() if name not in inside]
    for title, names in groups.items():
        name = title.replace(" ", "_")
        made = make_dataclass(name, [entry(every[one]) for one in names], frozen=True, kw_only=True)
        entries.append(_group(name, title, made))
    # tyro shows them in this order: groups that `kind` has itself come last.
    entries.sort(key=lambda one: is_dataclass(one[2].default) and one[0] in every)
    namespace = {"__doc__": kind.__doc__}
    return make_dataclass(kind.__name__, entries, frozen=True, kw_only=True, namespace=namespace)


def ungroup_options(kind: type[Options], parsed: Any) -> Options:  # noqa: ANN401 (a class of `group_options`)
    """A verb's options from those that tyro has parsed."""
    own = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for one in fields(parsed):
        value = getattr(parsed, one.name)
        if one.name not in own:
            values |= {inner.name: getattr(value, inner.name) for inner in fields(value)}
        elif is_dataclass(own[one.name].default):
            values[one.name] = ungroup_options(type(own[one.name].default), value)
        else:
            values[one.name] = value
    return kind(**values)


def attribute_docs(kind: type) -> dict[str, str]:
    """The docstring of each field of a class and of those that it inherits from, on one line."""
    found: dict[str, str] = {}
    for base in kind.__bases__:
        if is_dataclass(base) and not any(HELP in one.metadata for one in fields(base)):
            found |= attribute_docs(base)
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    for before, after in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(before, ast.AnnAssign)
            and isinstance(before.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[before.target.id] = " ".join(str(after.value.value).split())
    return found


def _group(name: str, title: str, made: type) -> tuple[str, Any, Any]:
    return name, Annotated[OmitArgPrefixes[made], arg(name=title)], field(default=made())  # type: ignore[valid-type]
