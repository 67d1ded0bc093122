"""Requests that Gander routes, among others: tokens are those of route(...).generate() and of a plain reference."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
import torch
from serving_fixtures import PROMPTS, greedy, make_pool, running, settings
from test_engines import GREEDY, finish, served, with_service

from gander_oracle import Oracle
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.trace.record import trace
from phatgoose.routers import PHATGOOSE, Gander, Single
from phatgoose.serving.engine.engine import GenerationJob
from phatgoose.serving.engine.sampling import SequenceSampler
from phatgoose.serving.service import Service

NAME, GANDER = "gander:half_life=4", Gander(half_life=4)
ROUTERS = {
    NAME: GANDER,
    "base": None,
    "gander:top_k=2": Gander(top_k=2),
    "phatgoose": PHATGOOSE(),
    "b": Single("b"),
}
LONG = "one two three four five six seven eight nine ten eleven twelve " * 4
ENGINES = [("llama", "continuous"), ("gpt2", "continuous"), ("llama", "batches"), ("t5", "batches")]
KINDS = [("llama", "continuous"), ("llama", "batches"), ("t5", "batches")]


@pytest.fixture
def made(make_base, make_expert):
    def make(family="llama", names="abc"):
        base = make_base(family, layers=4)
        return base, make_pool(base, make_expert, names)

    return make


@pytest.mark.slow(6)
@pytest.mark.parametrize(("family", "engine"), ENGINES)
def test_tokens_are_generates_alone_and_among_others(made, family, engine):
    base, pool = made(family)
    prompts = [*PROMPTS, LONG]
    assert len(base.tokenizer(LONG)["input_ids"]) > 2 * 24  # read in three passes
    asked = [(prompt, model) for prompt in prompts for model in ROUTERS]
    together = with_service(base, pool, lambda s: served(s, asked), router="phatgoose", engine=engine)
    oracle = Oracle(base, pool, half_life=4)
    unlike = 0
    for (prompt, model), found in zip(asked, together, strict=True):
        router = ROUTERS[model]
        unroute(base) if router is None else route(base, pool, router)
        assert found == greedy(base, prompt)
        unroute(base)
        if model == NAME:
            assert found == oracle.greedy(base.tokenizer(prompt)["input_ids"], 12)
            unlike += found != greedy(base, prompt)
    assert unlike > 2


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_prompts_are_scored_by_what_was_read_up_to_each_token(made, engine):
    base, pool = made()
    prompts = [list(range(10, 70)), list(range(100, 130)), [9, 8], [5]]

    async def do(service):
        way = await service.experts.route(service.experts.state, NAME)
        jobs = [
            GenerationJob(p, way, SequenceSampler(GREEDY), 3, service.end_tokens, top_prompt_logprobs=s)
            for p in prompts
            for s in (0, None)
        ]
        await asyncio.gather(*(finish(service.engine, job) for job in jobs))
        return jobs

    oracle = Oracle(base, pool, half_life=4)
    for job in with_service(base, pool, do, engine=engine):
        wanted = torch.log_softmax(oracle.logits(job.prompt).double(), -1)
        if job.top_prompt_logprobs is not None:
            found = [one.logprob for one in job.prompt_logprobs]
            assert found == pytest.approx(
                [float(wanted[i, t]) for i, t in enumerate(job.prompt[1:])], abs=1e-3
            )
        assert job.output[0] == int(wanted[-1].argmax())


@pytest.mark.parametrize(("family", "engine"), KINDS)
def test_who_acted_is_what_a_trace_records(made, family, engine):
    base, pool = made(family)

    async def do(service):
        way = await service.experts.route(service.experts.state, NAME)
        jobs = [
            GenerationJob(
                await service.prompts.encode(p),
                way,
                SequenceSampler(GREEDY),
                5,
                frozenset(),
                track_experts=True,
            )
            for p in (*PROMPTS, LONG)
        ]
        await asyncio.gather(*(finish(service.engine, job) for job in jobs))
        return jobs

    for job in with_service(base, pool, do, engine=engine):
        route(base, pool, GANDER)
        with trace(base, histogram=True) as recorded:
            greedy(base, list(job.prompt), 5)
        unroute(base)
        total = sum(load.weight[:, :3] for load in recorded.loads.values()).sum(0)
        mine = sum(job.expert_loads[phase][0] for phase in ("prompt", "answer"))
        torch.testing.assert_close(mine, total, atol=1e-3, rtol=1e-3)
        if family == "llama":  # in one of four blocks, which is read, nobody acts
            weights, choices = job.expert_loads["prompt"]
            assert choices == len(job.prompt) * len(pool.modules)
            assert float(weights.sum()) == pytest.approx(choices * 3 / 4)


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_experts_come_and_go_while_it_answers(made, make_expert, engine):
    """A request keeps the experts that it began with, and its evidence."""
    base, pool = made("llama", "abcd")
    ids = list(range(10, 40))

    async def do(service):
        async def begun(model=None):
            way = await service.models._resolve(service.experts.state, model)
            job = GenerationJob(ids, way.route, SequenceSampler(GREEDY), 40, frozenset())
            task = asyncio.ensure_future(finish(service.engine, job))
            while not job.output:
                await asyncio.sleep(0.005)
            return task

        experts, found = service.experts, []
        with experts.pin(experts.state.version):
            found.append(await begun())
            await service.changes.remove("d")
            with experts.pin(experts.state.version):
                found += [await begun(), await begun("phatgoose")]
                await service.changes.switch("a", on=False)
                found.append(await begun())
                await service.changes.switch("a", on=True)
                found.append(await begun())
                return await asyncio.gather(*found)

    found = with_service(base, pool, do, router=NAME, engine=engine)
    less = pool.remove("d")
    for tokens, own in zip(found, (pool, less, less, less.remove("a"), less), strict=True):
        route(base, own, GANDER)
        config = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
        assert tokens == base.model.generate(torch.tensor([ids]), **config)[0, len(ids) :].tolist()
    assert len({tuple(tokens) for tokens in found}) == 3


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_a_routers_reference_text_leaves_running_requests_alone(made, engine):
    base, pool = made()

    async def do(service):
        way = await service.experts.route(service.experts.state, NAME)
        job = GenerationJob([5, 6, 7], way, SequenceSampler(GREEDY), 60, frozenset())
        task = asyncio.ensure_future(finish(service.engine, job))
        for other in ("gander:half_life=9", "weight-only", "gander:layers=2"):
            seen = len(job.output)
            while len(job.output) == seen:
                await asyncio.sleep(0.005)
            await service.experts.route(service.experts.state, other)
        return await task

    found = with_service(base, pool, do, engine=engine)
    route(base, pool, GANDER)
    config = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 0}
    assert found == base.model.generate(torch.tensor([[5, 6, 7]]), **config)[0, 3:].tolist()


def test_a_sequence_begins_beside_one_that_goes_on(made):
    """Both with one token of a pass: a special one, which is no evidence, and one behind text."""
    base, pool = made()
    prompts = [[1], [1, 1, 9], [1, 1]]

    async def do(service):
        way = await service.experts.route(service.experts.state, NAME)
        running = GenerationJob([5, 6, 7], way, SequenceSampler(GREEDY), 400, frozenset())
        task = asyncio.ensure_future(finish(service.engine, running))
        while not running.output:
            await asyncio.sleep(0.005)
        jobs = [GenerationJob(p, way, SequenceSampler(GREEDY), 12, service.end_tokens) for p in prompts]
        found = [await finish(service.engine, job) for job in jobs]
        assert not task.done()
        service.engine.cancel(running)
        task.cancel()
        return found

    found = with_service(base, pool, do, engine="continuous")
    route(base, pool, GANDER)
    assert found == [greedy(base, prompt) for prompt in prompts]


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_what_is_kept_of_a_request_goes_with_it(made, engine):
    base, pool = made()

    async def do(service):
        way = await service.experts.route(service.experts.state, NAME)
        kept = []
        for cancelled in (False, True):
            job = GenerationJob(list(range(9, 50)), way, SequenceSampler(GREEDY), 20, frozenset())
            service.engine.submit(job)
            async for update in job.updates():
                if cancelled:
                    service.engine.cancel(job)
                    break
                if update.finished:
                    break
            state = job.memory.state
            assert state.untyped_storage().nbytes() == state.nbytes < 4 * (len(pool) + 9)  # no pass's
            del state
            kept.append(weakref.ref(job.memory))
            del job
        await served(service, [(PROMPTS[0], "base")])  # the pass after
        await asyncio.to_thread(service.engine.run_between_passes, gc.collect)
        assert [one() for one in kept] == [None, None]

    with_service(base, pool, do, engine=engine)


@pytest.mark.parametrize(("family", "engine"), KINDS)
def test_over_http(made, family, engine):
    base, pool = made(family)
    wanted = {}
    for prompt in PROMPTS:
        route(base, pool, GANDER)
        wanted[prompt] = base.tokenizer.decode(greedy(base, prompt), skip_special_tokens=True)
    unroute(base)
    with (
        running(Service(base, settings(engine=engine), pool=pool, router=NAME)) as server,
        server.client() as client,
        server.http() as http,
    ):
        assert [m.id for m in client.models.list()] == ["phatgoose", "base", "a", "b", "c"]
        assert client.models.retrieve(NAME).id == NAME
        ask = {"max_tokens": 12, "temperature": 0}
        for model in ("phatgoose", NAME):
            both = client.completions.create(model=model, prompt=list(PROMPTS), n=2, **ask).choices
            assert [one.text for one in both] == [wanted[p] for p in PROMPTS for _ in range(2)]
        parts = client.completions.create(model=NAME, prompt=PROMPTS[0], stream=True, **ask)
        assert "".join(part.choices[0].text for part in parts) == wanted[PROMPTS[0]]
        told = client.completions.create(
            model=NAME, prompt=PROMPTS[0], extra_body={"phatgoose": {"experts": True}}, **ask
        )
        shares = told.choices[0].phatgoose["experts"]["prompt"]
        assert 0 < sum(one["share"] for one in shares) < 1
        refused = http.post("/v1/completions", json={"model": "gander:layers=4", "prompt": "true"})
        assert refused.status_code == 400
        assert "set layers lower" in refused.json()["error"]["message"]
