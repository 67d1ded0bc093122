"""Served tokens are those of route(...).generate(), alone and among many others that go other ways."""

from __future__ import annotations

import asyncio
import copy
import threading

import pytest
import torch
from serving_fixtures import PROMPTS, greedy, make_pool, settings

from architectures import make
from conftest import make_tokenizer
from encoder_fixtures import make_encoder, signed
from phatgoose.errors import PhatgooseError, RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.base.base import Base
from phatgoose.models.batched.plan import BatchPlan
from phatgoose.models.batched.version import Route
from phatgoose.models.trace.record import trace
from phatgoose.routers import PHATGOOSE, Retrieval, Router, Single, SoftCentroid, Uniform
from phatgoose.routers import ROUTERS as NAMES
from phatgoose.routers.router import BoundRouter
from phatgoose.serving.engine import attention
from phatgoose.serving.engine import batched as batches
from phatgoose.serving.engine import continuous_hooks as passes
from phatgoose.serving.engine.batched import BatchEngine
from phatgoose.serving.engine.continuous import ContinuousEngine, obstacle
from phatgoose.serving.engine.engine import GenerationJob
from phatgoose.serving.engine.sampling import SamplingParams, SequenceSampler
from phatgoose.serving.errors import ServingError
from phatgoose.serving.service import Service

GREEDY = SamplingParams(temperature=0)
ROUTERS = {
    "phatgoose": PHATGOOSE(), "base": None, "a": Single("a"), "c": Single("c"), "phatgoose:top_k=1": PHATGOOSE(top_k=1),
    "uniform": Uniform(),
}  # fmt: skip
ENGINES = [
    ("llama", "continuous"),
    ("qwen", "continuous"),
    ("gpt2", "continuous"),
    ("llama", "batches"),
    ("t5", "batches"),
]


async def finish(engine, job):
    engine.submit(job)
    async for news in job.updates():
        assert news.error is None, news.error
    return job.output


async def served(service, asked, new=12, **more):
    """The tokens of each (prompt, model) asked, all at once."""

    async def one(prompt, model):
        async with service.models.resolve(model) as found:
            ids = await service.prompts.encode(prompt)
            job = GenerationJob(ids, found.route, SequenceSampler(GREEDY), new, service.end_tokens, **more)
            return await finish(service.engine, job)

    return await asyncio.gather(*(one(*pair) for pair in asked))


def with_service(base, pool, do, router="phatgoose", **changes):
    async def run():
        service = Service(base, settings(**changes), pool=pool, router=router)
        await service.start()
        try:
            return await do(service)
        finally:
            await service.stop()

    return asyncio.run(run())


@pytest.mark.slow(6)
@pytest.mark.parametrize(("family", "engine"), ENGINES)
def test_tokens_are_generates_alone_and_among_others(make_base, make_expert, family, engine):
    base = make_base(family)
    pool = make_pool(base, make_expert)
    asked = [(prompt, model) for prompt in PROMPTS for model in ROUTERS]

    async def do(service):
        alone = [await served(service, [pair]) for pair in asked[:6]]
        return alone, await served(service, asked)

    alone, together = with_service(base, pool, do, engine=engine)
    wanted = {}
    for model, router in ROUTERS.items():
        unroute(base) if router is None else route(base, pool, router)
        for prompt in PROMPTS:
            wanted[prompt, model] = greedy(base, prompt)
    assert [one[0] for one in alone] == [wanted[pair] for pair in asked[:6]]
    assert together == [wanted[pair] for pair in asked]
    assert len({tuple(wanted[PROMPTS[0], model]) for model in ROUTERS}) > 3  # they do differ


