"""Commands that take options as frozen dataclasses: one option for each field."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum, StrEnum
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import typer


class Options:
    """Options of commands that belong together; subclasses are frozen dataclasses.

    Settings of the library (`training/config.py`) are dataclasses without this parent: as options they stand in a
    panel of their own.
    """

    PANEL: ClassVar[str | None] = None
    """The panel of --help that they stand in; None: the one of all options."""


def expand_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces each parameter of a command that is a dataclass by one option for each of its fields.

    The command gets the dataclass, built from the options; an error in that is the command's refusal. Of a field

    - the name becomes the option's: `max_new_tokens` is `--max-new-tokens`;
    - the docstring below it is the help. Square brackets and line breaks need no care;
    - the type is what typer parses. A `Literal` becomes a choice;
    - a default of False makes a flag without `--no-…`; a field without a default is an option that must be given. A
      default of the parameter (`GenerationOptions(max_new_tokens=256)`) takes the place of the fields' defaults;
    - whatever else typer is to know (limits, other names, a help that is put together) is said by a `typer.Option`:
      `rows: Annotated[int, typer.Option(min=1)] = 8`.
    """
    signature = inspect.signature(command, eval_str=True)
    # Parameters become keyword-only: then options with and without defaults may stand in any order.
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        kind = parameter.annotation
        if is_dataclass(kind):
            assert isinstance(kind, type)
            groups[parameter.name] = kind
            parameters += _options(kind, parameter.default)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def wrapped(**given: Any) -> Any:
        for name, kind in groups.items():
            given[name] = kind(**{f.name: _plain(f.name, given.pop(f.name)) for f in fields(kind)})
        return command(**given)

    # Typer reads both; functools.wraps has copied those of the command.
    new_signature = signature.replace(parameters=parameters)
    wrapped.__signature__ = new_signature  # type: ignore[attr-defined]  # typeshed doesn't know it
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def field_docs(config: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, its parents' fields included, on one line."""
    docs: dict[str, str] = {}
    for kind in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:], strict=False):
            match statement, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def _options(group: type, preset: Any) -> Iterator[inspect.Parameter]:
    """The parameters that typer makes the options of; `preset` may be an instance, whose values are the defaults."""
    hints, docs = get_type_hints(group, include_extras=True), field_docs(group)
    ours = issubclass(group, Options)
    for field in fields(group):
        default = field.default if preset is inspect.Parameter.empty else getattr(preset, field.name)
        hint, infos = hints[field.name], []
        if get_origin(hint) is Annotated:
            hint, *infos = get_args(hint)
        kind = _typer_type(field.name, hint)
        if isinstance(kind, type) and issubclass(kind, Enum):
            default = kind(default)
        info = copy.copy(infos[0]) if infos else typer.Option()
        if (
            default is False and not info.param_decls and info.default is ...
        ):  # typer keeps a first name there
            info.param_decls = (f"--{field.name.replace('_', '-')}",)  # a name of its own: there is no --no-…
        if info.help is None:
            if field.name not in docs:
                raise TypeError(f"{group.__name__}.{field.name}: write its help as a docstring below it.")
            more = " Several are separated by commas." if field.name == "target_modules" else ""
            info.help = (docs[field.name] + more).replace("[", "\\[")  # else rich reads it as markup
        info.rich_help_panel = group.PANEL if issubclass(group, Options) else f"Settings ({group.__name__})"
        if default is None and not ours:
            info.show_default = "none"
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=Annotated[kind, info],
        )


def _typer_type(name: str, hint: Any) -> Any:
    """What typer can parse: Literal as an Enum, names of modules as text; anything else is left as it is."""
    if get_origin(hint) is Literal:
        return StrEnum(name, {value: value for value in get_args(hint)})
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None) and get_origin(kind) is not tuple]
        if len(kinds) != 1:
            raise TypeError(f"{name}: no option can be made of the type {hint}.")
        kind = _typer_type(name, kinds[0])
        return kind | None if type(None) in get_args(hint) else kind
    return hint


def _plain(name: str, value: Any) -> Any:
    """What typer parsed, as the dataclass takes it: the reverse of `_typer_type`."""
    if isinstance(value, Enum):
        return value.value
    if name == "target_modules" and value not in ("auto", "all-linear"):
        return tuple(part.strip() for part in value.split(","))
    return value
