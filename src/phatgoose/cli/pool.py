"""`phatgoose pool`: create, add, base, remove, list, verify, pack, unpack, push, pull."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import phatgoose
from phatgoose.cli.common.expand import Options, expand_options
from phatgoose.cli.common.options import (
    BASE_HELP,
    POOL_HELP,
    BaseOptions,
    DtypeOption,
    PublishOptions,
    RepoArgument,
)
from phatgoose.cli.measure import show
from phatgoose.errors import DownloadError, PhatgooseError, PoolError
from phatgoose.records import Fingerprint
from phatgoose.registry import unknown
from phatgoose.shipped import pools

if TYPE_CHECKING:
    from phatgoose.experts.health import Warned
    from phatgoose.workflows.collect import Collected

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


@dataclass(frozen=True)
class TakeOptions(Options):
    """Which adapters are taken."""

    any_base: bool = False
    """Take adapters that name another base, too: for copies of one model under several names."""


@app.command("create")
@expand_options
def create(
    pool: PoolArgument,
    experts: ExpertsArgument,
    *,
    base: Annotated[
        str | None,
        typer.Option(
            help=f"{BASE_HELP} Adapters that name another one are left out. If not given, the one that most of them "
            "name."
        ),
    ] = None,
    drop: DropOption = None,
    take: TakeOptions,
    fetch: FetchOptions,
) -> None:
    """Make a pool of experts. Their folders are copied into it; for experts from the Hub the commits are recorded.

    What can't be taken is left out, and it is said why: files that are no adapters, damaged ones, adapters of another
    base. `phatgoose pool create POOL adapters/*`.
    """
    from phatgoose.experts.names import MANIFEST
    from phatgoose.workflows.collect import collect

    if (pool / MANIFEST).exists():
        raise PoolError(
            f"{pool} is a pool already: use `{shlex.join(['phatgoose', 'pool', 'add', str(pool)])} ADAPTERS`, or "
            "choose another folder."
        )
    found, left_out = _read_all(experts, None, drop, fetch)
    made = collect(found, left_out, base=base, any_base=take.any_base)
    made.pool.save(pool, replace=False)
    _warn_by_kind(made.warned())
    _summary(pool, made, len(found) + len(left_out), made.pool.experts)


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
    take: TakeOptions,
    fetch: FetchOptions,
) -> None:
    """Add experts to a pool. What can't be taken is left out, and it is said why, as by `phatgoose pool create`."""
    from phatgoose.experts.health import DIFFERENT_BASES
    from phatgoose.experts.manifest import base_of, read_manifest
    from phatgoose.experts.names import MANIFEST
    from phatgoose.experts.pool_folder import add_to_folder, record_base
    from phatgoose.workflows.collect import collect

    if name is not None and len(experts) != 1:
        raise typer.BadParameter(f"it names one expert, and {len(experts)} are given.", param_hint="--name")
    if not (pool / MANIFEST).exists() and str(pool) not in pools():  # which is refused below
        raise PoolError(f"there is no pool in {pool}: make it with `phatgoose pool create`.")
    found, left_out = _read_all(experts, name, drop, fetch)
    there = phatgoose.Pool.load(pool) if _names(pool) else None
    recorded = base_of(read_manifest(pool), pool)  # of an empty pool, too
    named = recorded.spec if isinstance(recorded, Fingerprint) else recorded
    made = collect(found, left_out, base=None if there else named, any_base=take.any_base, there=there)
    new = made.pool.experts[len(there or ()) :]
    for expert in new:
        add_to_folder(pool, expert)
    if made.pool.own_base is not None and not isinstance(recorded, Fingerprint):
        record_base(pool, made.pool.own_base)
    about = (DIFFERENT_BASES, *(expert.name for expert in new))
    _warn_by_kind(w for w in made.warned() if any(text in str(w) for text in about))
    _summary(pool, made, len(found) + len(left_out), new)


