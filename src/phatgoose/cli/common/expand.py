"""Commands that take options as frozen dataclasses: one option for each field."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum, StrEnum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer


def expand_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces each parameter of a command that is a dataclass by one option for each of its fields.

    A field that is `Annotated` with typer's own declaration is taken as it is. Any other field is a setting of the
    library, and its docstring is the help. The command gets the dataclass, built from the options; an error in that
    is the command's refusal. A default of the parameter (`GenerationOptions(max_new_tokens=256)`) gives the
    options' defaults.
    """
    signature = inspect.signature(command, eval_str=True)
    # Parameters become keyword-only: then options with and without defaults may stand in any order.
    groups: dict[str, type] = {}
    settings: set[str] = set()
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        kind = parameter.annotation
        if not is_dataclass(kind):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(kind, type)
        groups[parameter.name] = kind
        preset = None if parameter.default is inspect.Parameter.empty else parameter.default
        hints = get_type_hints(kind, include_extras=True)
        parameters += [_option(kind, field, hints[field.name], preset) for field in fields(kind)]
        settings |= {name for name, hint in hints.items() if get_origin(hint) is not Annotated}

    @functools.wraps(command)
    def wrapped(**given: Any) -> Any:
        for name, kind in groups.items():
            values = {f.name: given.pop(f.name) for f in fields(kind)}
            given[name] = kind(**{k: _plain(k, v) if k in settings else v for k, v in values.items()})
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


def _option(group: type, field: Field[Any], hint: Any, preset: Any) -> inspect.Parameter:
    default = field.default if preset is None else getattr(preset, field.name)
    if default is MISSING:
        default = inspect.Parameter.empty
    if get_origin(hint) is not Annotated:
        hint, default = _setting(group, field, hint, default)
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _setting(config: type, field: Field[Any], hint: Any, default: Any) -> tuple[Any, Any]:
    """(annotation, default) of the option for a setting of the library."""
    kind = _typer_type(field.name, hint)
    extra = " Several are separated by commas." if field.name == "target_modules" else ""
    if isinstance(kind, type) and issubclass(kind, Enum):
        default = kind(default)
    info = typer.Option(
        *(
            [f"--{field.name.replace('_', '-')}"] if default is False else []
        ),  # no --no-… for what is off anyway
        help=(field_docs(config)[field.name] + extra).replace("[", "\\["),  # else rich reads it as markup
        rich_help_panel=f"Settings ({config.__name__})",
        show_default="none" if default is None else True,
    )
    return Annotated[kind, info], default


def _typer_type(name: str, hint: Any) -> Any:
    """What typer can parse: Literal as an Enum, names of modules as text; anything else is left as it is."""
    if get_origin(hint) is Literal:
        return StrEnum(name, {value: value for value in get_args(hint)})
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None) and get_origin(kind) is not tuple]
        if len(kinds) != 1:
            raise TypeError(f"{name}: no option can be made of the type {hint}.")
        return kinds[0] | None if type(None) in get_args(hint) else kinds[0]
    return hint


def _plain(name: str, value: Any) -> Any:
    """What typer parsed, as the library's setting takes it: the reverse of `_setting`."""
    if isinstance(value, Enum):
        return value.value
    if name == "target_modules" and value not in ("auto", "all-linear"):
        return tuple(part.strip() for part in value.split(","))
    return value
