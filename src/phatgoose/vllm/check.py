"""Check a pool against the base, as transformers knows it, before vLLM serves it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.fingerprints import check_same_base
from phatgoose.models.attach.modules import check_copies, module_at
from phatgoose.models.base.fingerprint import fingerprint
from phatgoose.models.base.without_weights import mapped_base
from phatgoose.models.moe.names import is_expert_path
from phatgoose.vllm.layers import bind, prepare_router, sample
from phatgoose.vllm.settings import Settings


def check(settings: Settings, base: str, revision: str | None = None) -> dict[str, tuple[float, ...]]:
    """Refuses what can't be served, before vLLM loads anything.

    Args:
        base: the folder or Hub id that vLLM serves.

    Returns: a few of the base's weights for each module that the pool adapts, by its path.

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
            bind(pool, router, path)
            samples[path] = sample(module, path)
        pool.release_gates()
        return samples


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