@pytest.mark.parametrize("name", ["recurrent_gemma", "rwkv", "lfm2"])
def test_requests_of_other_lengths_are_no_padding_to_a_recurrent_base(name):
    base = Base(make(name), make_tokenizer(), spec=name)
    prompts = [*PROMPTS, PROMPTS[0][::-1]]
    together = with_service(base, None, lambda service: served(service, [(p, "base") for p in prompts]))
    assert together == [greedy(base, prompt) for prompt in prompts]


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_layers_with_a_sliding_window_beside_others(make_expert, engine):
    """Gemma 3's. Every prompt with its answer is longer than the window of 4 tokens."""
    base = Base(make("gemma3_text"), make_tokenizer(), spec="tiny-llama")
    pool = make_pool(base, make_expert)
    asked = [(prompt, model) for prompt in PROMPTS for model in ROUTERS]
    together = with_service(base, pool, lambda service: served(service, asked), engine=engine)
    for (prompt, model), found in zip(asked, together, strict=True):
        router = ROUTERS[model]
        unroute(base) if router is None else route(base, pool, router)
        assert found == greedy(base, prompt)


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_cancelled_jobs_free_their_place(make_base, make_expert, engine):
    base = make_base("llama")

    async def do(service):
        jobs = [GenerationJob([5 + i], None, SequenceSampler(GREEDY), 400, frozenset()) for i in range(20)]
        for job in jobs:
            service.engine.submit(job)
        async for _ in jobs[0].updates():
            break
        assert service.engine.running > 0
        assert service.engine.waiting > 0
        for job in jobs:
            service.engine.cancel(job)
            service.engine.cancel(job)  # once more does nothing
        assert service.engine.waiting == service.engine.running == 0
        (after,) = await served(service, [(PROMPTS[0], "base")])
        if engine == "continuous":
            manager = service.engine.manager
            assert not manager.output_router.result_handlers
            assert not manager.batch_processor.scheduler.active_requests
            await asyncio.to_thread(service.engine.run_between_passes, lambda: None)
            assert not manager.batch_processor.cache.cache_allocators["full_attention"].block_table
        return after

    assert with_service(base, None, do, engine=engine) == greedy(base, PROMPTS[0])


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_one_job_that_fails_leaves_the_others_alone(make_base, engine):
    base = make_base("llama")

    class Broken(SequenceSampler):
        def next_token(self, logits):
            raise ArithmeticError("broken")

    async def do(service):
        broken = GenerationJob([5, 6], None, Broken(SamplingParams()), 9, frozenset())
        good = GenerationJob([7, 8], None, SequenceSampler(GREEDY), 9, frozenset())
        service.engine.submit(broken)
        written = asyncio.ensure_future(finish(service.engine, good))
        news = [one async for one in broken.updates()]
        assert news[-1].error == "broken"
        assert await written == greedy(base, [7, 8], 9) or 1 in good.output
        assert service.engine.failure is None

    with_service(base, None, do, engine=engine)


