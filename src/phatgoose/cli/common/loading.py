"""Load a base, and attach the pool and router that the command line names (imports torch)."""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from phatgoose.cli.common.options import DEFAULT_BASE, BackendOptions, BaseOptions
from phatgoose.cli.measure import show
from phatgoose.errors import (
    BaseModelError,
    ExpertError,
    PhatgooseError,
    PoolError,
    RoutingError,
    StorageError,
    brief,
)
from phatgoose.experts.files.tokenizer_files import differences
from phatgoose.experts.manifest import base_of, read_manifest
from phatgoose.experts.packed.expert import PackedExpert
from phatgoose.experts.pool import Pool
from phatgoose.experts.pool_folder import record_base
from phatgoose.models.attach.attach import Routing, cache_use, route_with, routing_of, unroute
from phatgoose.models.attach.fitting import fit_router
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base
from phatgoose.models.base.load import load_base
from phatgoose.models.base.without_weights import check_mixture
from phatgoose.ops import backend as find_backend
from phatgoose.records import Fingerprint
from phatgoose.routers.parse import System, parse_system


@dataclass(frozen=True)
class Choice(System):
    """What the command line names as a router."""

    options: RouteOptions = field(default_factory=RouteOptions)
    """The backend, and what the pool may take of the device."""


def load(spec: str, dtype: str = "auto", device: str = "auto") -> Base:
    """`load_base` on the command line's device; prints the base's notes."""
    transformers_logging.disable_progress_bar()
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    base = load_base(spec, dtype=dtype, device=device)
    for text in base.notes:
        show.note(f"note: {text}")
    return base


def load_for(pool: Pool | None, options: BaseOptions, folder: Path | None = None) -> Base:
    """The base for a pool: the one that is asked for, else the one that the pool records, or the default base without
    a pool.

    Args:
        folder: of the pool, whose manifest names a base even if the pool is empty (`pool` is then None).
    """
    recorded = None
    if options.base is None and pool is not None:
        recorded = pool.base_spec
        if recorded is None:
            raise _no_base(pool, folder)
    elif options.base is None and folder is not None:
        found = base_of(read_manifest(folder), folder)
        recorded = found.spec if isinstance(found, Fingerprint) else found
    spec = options.base if recorded is None else recorded
    if spec is None or (pool is None and not spec):
        spec = DEFAULT_BASE
    try:
        if pool is not None:
            check_mixture(spec, pool)
        base = load(spec, options.dtype, options.device)
    except BaseModelError as error:
        if recorded is None:
            raise
        raise _not_here(recorded, error, folder) from error
    if pool is not None:
        for text in differences({e.name: e.provenance for e in pool.experts}, base.tokenizer):
            show.note(f"note: {text}")
    return base


def _no_base(pool: Pool, folder: Path | None) -> PhatgooseError:
    """The refusal to guess a base that is recorded nowhere."""
    if folder is None:
        why = (
            f"expert {pool.experts[0].name!r} doesn't record its base"
            if len(pool) == 1
            else "no base is recorded"
        )
        return ExpertError(f"{why}: say which one with --base.")
    names = sorted({e.base_name for e in pool.experts if e.base_name is not None})
    why = f"the experts name {', '.join(map(brief, names[:3]))}" if names else "no expert names one"
    return PoolError(
        f"{folder} records no base ({why}): say which one with --base, or once and for all with "
        f"`{shlex.join(['phatgoose', 'pool', 'base', str(folder)])} BASE`."
    )


def _not_here(spec: str, error: BaseModelError, folder: Path | None) -> BaseModelError:
    """Why a recorded base can't be loaded, and what to type."""
    once = "say where with --base"
    if folder is not None:
        once += f", or once and for all with `{shlex.join(['phatgoose', 'pool', 'base', str(folder)])} BASE`"
    if os.path.isabs(spec) and not os.path.exists(spec):
        why = f"{brief(spec)} is a folder of another machine, or was moved."
    else:
        why = str(error)
    return BaseModelError(f"the recorded base can't be loaded here: {why} If it is elsewhere, {once}.")


def load_routed(
    folder: Path | None, router: str | None, base: BaseOptions, backend: BackendOptions
) -> tuple[Base, Pool | None, Choice]:
    """(the base, already routed; its pool; how it is routed), as the command's options say."""
    model, pool, (choice,) = load_with_choices(folder, [router], base, backend.route_options)
    attach(model, pool, choice)
    return model, pool, choice


