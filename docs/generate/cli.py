"""Write the pages of docs/ that come from the code; with --check, say whether they are current.

    python docs/generate/cli.py [--check] [FOLDER]

cli.md is written here, from the commands themselves. `pools_and_suites.py` and `serving_parameters.py` write the
pages of those names, `router_table.py` the table of routers in method.md, `adapter_tables.py` those of adapters'
settings in experts-and-pools.md, `file_tree.py` the tree of files in architecture.md.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeGuard, get_args, get_origin

import adapter_tables
import file_tree
import pools_and_suites
import router_table
import serving_parameters
import typer
from typer.models import ArgumentInfo, OptionInfo

KINDS = {str: "TEXT", int: "N", float: "X", Path: "PATH"}

HEAD = """\
# Command line

Written by `python docs/generate/cli.py` from the commands themselves: change those, not this page.

If a command fails, it writes one line to standard error and exits with code 1. \
Wrong usage exits with code 2, Ctrl-C with 130.
If `train`, `gate` or `quickstart` is stopped, the same command continues where it was. \
`PHATGOOSE_DEBUG=1` shows tracebacks and other libraries' warnings.
"""

SHARED = """\
## Options of several commands

A command that only names one of these takes it with this meaning and default.
"""

TABLE = "| | | default |\n|---|---|---|"


@dataclass(frozen=True)
class _Parameter:
    """An argument or option, as its function declares it: typer's own objects differ between its versions."""

    name: str
    kind: Any
    info: ArgumentInfo | OptionInfo
    default: Any

    @property
    def is_argument(self) -> bool:
        return isinstance(self.info, ArgumentInfo)


def markdown() -> str:
    """The whole page. Options that are the same in several commands are described once."""
    from phatgoose.cli.main import app

    often = Counter("\n".join(_group(app, "phatgoose", 2, {})).split("\n"))
    shared = {row: row.split()[1].strip("`") for row, n in often.items() if n > 2 and row.startswith("| `--")}
    table = "\n".join([TABLE, *sorted(shared)])
    return "\n".join([HEAD, SHARED, f"{table}\n", *_group(app, "phatgoose", 2, shared)]).rstrip() + "\n"


def _group(app: typer.Typer, path: str, level: int, shared: Mapping[str, str]) -> Iterator[str]:
    callback = app.registered_callback.callback if app.registered_callback else None
    yield from _section(path, level, str(app.info.help), callback, shared, " COMMAND …")
    inside = [(str(c.name), c.callback) for c in app.registered_commands]
    groups = {str(g.name): g.typer_instance for g in app.registered_groups}
    for name, command in inside:
        yield from _section(f"{path} {name}", level + 1, inspect.getdoc(command) or "", command, shared)
    for name, group in groups.items():
        assert group is not None
        yield from _group(group, f"{path} {name}", level + 1, shared)


def _section(
    path: str, level: int, text: str, function: Any, shared: Mapping[str, str], more: str = ""
) -> Iterator[str]:
    found = list(parameters(function)) if function else []
    arguments, options = [p for p in found if p.is_argument], [p for p in found if not p.is_argument]
    words = [path, *map(_argument, arguments), *(["[OPTIONS]"] if options else [])]
    yield f"{'#' * level} `{path}`\n"
    yield f"```text\n{' '.join(words)}{more}\n```\n"
    yield " ".join(text.split()) + "\n"
    if found:
        rows = [_row(p) for p in [*arguments, *options]]
        if elsewhere := [f"`{shared[row]}`" for row in rows if row in shared]:
            rows = [row for row in rows if row not in shared]
            rows.append(
                f"| {', '.join(elsewhere)} | as [in other commands](#options-of-several-commands) |  |"
            )
        yield TABLE
        yield "\n".join(rows) + "\n"


def parameters(function: Any) -> Iterator[_Parameter]:
    """What a command's function takes from the command line."""
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind, *infos = get_args(parameter.annotation) or (parameter.annotation,)
        for info in infos:
            if isinstance(info, ArgumentInfo | OptionInfo):
                yield _Parameter(name, kind, info, parameter.default)


def _argument(parameter: _Parameter) -> str:
    return parameter.name.upper() + ("…" if get_origin(parameter.kind) is list else "")


def _row(parameter: _Parameter) -> str:
    text = " ".join((parameter.info.help or "").replace("\\[", "[").split())
    name = _argument(parameter) if parameter.is_argument else _flags(parameter)
    cells = (f"`{name}`", text.replace("|", "\\|").replace("<", "&lt;"), _default(parameter))
    return f"| {' | '.join(cells)} |"


def _flags(parameter: _Parameter) -> str:
    flag = "--" + parameter.name.replace("_", "-")
    # In Annotated, typer.Option's first argument is a flag, although its name says default.
    given: list[str] = [
        d for d in (parameter.info.default, *(parameter.info.param_decls or ())) if _is_flag(d)
    ]
    kind = _inner(parameter.kind)
    if kind is bool:
        return given[0] if given else f"{flag}/--no-{flag[2:]}"
    values = "\\|".join(m.value for m in kind) if issubclass(kind, Enum) else KINDS[kind]
    return f"{given[0] if given else flag} {values}"


def _is_flag(text: Any) -> TypeGuard[str]:
    return isinstance(text, str) and text.startswith("--")


def _inner(kind: Any) -> Any:
    """list[X] | None → X."""
    inside = [k for k in get_args(kind) if k is not type(None)]
    return _inner(inside[0]) if inside else kind


def _default(parameter: _Parameter) -> str:
    default: Any = parameter.default
    shown = parameter.info.show_default
    if default is inspect.Parameter.empty:
        return "required"
    if isinstance(shown, str):
        return shown
    if isinstance(default, bool):
        flags = _flags(parameter).split("/")
        return f"`{flags[0] if default else flags[1]}`" if len(flags) == 2 else ""
    return "" if default in (None, "") else f"`{getattr(default, 'value', default)}`"


def main(arguments: list[str]) -> int:
    """Writes the pages; with --check only says whether they are current. Returns 1 if one isn't, or can't be made."""
    try:
        return _write(arguments)
    except file_tree.FirstLineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _write(arguments: list[str]) -> int:
    folder = Path(next((a for a in arguments if not a.startswith("-")), "docs"))
    pages = {
        folder / "cli.md": markdown(),
        folder / "pools-and-suites.md": pools_and_suites.markdown(),
        folder / "serving-parameters.md": serving_parameters.markdown(),
    }
    for name, tables in (
        ("method.md", router_table),
        ("experts-and-pools.md", adapter_tables),
        ("architecture.md", file_tree),
    ):
        if (path := folder / name).is_file():  # only a part of it is written
            pages[path] = tables.page(path)
    if "--check" in arguments:
        current = [_is_current(path, text) for path, text in pages.items()]  # all, so that each is named
        return 0 if all(current) else 1
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return 0


def _is_current(path: Path, text: str) -> bool:
    current = path.is_file() and path.read_text(encoding="utf-8") == text
    print(f"{path} is current" if current else f"{path} is old: run python docs/generate/cli.py")
    return current


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
