"""Check a pool against the base, as transformers knows it, before vLLM serves it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.fingerprints import check_same_base
from phatgoose.models.attach.modules import check_copies, module_at
from phatgoose.models.attach.reference_text import Enough, calibrate
from phatgoose.models.attach.site import setup_of
from phatgoose.models.base.base import Base
from phatgoose.models.base.fingerprint import fingerprint
from phatgoose.models.base.load import find_source
from phatgoose.models.base.without_weights import mapped_base
from phatgoose.models.context.streams import Streams
from phatgoose.models.moe.names import is_expert_path
from phatgoose.ops import backend
from phatgoose.routers import Gander
from phatgoose.routers.gander import Reading
from phatgoose.vllm.layers import Checked, gates_at, low_rank_at, prepare_router, sample
from phatgoose.vllm.settings import Settings


def check(settings: Settings, base: str, revision: str | None = None) -> Checked:
    """Refuses what can't be served, before vLLM loads anything.

    Gander is shown the reference text here, by the base's first blocks in the dtype of its files.

    Args:
        base: the folder or Hub id that vLLM serves.

    Raises:
        PoolError, ExpertError: the pool is missing or damaged. BaseModelError: it is of another base, or the
            base can't be read.
        RoutingError: a module, an expert or the router can't be routed in vLLM.
    """
    with _one_thread():
        pool = Pool.load(settings.pool)
        router = prepare_router(settings.router, pool)
        model = mapped_base(base, revision)
        if pool.base is not None and not settings.any_base:
            check_same_base(pool.base, fingerprint(model, base), "the pool's experts")
        modules = dict(model.named_modules(remove_duplicate=False))
        check_copies(modules, pool.experts)
        samples = {}
        for path in pool.modules:
            if is_expert_path(path):
                raise RoutingError(
                    f"{path} is inside a mixture's experts, which can't be routed in vLLM: use `phatgoose "
                    "serve`, or adapters of the attention alone."
                )
            module = module_at(modules, path, pool)
            candidates = low_rank_at(pool, path, router.offers_null)
            if not isinstance(router, Gander):
                gates_at(candidates, router)
            samples[path] = sample(module, path)
        reading = None
        if isinstance(router, Gander):
            tokenizer = find_source(base, revision).tokenizer()
            reading = _calibrated(router, pool, Base(model, tokenizer, base))
        pool.release_gates()
        return Checked(samples, reading)


@dataclass(frozen=True, eq=False)
class _Read:
    """A module that Gander reads, as `calibrate` takes it."""

    path: str
    module: nn.Module
    embedding: bool = False


def _calibrated(router: Gander, pool: Pool, base: Base) -> Reading:
    """Gander for this pool, which was shown the reference text as `route` shows it."""
    if base.is_encoder_decoder:
        raise RoutingError(
            "Gander can't be served by vLLM on an encoder–decoder: use `phatgoose serve`, or choose another router."
        )
    model = base.model
    setup = setup_of(model, pool, Streams(model, remembers=True))
    reading = Reading.of(router, setup)
    modules = dict(model.named_modules(remove_duplicate=False))
    routers = [
        (_Read(path, module_at(modules, path, pool)), reading.bind(low_rank_at(pool, path, False)))
        for path in reading.read
    ]
    behind = {p: place.block for p, place in setup.places.items() if p not in reading.waiting}
    next_block = min((block, path) for path, block in behind.items() if block is not None)[1]
    end = module_at(modules, next_block, pool).register_forward_pre_hook(_end)
    try:
        calibrate(base, routers, backend("auto"))
    finally:
        end.remove()
    if router.doubt:
        reading.least(None)  # found by what plain text gave, which is let go then
    reading.release()
    return reading


def _end(*_: object) -> None:
    """A forward pre-hook on a module that needn't run."""
    raise Enough


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Runs torch on one thread: vLLM may fork this process, and the child would wait for threads that only the
    parent has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
