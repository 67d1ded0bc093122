"""What the tests of the live page run on: a tiny base with three experts, and a server of its own."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from ui_tools import serving

from phatgoose.experts.pool import Pool
from phatgoose.ui.session import Session


@pytest.fixture
def pool_of(make_expert):
    """pool_of(base) → experts a, b and c; c adapts a part of the modules only."""

    def make(base):
        some = {"llama": ["q_proj", "v_proj"], "t5": ["q", "k"]}[base.spec.split("-")[1]]
        parts = {"a": {"seed": 1}, "b": {"seed": 2, "rank": 3}, "c": {"seed": 3, "targets": some}}
        return Pool([make_expert(base, name, scale=0.4, **settings) for name, settings in parts.items()])

    return make


@pytest.fixture
def make_session(make_base, pool_of):
    """make_session(family, **settings) → a Session of a fresh tiny base."""

    def make(family="llama", **settings):
        base = make_base(family)
        return Session(base, pool_of(base), **settings)

    return make


@pytest.fixture
def served():
    """served(session) → its address."""
    with ExitStack() as stack:
        yield lambda session: stack.enter_context(serving(session))