def load_with_choices(
    folder: Path | None,
    routers: Sequence[str | None],
    base: BaseOptions,
    options: RouteOptions,
    *,
    shared: bool = False,
) -> tuple[Base, Pool | None, list[Choice]]:
    """(the base; its pool; how it is to be routed, one choice for each of `routers`), as the command's options say.

    With a pool, it is noted in one line which base and routers these are, and why.

    Args:
        routers: None or empty: the one that fits.
        shared: several requests are to run in one pass.
    """
    pool = load_pool(folder)
    # What is refused, is refused before the base is loaded.
    given = [choose(text, pool, options) if text else None for text in routers]
    find_backend(options.backend)
    if options.device_memory is not None and pool is None:
        raise RoutingError("--device-memory is for a pool's experts: give --pool.")
    model = load_for(pool, base, folder)
    if pool is None:
        return model, None, [choice or choose("base", None, options) for choice in given]
    if folder is not None and base.base is None:
        record_first_use(folder, pool, model)
    why = "--router"
    if None in given:
        fit = fit_router(model, pool, options, shared=shared)
        own, why = choose(fit.text, pool, options), fit.why
        if fit.lacking and folder is not None:
            gates = shlex.join(["phatgoose", "gate", "--pool", str(folder), "--missing", "--generated"])
            why += f"; once they have gates, gander: `{gates}`"
    choices = [choice or own for choice in given]
    show_choice(model, base, ", ".join(dict.fromkeys(choice.text for choice in choices)), why)
    return model, pool, choices


def record_first_use(folder: Path, pool: Pool, model: Base) -> None:
    """Records the fingerprint of the base that a pool only names, and whose modules it was found to fit."""
    if pool.base is not None:
        return
    try:
        fit_router(model, pool)
    except RoutingError as error:
        hint = f"`{shlex.join(['phatgoose', 'pool', 'remove', str(folder)])} NAME` takes an expert out of the pool."
        raise RoutingError(f"{error} {hint}") from error
    try:
        record_base(folder, model.fingerprint)
    except (BaseModelError, StorageError) as error:
        show.note(f"note: the base's fingerprint isn't recorded in {folder}: {error}")
    else:
        show.note(f"the base's fingerprint is recorded in {folder}: from now on, other bases are refused")


def show_choice(model: Base, options: BaseOptions, routers: str, why: str) -> None:
    """Notes which base a pool is on, how it is routed, and why."""
    origin = "recorded in the pool" if options.base is None else "--base"
    show.note(f"base: {model.spec} ({origin}); router: {routers} ({why})")


def load_pool(folder: Path | None) -> Pool | None:
    """The pool, verified. Warnings about it are printed by `pool verify` alone."""
    return None if folder is None else Pool.load(folder)


def choose(text: str, pool: Pool | None, options: RouteOptions) -> Choice:
    """What `text` means for this pool, checked as far as possible without a base."""
    system = parse_system(text)
    if system.router is not None and pool is None:
        raise RoutingError(f"router {text!r} needs experts: give --pool.")
    if system.router is not None and system.merge is None and pool is not None:
        system.router.check(pool.names)
    return Choice(system.text, system.router, system.merge, options)


def attach(base: Base, pool: Pool | None, choice: Choice) -> None:
    """Makes the base answer as `choice` says."""
    if choice.router is None or pool is None:
        unroute(base)
        return
    experts, router = choice.on(pool)
    assert experts is not None
    route_with(base, experts, router, choice.options)
    routing = routing_of(base)
    assert routing is not None
    show_copied(routing)


def show_cache_use(base: Base) -> dict[str, object]:
    """Notes how well the experts fitted into --device-memory, if that was given; returns the same for results."""
    if (use := cache_use(base)) is None:
        return {}
    experts = use.experts
    asked = max(1, experts.hits + experts.misses)
    show.note(
        f"device memory: {use.resident_bytes / 1e6:.1f} MB always, {use.cache_bytes / 1e6:.1f} MB for experts used "
        f"last, of {use.pool_bytes / 1e6:.1f} MB that all would take; {100 * experts.hits / asked:.1f} % of "
        f"{asked:,} needed experts were there, "
        f"{(experts.bytes_copied + use.gates.bytes_copied) / 1e6:.1f} MB were copied."
    )
    return {"device_memory": asdict(use)}


def show_copied(routing: Routing) -> None:
    """Notes which experts name modules otherwise than this model, and which rows of a packed pool had to be copied."""
    for name, paths in routing.renamed.items():
        own, here = next(iter(paths.items()))
        _note_once(f"note: {name} names its modules in another layout: {own} is taken for {here}")
    packed = any(isinstance(e, PackedExpert) for e in routing.pool.experts)
    if packed and (copied := routing.copied):
        first = next(iter(copied))
        _note_once(
            f"note: at {len(copied)} of {len(routing.sites)} modules the packed rows are copied into memory "
            f"({first}: {copied[first]})"
        )


_note_once = functools.cache(show.note)