@pytest.mark.parametrize(
    ("family", "engine"), [("llama", "continuous"), ("gpt2", "continuous"), ("llama", "batches")]
)
def test_prompts_are_scored_as_one_pass_scores_them(make_base, make_expert, monkeypatch, family, engine):
    monkeypatch.setattr(batches, "SCORED_ROWS", 25)
    base = make_base(family)
    pool = make_pool(base, make_expert)
    prompts = [[5] * 1, list(range(10, 70)), list(range(100, 130)), [9, 8]]  # longer than a pass, and shorter

    async def do(service):
        async with service.models.resolve("phatgoose") as way:
            jobs = [
                GenerationJob(p, w, SequenceSampler(GREEDY), 3, service.end_tokens, top_prompt_logprobs=2)
                for p in prompts
                for w in (way.route, None)
            ]
            await asyncio.gather(*(finish(service.engine, job) for job in jobs))
            return [(job.prompt, job.route is not None, job.prompt_logprobs) for job in jobs]

    for prompt, routed, scored in with_service(base, pool, do, engine=engine):
        route(base, pool) if routed else unroute(base)
        with torch.no_grad():
            wanted = torch.log_softmax(base.model(torch.tensor([prompt])).logits[0].double(), -1)
        assert [one.token for one in scored] == prompt[1:]
        for i, one in enumerate(scored):
            assert one.logprob == pytest.approx(float(wanted[i, prompt[i + 1]]), abs=1e-4)
            assert [lp for _, lp in one.top] == pytest.approx(wanted[i].topk(2).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_prompts_are_scored_by_routers_that_read_text(make_base, make_expert, tmp_path, engine):
    folder = make_encoder(tmp_path / "encoder", max_tokens=60)
    base = make_base("llama")
    pool = Pool([signed(make_expert(base, f"e{i}", seed=i, scale=0.4), folder, seed=i) for i in range(3)])
    ids = list(range(10, 20))

    async def do(service):
        way = await service.experts.route(service.experts.state, service.experts.router)
        scored = GenerationJob(
            ids, way, SequenceSampler(GREEDY), 2, service.end_tokens, top_prompt_logprobs=0
        )
        nothing = GenerationJob(
            [1], way, SequenceSampler(GREEDY), 2, service.end_tokens, top_prompt_logprobs=0
        )  # special tokens only: no text
        await asyncio.gather(finish(service.engine, scored), finish(service.engine, nothing))
        return [one.logprob for one in scored.prompt_logprobs]

    found = with_service(base, pool, do, engine=engine, router=f"retrieval:encoder={folder}")
    route(base, pool, Retrieval(str(folder)))
    with torch.no_grad():
        wanted = torch.log_softmax(base.model(torch.tensor([ids])).logits[0].double(), -1)
    assert found == pytest.approx([float(wanted[i, t]) for i, t in enumerate(ids[1:])], abs=1e-4)


def test_a_prompt_that_cannot_be_scored_takes_nobody_with_it(make_base, make_expert):
    base = make_base("llama")

    async def do(service):
        way = Route(service.experts.state.version, Fussy())
        bad = GenerationJob(
            [77, 5], way, SequenceSampler(GREEDY), 4, service.end_tokens, top_prompt_logprobs=0
        )
        good = [
            GenerationJob([5, 6], way, SequenceSampler(GREEDY), 4, service.end_tokens, top_prompt_logprobs=s)
            for s in (None, 0)
        ]
        service.engine.submit(bad)
        written = await asyncio.gather(*(finish(service.engine, job) for job in good))
        news = [one async for one in bad.updates()]
        assert news[-1].error == "IndexError"
        assert not service.engine.jobs
        return written

    one, other = with_service(base, make_pool(base, make_expert), do, engine="batches")
    assert one == other


@pytest.mark.parametrize(
    ("family", "engine"), [("llama", "continuous"), ("llama", "batches"), ("t5", "batches")]
)
def test_who_acted_is_what_a_trace_records(make_base, make_expert, family, engine):
    base = make_base(family)
    pool = make_pool(base, make_expert)

    async def do(service):
        found = {}
        async with service.models.resolve("phatgoose") as way:
            jobs = [
                GenerationJob(
                    await service.prompts.encode(p),
                    way.route,
                    SequenceSampler(GREEDY),
                    5,
                    frozenset(),
                    track_experts=True,
                )
                for p in PROMPTS
            ]
            await asyncio.gather(*(finish(service.engine, job) for job in jobs))
            found = {tuple(job.prompt): (job.expert_loads, job.output) for job in jobs}
        return found, service.metrics.text().decode()

    found, metrics = with_service(base, pool, do, engine=engine)
    modules = len(pool.modules)
    for prompt, (load, written) in found.items():
        route(base, pool)
        with trace(base, histogram=True) as recorded:
            greedy(base, list(prompt), 5)
        total = sum(load_.weight[:, :3] for load_ in recorded.loads.values())  # [prompt and answer, experts]
        mine = sum(load[phase][0] for phase in ("prompt", "answer"))
        torch.testing.assert_close(mine, total.sum(0), atol=1e-3, rtol=1e-3)
        if family != "t5":
            assert load["prompt"][1] == len(prompt) * modules
            assert load["answer"][1] == (len(written) - 1) * modules
    assert 'phatgoose_expert_weight_total{expert="a"}' in metrics


@pytest.mark.parametrize(
    ("family", "engine"), [("llama", "continuous"), ("llama", "batches"), ("t5", "batches")]
)
def test_routers_that_read_text_follow_prompt_and_answer(make_base, make_expert, tmp_path, family, engine):
    folder = make_encoder(tmp_path / "encoder", max_tokens=60)
    base = make_base(family)
    pool = Pool([signed(make_expert(base, f"e{i}", seed=i, scale=0.4), folder, seed=i) for i in range(3)])
    names = {
        f"retrieval:encoder={folder}": Retrieval(str(folder)),
        f"soft-centroid:encoder={folder}": SoftCentroid(str(folder)),
    }

    async def do(service):
        with pytest.raises(RoutingError, match="can't name an encoder"):
            await served(service, [(PROMPTS[0], next(iter(names)))])
        state = service.experts.state
        found = {}
        for name in names:
            way = await service.experts.route(state, name)
            jobs = [
                GenerationJob(
                    await service.prompts.encode(p), way, SequenceSampler(GREEDY), 8, service.end_tokens
                )
                for p in PROMPTS
            ]
            found[name] = await asyncio.gather(*(finish(service.engine, job) for job in jobs))
        return found

    found = with_service(base, pool, do, engine=engine, router="uniform", encoder=str(folder))
    for name, router in names.items():
        route(base, pool, router)
        assert found[name] == [greedy(base, p, 8) for p in PROMPTS]


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_no_pass_goes_by_experts_that_were_taken_off(make_base, make_expert, monkeypatch, engine):
    """The engine hears of a client that left only after the experts are gone, whom nobody else wanted."""
    base = make_base("llama")
    plans = []

    def planned(ways, *args, **more):
        plans.append(list(ways))
        return BatchPlan(ways, *args, **more)

    for module in (passes, batches):
        monkeypatch.setattr(module, "BatchPlan", planned)

    async def do(service):
        engine, loop = service.engine, asyncio.get_running_loop()
        way = await service.experts.route(service.experts.state, "uniform")
        gone = GenerationJob([5, 6], way, SequenceSampler(GREEDY), 60, frozenset())
        stays = GenerationJob([7, 8], None, SequenceSampler(GREEDY), 60, frozenset())
        engine.submit(gone)
        written = asyncio.ensure_future(finish(engine, stays))
        async for _ in gone.updates():
            break
        assert any(way in ways for ways in plans)

        def take_off():
            heard = threading.Event()
            loop.call_soon_threadsafe(lambda: (engine.cancel(gone), heard.set()))
            assert heard.wait(30)
            engine.multi_router.detach(way.version)
            plans.clear()

        await asyncio.to_thread(engine.run_between_passes, take_off)
        found = await written
        assert len(plans) > 1
        assert not any(way in ways for ways in plans)
        return found

    found = with_service(base, make_pool(base, make_expert), do, engine=engine)
    config = {"do_sample": False, "max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 0}
    assert found == base.model.generate(torch.tensor([[7, 8]]), **config)[0, 2:].tolist()


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_every_router_writes_or_is_refused_and_none_ends_the_engine(make_base, make_expert, engine):
    base = make_base("llama")
    pool = make_pool(base, make_expert)

    async def do(service):
        done = set()
        for name in NAMES:
            try:
                (tokens,) = await served(
                    service, [(PROMPTS[0], f"{name}:a" if name == "single" else name)], 3
                )
                assert tokens
                done.add(name)
            except PhatgooseError as refused:
                said = str(refused)
                assert "needs" in said, said
            assert service.engine.failure is None
        return done

    assert {"phatgoose", "uniform", "random", "single", "arrow"} <= with_service(
        base, pool, do, engine=engine
    )


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_a_router_is_calibrated_by_the_base_whoever_is_answering(make_base, make_expert, engine):
    """Its statistics are those of an idle server, while a sequence that goes by an expert is written."""
    base = make_base("llama")
    pool = Pool(
        [make_expert(base, n, rank=2 + i, seed=i, scale=0.3, gates=n != "c") for i, n in enumerate("abc")]
    )
    names = {
        None: "phatgoose:ungated=weights",
        "a": "phatgoose:top_k=2,ungated=weights",
    }  # one router, bound twice

    def sums(way):
        return torch.stack([bound.sums for bound in way.bound.values()])

    async def do(service):
        state, found = service.experts.state, []
        for single, name in names.items():
            if single is None:
                found.append(sums(await service.experts.route(state, name)))
                continue
            running = GenerationJob(
                [5, 6], Route(state.version, Single(single)), SequenceSampler(GREEDY), 300, frozenset()
            )
            written = asyncio.ensure_future(finish(service.engine, running))
            while not running.output:
                await asyncio.sleep(0.01)
            found.append(sums(await service.experts.route(state, name)))
            assert not written.done()
            service.engine.cancel(running)
            written.cancel()
        return found

    idle, busy = with_service(base, pool, do, engine=engine, router="uniform")
    torch.testing.assert_close(busy, idle)


class Fussy(Router):
    """Chooses the first expert, and fails where the tokens it is shown hold a 77."""

    def bind(self, candidates):
        return _Fussy()


class _Fussy(BoundRouter):
    def __call__(self, u, context, ops):
        if (context.tokens().ids == 77).any():
            raise IndexError("secret")
        return torch.zeros(len(u), 1, dtype=torch.long), torch.ones(len(u), 1)


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_a_way_that_fails_for_one_fails_for_nobody_else(make_base, make_expert, engine):
    base = make_base("llama")
    prompts = [[5, 6], [7, 8, 9], list(range(10, 40))]

    async def do(service):
        way, other = Route(service.experts.state.version, Fussy()), None
        async with service.models.resolve("phatgoose") as found:
            other = found.route

            def jobs():
                ways = [*([p, way] for p in prompts), [prompts[0], other], [prompts[0], None]]
                return [GenerationJob(p, w, SequenceSampler(GREEDY), 8, service.end_tokens) for p, w in ways]

            alone = [await finish(service.engine, job) for job in jobs()]
            # One that fails at once, and one that does so in the second of several passes over its prompt.
            bad = [
                GenerationJob(p, way, SequenceSampler(GREEDY), 8, service.end_tokens)
                for p in ([77, 5], [*range(100, 130), 77, 5, 6])
            ]
            for job in bad:
                service.engine.submit(job)
            together = await asyncio.gather(*(finish(service.engine, job) for job in jobs()))
            for job in bad:
                news = [one async for one in job.updates()]
                assert [one.error for one in news if one.finished] == [
                    "the router or its experts failed: IndexError"
                ]
                assert job.output == []
        assert service.engine.failure is None
        assert not service.engine.jobs
        return alone, together

    alone, together = with_service(base, make_pool(base, make_expert), do, engine=engine)
    assert together == alone
    assert len({tuple(one) for one in (alone[0], *alone[3:])}) == 3


@pytest.mark.parametrize("engine", ["continuous", "batches"])
def test_more_experts_than_the_pool_has_are_all_of_it(make_base, make_expert, engine):
    base = make_base("llama")
    asked = [PHATGOOSE(top_k=3), PHATGOOSE(top_k=2**31 - 1), PHATGOOSE(top_k=2**63)]

    async def do(service):
        version, found = service.experts.state.version, []
        ids = await service.prompts.encode(PROMPTS[0])
        for router in asked:
            job = GenerationJob(ids, Route(version, router), SequenceSampler(GREEDY), 8, service.end_tokens)
            found.append(await finish(service.engine, job))
        return found

    first, *others = with_service(base, make_pool(base, make_expert), do, engine=engine)
    assert others == [first, first]


def test_attention_of_packed_sequences_is_sdpas(make_base):
    base = make_base("llama")
    assert attention.is_supported(base.model)
    asked = [(prompt, "base") for prompt in PROMPTS]
    own = with_service(base, None, lambda s: served(s, asked))
    attention_of, attention.is_supported = attention.is_supported, lambda model: False
    try:
        assert with_service(base, None, lambda s: served(s, asked)) == own
    finally:
        attention.is_supported = attention_of
    ids = torch.randint(2, 300, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        wanted = base.model(ids, attention_mask=mask).logits
        base.model.set_attn_implementation(attention.register())
        torch.testing.assert_close(base.model(ids, attention_mask=mask).logits[1], wanted[1])
        torch.testing.assert_close(base.model(ids, attention_mask=mask).logits[0, 3:], wanted[0, 3:])


def test_bfloat16_serves(make_base, make_expert):
    base = make_base("llama", dtype=torch.bfloat16)
    pool = make_pool(base, make_expert)
    found = with_service(
        base, pool, lambda s: served(s, [(p, m) for p in PROMPTS for m in ("phatgoose", "base", "a")])
    )
    assert all(found)


def test_what_cannot_run_is_said(make_base):
    base = make_base("t5")
    assert "encoder–decoder" in obstacle(base)
    with pytest.raises(ServingError, match=r"encoder–decoders\. Use engine"):
        ContinuousEngine(base, settings(engine="continuous"))
    assert isinstance(Service(base, settings()).engine, BatchEngine)
    with pytest.raises(ServingError, match="too small"):
        ContinuousEngine(make_base("llama"), settings(cache_tokens=8))
    nameless = copy.copy(make_base("llama"))
    nameless.tokenizer = copy.deepcopy(nameless.tokenizer)
    nameless.tokenizer.eos_token = None
    with pytest.raises(ServingError, match="no end-of-sequence token"):
        Service(nameless, settings())


def test_a_cache_that_is_too_small_for_all_makes_them_wait(make_base):
    base = make_base("llama")
    asked = [(prompt, "base") for prompt in PROMPTS] * 3
    found = with_service(base, None, lambda s: served(s, asked, 40), cache_tokens=160)
    assert found == [greedy(base, p, 40) for p, _ in asked]
