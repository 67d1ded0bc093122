"""Options that several commands share, and options made from a dataclass of settings."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable
from dataclasses import Field, fields
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from phatgoose.routers.parse import ROUTERS

DEFAULT_BASE = "smollm2-135m-instruct-q4"
"""The same as phatgoose.models.base.load.DEFAULT_BASE, written again because reading that one would import torch."""

BASE_HELP = "The base model: an alias, a folder, a GGUF file, or a Hub id (org/name, org/name@revision)."
TASK_HELP = (
    "The task: bigbench:NAME, bbh:NAME, jsonl:PATH, hf:DATASET or p3:CONFIG (see `phatgoose tasks --help`)."
)
BaseOption = Annotated[str, typer.Option("--base", help=BASE_HELP)]
PoolBaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        help=f"{BASE_HELP} If not given, the one that the pool records; {DEFAULT_BASE} without a pool.",
    ),
]
RecordedBaseOption = Annotated[
    str | None, typer.Option("--base", help=f"{BASE_HELP} If not given, the one that the expert records.")
]
LimitTrainOption = Annotated[
    int | None, typer.Option("--limit-train", min=1, help="Only the first rows of the task's training split.")
]
TaskOption = Annotated[str, typer.Option("--task", help=TASK_HELP)]
DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype", help="What the base is loaded in: auto (as it is stored), float32, bfloat16 or float16."
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="Where it runs, e.g. cpu or cuda:1; auto is the GPU if there is one.")
]
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        help="What computes the routing: auto, cpu (a compiled kernel), triton (GPUs), torch, or reference (plain and slow). "
        "See `phatgoose doctor`.",
    ),
]
DeviceMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--device-memory",
        help="How much of the GPU the pool may take, e.g. 8GB: experts that don't fit are brought there when they are needed. "
        "Without it, all must fit. For routers that choose by gates.",
    ),
]
PoolOption = Annotated[
    Path | None, typer.Option("--pool", help="A pool's folder; without one, the base alone answers.")
]
ROUTER_NAMES = (
    f"Who chooses the experts, as NAME or NAME:setting=value,…: {', '.join(ROUTERS.table)} (single:NAME is one expert; "
    "`phatgoose routers` lists them with what they need)."
)
ROUTER_HELP = (
    f"{ROUTER_NAMES} Or one expert made of all: merged, ties, dare. Or base for none. If not given: base without a pool; with one "
    "phatgoose, or where experts lack gates a router that needs none."
)


def with_settings(config: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replaces a command's parameter `config` by one option for each field of this dataclass, helped by its docstring.

    The command gets the dataclass, built from the options; what that raises is the command's refusal.
    """
    options = {f.name: _option(config, f) for f in fields(config)}

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        own = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for p in signature.parameters.values()
            if p.name != "config"
        ]

        @functools.wraps(command)
        def wrapped(**given: Any) -> Any:
            settings = {name: _plain(name, given.pop(name)) for name in options}
            return command(**given, config=config(**settings))

        # Typer reads both; functools.wraps has copied those of the command.
        wrapped.__signature__ = signature.replace(parameters=[*own, *options.values()])  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in [*own, *options.values()]}
        return wrapped

    return decorate


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


def _option(config: type, field: Field[Any]) -> inspect.Parameter:
    kind, default = _typer_type(field.name, get_type_hints(config)[field.name]), field.default
    extra = " Several are separated by commas." if field.name == "target_modules" else ""
    if isinstance(kind, type) and issubclass(kind, Enum):
        default = kind(default)
    flag = (
        [f"--{field.name.replace('_', '-')}"] if default is False else []
    )  # no --no-… for what is off anyway
    info = typer.Option(
        *flag,
        # A bracket would be read as rich's markup.
        help=(field_docs(config)[field.name] + extra).replace("[", "\\["),
        rich_help_panel=f"Settings ({config.__name__})",
        show_default="none" if default is None else True,
    )
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _typer_type(name: str, hint: Any) -> Any:
    """What typer can parse: Literal as an Enum, names of modules as text; the rest as it is."""
    if get_origin(hint) is Literal:
        return StrEnum(name, {value: value for value in get_args(hint)})
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None) and get_origin(kind) is not tuple]
        if len(kinds) != 1:
            raise TypeError(f"{name}: no option can be made of the type {hint}.")
        return kinds[0] | None if type(None) in get_args(hint) else kinds[0]
    return hint


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if name == "target_modules" and value not in ("auto", "all-linear"):
        return tuple(part.strip() for part in value.split(","))
    return value
