"""`phatgoose pool`: create, add, remove, list, verify, pack, unpack, push, pull."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

import phatgoose
from phatgoose.cli.common.expand import Options, expand_options
from phatgoose.cli.common.options import BASE_HELP, POOL_HELP, BaseOptions, PublishOptions, RepoArgument
from phatgoose.cli.measure import show
from phatgoose.errors import DownloadError, PhatgooseError, PoolError
from phatgoose.registry import unknown
from phatgoose.shipped import pools

app = typer.Typer(
    help="Make, change and check a pool: experts of one base in one folder.", no_args_is_help=True
)
PoolArgument = Annotated[Path, typer.Argument(help="The pool's folder.")]
AnyPoolArgument = Annotated[Path, typer.Argument(help=POOL_HELP)]
ExpertsArgument = Annotated[
    list[str],
    typer.Argument(
        help="Experts: folders, or on the Hub org/name, org/name@revision, org/name@revision:folder. Plain PEFT "
        "adapters will do."
    ),
]

DropOption = Annotated[
    list[str] | None,
    typer.Option(
        "--drop",
        help="Leave this out of the adapters, which then compute something else: modules_to_save, "
        "trainable_token_indices or prediction_head.",
    ),
]


@dataclass(frozen=True)
class FetchOptions(Options):
    """What is fetched from the Hub."""

    max_gb: Annotated[float, typer.Option(min=0.0)] = 4.0
    """From the Hub, refuse files that are larger, in GiB."""

    @property
    def max_bytes(self) -> int:
        return int(self.max_gb * 2**30)


@app.command("create")
@expand_options
def create(
    pool: PoolArgument, experts: ExpertsArgument, *, drop: DropOption = None, fetch: FetchOptions
) -> None:
    """Make a pool of experts. Their folders are copied into it; for experts from the Hub the commits are recorded.

    Of several files and folders, those that hold no expert are left out, and named:
    `phatgoose pool create POOL runs/*`.
    """
    from phatgoose.experts.names import MANIFEST

    if (pool / MANIFEST).exists():
        raise PoolError(f"{pool} is a pool already: use `phatgoose pool add`, or choose another folder.")
    found, left_out = _read_all(experts, None, drop, fetch)
    made = phatgoose.Pool(found)
    made.save(pool, replace=False)
    show.say(f"{pool}: {_count(len(made))}: {', '.join(made.names)}")
    _warn(left_out)
    _warn(made.warnings())
    show.facts(_next(pool, made))


@app.command("add")
@expand_options
def add(
    pool: PoolArgument,
    experts: ExpertsArgument,
    *,
    name: Annotated[
        str | None, typer.Option("--name", help="What the expert is called in the pool; for one expert only.")
    ] = None,
    drop: DropOption = None,
    fetch: FetchOptions,
) -> None:
    """Add experts to a pool; of several files and folders, those that hold no expert are left out, and named."""
    from phatgoose.experts.health import DIFFERENT_BASES
    from phatgoose.experts.names import MANIFEST
    from phatgoose.experts.pool_folder import add_to_folder

    if name is not None and len(experts) != 1:
        raise typer.BadParameter(f"it names one expert, and {len(experts)} are given.", param_hint="--name")
    if not (pool / MANIFEST).exists() and str(pool) not in pools():  # which is refused below
        raise PoolError(f"there is no pool in {pool}: make it with `phatgoose pool create`.")
    new, left_out = _read_all(experts, name, drop, fetch)
    there = phatgoose.Pool.load(pool).experts if _names(pool) else ()
    whole = phatgoose.Pool([*there, *new])  # all of them are checked before the first is written
    for expert in new:
        add_to_folder(pool, expert)
    show.say(f"{pool}: {_count(len(whole))}: {', '.join(whole.names)}")
    _warn(left_out)
    about = (DIFFERENT_BASES, *(expert.name for expert in new))
    _warn(w for w in whole.warnings() if any(text in w for text in about))


@app.command("remove")
def remove(
    pool: PoolArgument, names: Annotated[list[str], typer.Argument(help="Names of experts in the pool.")]
) -> None:
    """Remove experts from a pool; damaged ones can be removed too."""
    from phatgoose.experts.pool_folder import remove_from_folder

    known = _names(pool)
    for name in names:
        if name not in known:
            raise unknown("expert", name, known)
    for name in dict.fromkeys(names):
        remove_from_folder(pool, name)
    show.say(f"{pool}: {_count(len(known) - len(set(names)))}; removed {', '.join(dict.fromkeys(names))}")


@app.command("list")
def list_(pool: AnyPoolArgument) -> None:
    """Show what is in a pool, and which experts differ greatly from the others."""
    from phatgoose.experts.health import find_outliers
    from phatgoose.experts.packed.expert import PackedExpert

    loaded = phatgoose.Pool.load(pool, verify=False)
    columns = ["name", "task", "rank", "modules", "parameters", "gates", "base", "validation loss"]
    rows = [_row(e) for e in loaded.experts]
    if any(e.origin for e in loaded.experts):
        columns.append("from the Hub")
        rows = [(*row, str(e.origin or "-")) for row, e in zip(rows, loaded.experts, strict=True)]
    show.table(columns, rows, numbers=("modules", "parameters", "validation loss"))
    if any(isinstance(e, PackedExpert) for e in loaded.experts):
        show.note(
            "the experts' values, mapped into memory, were not read: `phatgoose pool verify` checks them"
        )
    else:
        _warn(find_outliers(loaded.experts))


@dataclass(frozen=True)
class CheckedBaseOptions(BaseOptions):
    """The base that experts are checked against."""

    base: Annotated[
        str | None, typer.Option(help=f"{BASE_HELP} If it is given, the experts are checked against it.")
    ] = None


@app.command("verify")
@expand_options
def verify(pool: AnyPoolArgument, base: CheckedBaseOptions) -> None:
    """Check every file of a pool: hashes, shapes, finite values, one base. Warn about experts that
    differ greatly from the others.

    Exit code 1 if anything is damaged.
    """
    from phatgoose.experts.pool_folder import verify_folder

    loaded, norms, tokenizer = verify_folder(pool), None, None
    here = loaded
    if base.base is not None:
        from phatgoose.cli.common.loading import load, show_copied
        from phatgoose.models.attach.attach import route, routing_of, unroute
        from phatgoose.models.attach.modules import weight_norms
        from phatgoose.routers import Uniform

        model = load(base.base, base.dtype, base.device)
        route(model, loaded, Uniform())  # refuses another base, missing modules and other shapes
        routing = routing_of(model)
        assert routing is not None
        show_copied(routing)
        here = routing.pool  # under this model's names of its modules
        unroute(model)
        norms, tokenizer = weight_norms(model.model, here.modules), model.tokenizer
    _warn(here.warnings(norms, tokenizer))
    recorded = loaded.base.spec if loaded.base else "none recorded"
    show.say(f"{pool}: {_count(len(loaded))}, every file as the manifest says; base: {recorded}")
    if base.base is not None:
        show.say(
            f"{base.base} has every module the experts adapt" + (" and is their base" if loaded.base else "")
        )


@app.command("pack")
def pack(
    pool: PoolArgument,
    spare: Annotated[
        float,
        typer.Option(
            "--spare",
            help="Room for further experts, as a share of those there; it takes no space on disk before it is used.",
        ),
    ] = 0.5,
) -> None:
    """Put the experts' tensors into one file that is mapped into memory, so that a large pool opens at once.

    Everything else works as before: experts are added and removed without rewriting the rest. Packing a packed pool
    again drops what was removed from it.
    """
    from phatgoose.experts.manifest import read_manifest
    from phatgoose.experts.packed.pack import pack

    beside = pack(pool, spare)
    manifest = read_manifest(pool)
    place = pool / manifest["packed"]["file"]
    size = place.stat()
    used, whole = (f"{bytes_ / 2**20:,.0f} MiB" for bytes_ in (size.st_blocks * 512, size.st_size))
    show.say(
        f"{pool}: {len(manifest['experts']) - len(beside)} experts in {place.name}, {used} on disk and {whole} with "
        "room for more"
    )
    _warn(f"{name} {reason}; it stays in its folder." for name, reason in beside.items())


@app.command("unpack")
def unpack(pool: PoolArgument) -> None:
    """Turn a packed pool back into one folder per expert, with every file as it was before packing."""
    from phatgoose.experts.packed.pack import unpack

    unpack(pool)
    show.say(f"{pool}: {len(_names(pool))} experts, each in its folder")


@app.command("push")
@expand_options
def push(pool: AnyPoolArgument, repo: RepoArgument, publish: PublishOptions) -> None:
    """Publish a pool on the Hub, in one commit that replaces a pool there. Log in with `hf auth login`."""
    from phatgoose.experts.hub.push import PushOptions
    from phatgoose.experts.pool_folder import push_folder

    loaded = phatgoose.Pool.load(pool)  # nothing damaged is published
    options = PushOptions(publish.private or None, publish.branch, None, publish.message, publish.allow_paths)
    done = push_folder(pool, repo, options)
    show.say(f"{done}: {_count(len(loaded))}: {', '.join(loaded.names)}")
    _warn(loaded.warnings())
    show.facts([("next", shlex.join(["phatgoose", "pool", "pull", str(done), "POOL"]))])


@app.command("pull")
@expand_options
def pull(
    repo: Annotated[
        str,
        typer.Argument(
            help="A pool on the Hub: org/name, org/name@revision or org/name@revision:folder. Or the name of a pool "
            f"that comes with phatgoose: {', '.join(pools())}."
        ),
    ],
    pool: Annotated[Path, typer.Argument(help="The folder to make.")],
    *,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another pool that is there already.")
    ] = False,
    fetch: FetchOptions,
) -> None:
    """Fetch a pool from the Hub, or copy one that comes with phatgoose: the same files, verified. What was fetched
    before needs no network."""
    loaded = phatgoose.Pool.pull(repo, pool, overwrite=overwrite, max_bytes=fetch.max_bytes)
    show.say(f"{pool}: {_count(len(loaded))}: {', '.join(loaded.names)}")
    _warn(loaded.warnings())


def _read_all(
    texts: list[str], name: str | None, drop: list[str] | None, fetch: FetchOptions
) -> tuple[list[phatgoose.Expert], list[str]]:
    """(experts, what is left out and why), so that `runs/*` makes a pool of the adapters among other files."""
    found, failed = [], {}
    for text in texts:
        try:
            found.append(_read(text, name, drop, fetch))
        except PhatgooseError as error:
            if len(texts) == 1 or not Path(text).exists():  # it was mistyped
                raise
            failed[text] = str(error)
    if not found:
        reasons = "\n".join(f"{text}: {why}" for text, why in failed.items())
        raise PoolError(f"none of these can be taken as an expert:\n{reasons}")
    return found, [f"left out: {text}: {why}" for text, why in failed.items()]


def _read(text: str, name: str | None, drop: list[str] | None, fetch: FetchOptions) -> phatgoose.Expert:
    """An expert from a folder here or, where there is none, from the Hub."""
    from phatgoose.experts.hub.place import is_place

    if Path(text).exists() or not is_place(text):
        return phatgoose.Expert.load(Path(text), name=name, drop=drop or ())
    show.note(f"there is no folder {text} here: fetching it from the Hub")
    try:
        return phatgoose.Expert.pull(text, name=name, drop=drop or (), max_bytes=fetch.max_bytes)
    except DownloadError as error:
        raise DownloadError(f"{error} There is also no folder {text} here.") from error


def _next(folder: Path, pool: phatgoose.Pool) -> list[tuple[str, str]]:
    """What to type next: `generate`, or if no expert records a base, `verify` before it."""
    from phatgoose.cli.common.loading import recorded_base

    generate = shlex.join(["phatgoose", "generate", "--pool", str(folder)])
    if recorded_base(pool.experts) is not None:
        return [("next", f'{generate} "PROMPT"')]
    verify = shlex.join(["phatgoose", "pool", "verify", str(folder)])
    return [
        ("next", verify),
        ("then", f'{generate} --base BASE "PROMPT" (no expert says which base it is for)'),
    ]


def _row(expert: phatgoose.Expert) -> tuple[str, ...]:
    from phatgoose.experts.card.card import lowest_loss

    task, loss = expert.provenance.get("task"), lowest_loss(expert.provenance)
    return (
        expert.name,
        str(task.get("name", "-")) if isinstance(task, dict) else "-",
        ",".join(str(w or "-") for w in sorted({u.width for u in expert.updates.values()})),
        str(len(expert.updates)),
        f"{expert.parameters:,}",
        "no" if expert.gates is None else "yes",
        expert.base.spec if expert.base else expert.base_name or "-",
        "-" if loss is None else f"{loss:.4f}",
    )


def _names(pool: Path) -> list[str]:
    """The names in the manifest, without reading the experts: one of them may be damaged."""
    from phatgoose.experts.manifest import read_manifest

    return [entry["name"] for entry in read_manifest(pool)["experts"]]


def _warn(warnings: Iterable[str]) -> None:
    for text in warnings:
        show.warn(text)


def _count(experts: int) -> str:
    return f"{experts} expert" + ("" if experts == 1 else "s")
