"""One routed model that several threads run at once: each gets what it would get alone."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_adapterhub_zoo import base_of, expert_of

from encoder_fixtures import make_encoder, signed
from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import prompted, route
from phatgoose.models.trace.record import trace
from phatgoose.routers import PHATGOOSE, Random, Retrieval, Single

THREADS, TURNS = 4, 12


@pytest.fixture(autouse=True)
def switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def inputs_of(thread):
    """Of other lengths in every thread, so that what is mixed up is wrong or fails."""
    generator = torch.Generator().manual_seed(thread)
    return torch.randint(2, 24, (1 + thread % 2, 5 + 3 * thread), generator=generator)


def check(run):
    """`run` of a thread's number, alone and beside others, is the same."""
    alone = [run(thread) for thread in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as threads:
        for _ in range(TURNS):
            for one, found in zip(alone, threads.map(run, range(THREADS)), strict=True):
                torch.testing.assert_close(found, one, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("router", [Random(seed=3), PHATGOOSE()], ids=repr)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_threads_route_their_own_tokens(make_base, make_expert, family, router):
    base = make_base(family)
    route(base, Pool([make_expert(base, f"e{i}", seed=i) for i in range(3)]), router)

    @torch.no_grad()
    def run(thread):
        ids = inputs_of(thread)
        more = {"decoder_input_ids": ids[:, :4]} if family == "t5" else {}
        return base.model(input_ids=ids, **more).logits

    check(run)


@pytest.mark.parametrize("case", ["llama/pfeiffer", "llama/parallel"])
def test_threads_read_their_own_residual_stream(case):
    model = base_of("llama")
    route(model, Pool([expert_of(case)]), Single(0), any_base=True)

    @torch.no_grad()
    def run(thread):
        return model(input_ids=inputs_of(thread)).logits

    check(run)


@pytest.mark.parametrize("told", [False, True])
def test_threads_read_their_own_prompts(make_base, make_expert, tmp_path, told):
    base, folder = make_base("llama"), make_encoder(tmp_path / "encoder")
    experts = [signed(make_expert(base, f"e{i}", seed=i), folder, seed=i) for i in range(3)]
    route(base, Pool(experts), Retrieval(encoder=str(folder)))

    @torch.no_grad()
    def run(thread):
        ids = inputs_of(thread)
        prompts = [row[: 2 + thread].tolist() for row in ids] if told else []
        with prompted(base, prompts):
            first = base.model(input_ids=ids[:, :-1], use_cache=True)
            return base.model(input_ids=ids[:, -1:], past_key_values=first.past_key_values).logits

    check(run)


@pytest.mark.parametrize("router", [Random(seed=3), PHATGOOSE()], ids=repr)
def test_a_trace_records_one_thread_and_refuses_a_second(make_base, make_expert, router):
    base = make_base("llama")
    route(base, Pool([make_expert(base, f"e{i}", seed=i) for i in range(3)]), router)

    @torch.no_grad()
    def run(thread):
        return base.model(input_ids=inputs_of(thread)).logits

    with trace(base, margins=False) as recorded:
        for thread in (1, 2):  # one after the other, as answers that are streamed
            one = threading.Thread(target=run, args=(thread,))
            one.start()
            one.join()
        run(3)
        with ThreadPoolExecutor(1) as other, pytest.raises(RoutingError, match="passes of one thread"):
            other.submit(run, 0).result()
    whole = sum(inputs_of(thread).numel() for thread in (1, 2, 3))
    assert all(len(choices.tokens) == whole for choices in recorded.choices)
    with trace(base, margins=False) as recorded, ThreadPoolExecutor(1) as other:
        other.submit(run, 0).result()
    assert len(recorded.choices[0].tokens) == inputs_of(0).numel()