@app.command("base")
def base_(
    pool: PoolArgument,
    base: Annotated[str, typer.Argument(help=BASE_HELP)],
    dtype: DtypeOption = "auto",
    device: Annotated[str, typer.Option(help="Where it is loaded, e.g. cpu or cuda:1.")] = "auto",
) -> None:
    """Record which base a pool is of, and where it is: the experts are checked against it first.

    For a pool whose adapters name no base, or a folder of another machine.
    """
    from phatgoose.cli.common.loading import load
    from phatgoose.experts.pool_folder import record_base
    from phatgoose.models.attach.fitting import fit_router
    from phatgoose.workflows.collect import place_of_base

    experts = phatgoose.Pool.load(pool)
    spec = place_of_base(base)
    model = load(spec, dtype, device)
    fit = fit_router(model, experts)  # refuses another base
    record_base(pool, replace(model.fingerprint, spec=spec))
    show.say(
        f"{pool}: the base is {spec}, of which every expert has its modules; router: {fit.text} ({fit.why})"
    )


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
    from phatgoose.experts.health import by_kind
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
    _warn(by_kind(here.warned(norms, tokenizer)))
    recorded = loaded.base_spec or "none recorded"
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
) -> tuple[dict[str, phatgoose.Expert], dict[str, str]]:
    """(experts by what was given, what is left out and why), so that `runs/*` makes a pool of the adapters there."""
    found: dict[str, phatgoose.Expert] = {}
    failed: dict[str, str] = {}
    places = {str(Path(text).resolve()) if Path(text).exists() else text: text for text in reversed(texts)}
    for text in reversed(places.values()):
        try:
            found[text] = _read(text, name, drop, fetch)
        except PhatgooseError as error:
            if len(texts) == 1 or not Path(text).exists():  # it was mistyped
                raise
            failed[text] = str(error)
    return found, failed


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


def _summary(folder: Path, made: Collected, given: int, taken: Sequence[phatgoose.Expert]) -> None:
    """What is in the pool now, what isn't and why, and what to type next."""
    from phatgoose.workflows.collect import by_reason

    pool = made.pool
    show.say(f"{folder}: {_count(len(pool))}; {len(taken)} of {given} were taken")
    rows = [
        ("taken", ", ".join(expert.name for expert in taken)),
        ("kinds", _kinds(taken)),
        ("gates", _gates_fact(pool)),
        ("base", _base_fact(made)),
    ]
    if made.fit is not None:
        rows.append(("router", f"{made.fit.text} ({made.fit.why})"))
    if made.fit is not None and made.fit.lacking:
        gates = shlex.join(["phatgoose", "gate", "--pool", str(folder), "--missing", "--generated"])
        without = shlex.join(["phatgoose", "pool", "remove", str(folder), *made.fit.lacking])
        rows.append(("for gander", f"`{gates}` gives them gates; or `{without}`"))
    reasons = by_reason(made.left_out)
    rows += [(f"left out, {len(made.left_out)}" if not i else "", text) for i, text in enumerate(reasons)]
    words = [str(folder)]
    next_ = [("next", shlex.join(["phatgoose", "serve", "--pool", *words]))]
    next_.append(("or", f'{shlex.join(["phatgoose", "generate", "--pool", *words])} "PROMPT"'))
    if made.base is None:
        next_ = [("next", f"{shlex.join(['phatgoose', 'pool', 'base', *words])} BASE"), ("then", next_[0][1])]
    show.facts([*rows, *next_])


def _gates_fact(pool: phatgoose.Pool) -> str:
    gated = sum(expert.gates is not None for expert in pool.experts)
    if gated == len(pool):
        return "all have them"
    return f"{gated} of {len(pool)} have them" if gated else "none"


def _base_fact(made: Collected) -> str:
    if made.base is None:
        return "unknown: no adapter names one"
    if made.not_at_hand is None:
        return f"{made.base}; its fingerprint is recorded"
    if made.pool.base is not None:
        return f"{made.base}; the experts record its fingerprint"
    return (
        f"{made.base}, by its name alone ({made.not_at_hand.rstrip('.')}): its fingerprint is recorded when the pool "
        "is first used. If it is elsewhere: `phatgoose pool base POOL BASE`"
    )


def _kinds(experts: Sequence[phatgoose.Expert]) -> str:
    """ "10 LoRA of rank 4 and 8; 2 (IA)³"."""
    found: dict[str, list[phatgoose.Expert]] = {}
    for expert in experts:
        found.setdefault(" + ".join(sorted({u.kind for u in expert.updates.values()})), []).append(expert)
    texts = []
    for kind, group in found.items():
        widths = sorted({u.width for expert in group for u in expert.updates.values()} - {0})
        texts.append(f"{len(group)} {kind}" + (f" of rank {', '.join(map(str, widths))}" if widths else ""))
    return "; ".join(texts)


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


def _warn_by_kind(warned: Iterable[Warned]) -> None:
    """Warnings of a new pool, one line a kind. What its summary says isn't said again."""
    from phatgoose.experts.health import NO_BASE, NO_GATES, by_kind

    _warn(by_kind(w for w in warned if w.text not in (NO_BASE, NO_GATES)))


def _count(experts: int) -> str:
    return f"{experts} expert" + ("" if experts == 1 else "s")
