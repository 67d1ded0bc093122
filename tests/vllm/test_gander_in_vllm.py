"""Gander as vLLM's processes run it, without vLLM: against `route`, and on requests in pieces that share blocks."""

from __future__ import annotations

import pickle
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from layers_fixtures import MERGED, Ranks, linears
from test_steps import SIZE, metadata

from conftest import write_base
from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, routing_of, unroute
from phatgoose.models.base.load import load_base
from phatgoose.ops import backend
from phatgoose.ops.cpu import build
from phatgoose.routers import parse_router
from phatgoose.routers.context import PassMemory, Sequences
from phatgoose.routers.router import Candidates
from phatgoose.vllm import gander
from phatgoose.vllm.check import check
from phatgoose.vllm.layers import Layers
from phatgoose.vllm.settings import Settings

pytestmark = pytest.mark.skipif(build.reason() is not None, reason="the CPU kernel can't be compiled here")
PATH = "model.layers.0.self_attn.v_proj"


@pytest.fixture
def served(make_base, make_expert, tmp_path):
    """(the base's folder, the settings, what the front process hands on) of a tiny Llama and four unlike experts."""

    def make(router, *more):
        base = make_base("llama", layers=3)
        experts = [
            make_expert(base, "a", rank=4),
            make_expert(base, "b", rank=2, alpha=3, seed=1),
            make_expert(base, "c", rank=6, targets=["q_proj", "v_proj", "down_proj"], seed=2),
            make_expert(base, "d", rank=1, targets=["k_proj", "o_proj", "gate_proj"], seed=3, gates=False),
            *(make_expert(base, **one) for one in more),
        ]
        settings = Settings(str(Pool(experts).save(tmp_path / "pool")), router)
        folder = write_base(base, tmp_path / "base")
        return folder, settings, pickle.loads(pickle.dumps(check(settings, folder)))

    return make


def everybody(reading):
    members = tuple(range(reading.experts))
    return Candidates("there", tuple(map(str, members)), members, (), 0)


def context_of(given):
    """A stand-in for vLLM's forward context."""

    class Context:
        attn_metadata = None if given is None else {"layer": given}

    return Context()


@pytest.mark.parametrize(
    "router", ["gander", "gander:layers=2,top_k=2", "gander:doubt=true", "gander:top_k=9"]
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_layers_compute_what_route_does(served, monkeypatch, router, ranks):
    folder, settings, checked = served(router)
    base, ids = load_base(folder), [1, 1, 40, 41, 42, 43, 100, 7, 90]
    model = route(base, Pool.load(settings.pool), parse_router(router), backend_name="reference")
    for site in routing_of(model).sites:  # what it has observed is what `route` has
        if (reader := checked.reading.readers.get(site.path)) is not None:
            (one,), (other,) = reader.evidence, site.router.evidence
            assert torch.equal(one.sums, other.sums)
            assert torch.equal(one.span_norms.rows, other.span_norms.rows)
            assert torch.equal(one.span_norms.mean, other.span_norms.mean)
    seen = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda m, args, out, path=path: seen.update({path: (args[0][0], out[0])})
        )
        for path in checked.samples
    ]
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    unroute(base)
    threads = Ranks(ranks)
    whole = []
    for rank in range(ranks):
        layers = Layers(settings, checked, lambda path: path, lambda: SIZE, "cpu")
        layers.take_embedding(torch.nn.Identity())
        found = [(*one, layers.take(one[0], MERGED)) for one in linears(base.model, rank, ranks)]
        layers.check_taken()
        made = [
            (linear, weight.data, modules, layers.make(linear, parts, weight.data, threads.all_reduce(rank)))
            for linear, weight, modules, parts in found
        ]
        whole.append((layers.gander, made))
    passes = []
    for run, _ in whole:
        context = context_of(metadata([([3, 1, 2], 0, len(ids))], padding=1))
        passes.append((run.running(context), context))
        passes[-1][0].see(torch.tensor([*ids, 5]))
    names = {module: path for path, module in base.model.named_modules()}
    differ = 0
    for i, (linear, _, modules, _) in enumerate(whole[0][1]):
        paths = [names[m] for m in modules]
        u = F.pad(seen[paths[0]][0], (0, 0, 0, 1), value=3.0)
        outputs = []
        for rank, (_, made) in enumerate(whole):
            part, x = made[i], u.chunk(ranks, 1)[rank] if linear.splits_input else u
            monkeypatch.setattr(gander, "running", lambda rank=rank: passes[rank][0])
            y = F.linear(x, part[1])
            outputs.append((y, y if part[3] is None else part[3](x, y)))
        expected, plain = (
            [seen[p][1] for p in paths],
            [F.linear(seen[p][0], m.weight.detach()) for p, m in zip(paths, modules, strict=True)],
        )
        if linear.splits_input:
            found = [sum(after for _, after in outputs)]
        else:
            found, begin = [], 0
            for k, width in enumerate(linear.held_out):
                found.append(
                    torch.cat([o[1][:, begin : begin + width] for o in outputs[:: linear.replicas[k]]], 1)
                )
                begin += width
        for one, other, before, module in zip(found, expected, plain, modules, strict=True):
            torch.testing.assert_close(one[:-1], other, rtol=1e-4, atol=1e-4)
            differ += (other - before).norm() > 0.01 * before.norm()
            torch.testing.assert_close(
                one[-1:], F.linear(u[-1:], module.weight.detach())
            )  # nobody acts on padding
    assert differ > 5


class Pager:
    """Cuts sequences into steps as vLLM's scheduler does: in pieces, with shared full blocks, and sometimes anew."""

    def __init__(self, texts, seed):
        self.random, self.texts = random.Random(seed), texts
        self.free = list(range(1, 200))
        self.random.shuffle(self.free)
        self.full = {}  # the text of a full block, with all before it → the block
        self.done, self.blocks = [0] * len(texts), [[] for _ in texts]
        self.shared = self.shared_in_step = 0

    def step(self):
        """[(text, blocks, computed before, new)], with the blocks that this step fills shared within it."""
        found, now, many = [], set(), len(self.texts)
        first = not any(self.done)  # all texts, and the first one whole, which others share
        for i in range(many) if first else self.random.sample(range(many), self.random.randint(1, many)):
            text = self.texts[i]
            if self.random.random() < 0.1:  # preempted: it begins again, behind what is still known
                self.done[i], self.blocks[i] = 0, []
            if not self.done[i]:
                while (known := self.full.get(text[: self.done[i] + SIZE])) and self.done[i] + SIZE < len(
                    text
                ):
                    self.blocks[i].append(known)
                    self.done[i] += SIZE
                    self.shared += 1
                    self.shared_in_step += known in now
            left = len(text) - self.done[i]
            if not left:
                continue
            new = left if first and not i else self.random.choice([1, left, self.random.randint(1, left)])
            while len(self.blocks[i]) * SIZE < self.done[i] + new:
                self.blocks[i].append(self.free.pop())
            found.append((i, list(self.blocks[i]), self.done[i], new))
            self.done[i] += new
            for end in range(SIZE, self.done[i] + 1, SIZE):
                block = self.blocks[i][end // SIZE - 1]
                if self.full.setdefault(text[:end], block) == block and end > self.done[i] - new:
                    now.add(block)
        self.random.shuffle(found)
        return found


@pytest.mark.parametrize("router", ["gander", "gander:top_k=2,doubt=true"])
@pytest.mark.parametrize("seed", range(3))
def test_requests_in_pieces_are_read_as_whole_texts(served, router, seed):
    _, settings, checked = served(router, {"name": "e", "rank": 3, "seed": 5})
    reading, names = checked.reading, Pool.load(settings.pool).names
    assert len(reading.read) > 1  # one expert has no projection to values
    draw = random.Random(seed)
    begin = tuple(draw.randrange(2, 300) for _ in range(13))
    texts = [
        begin[:n] + tuple(draw.randrange(2, 300) for _ in range(k))
        for n, k in [(13, 9), (12, 3), (8, 1), (13, 9)]
    ]
    texts += [(1, 0, 1, *begin[:4]), (1,), texts[0]]
    # What a module sees of a token is made up, but the same for the same text.
    inputs = {
        path: [torch.stack([_vector(text[: t + 1], path) for t in range(len(text))]) for text in texts]
        for path in reading.read
    }
    whole = []
    run = gander.GanderRun(reading, names, lambda: SIZE, "cpu")
    for i, text in enumerate(texts):
        real, at = torch.ones(1, len(text), dtype=torch.bool), torch.arange(len(text))[None]
        memory = PassMemory(Sequences(torch.tensor([text]), at, real), lambda: None)
        for path in reading.read:
            reading.readers[path].in_whole_pass(inputs[path][i], memory, backend("auto"))
        whole.append(run.whole_pool.in_whole_pass(inputs[path][i], memory, backend("auto")))
    assert len({tuple(c.chosen[-1].tolist()) for c in whole}) > 1
    pager, steps, checks = Pager(texts, seed), 0, 0
    run.acting["elsewhere"] = everybody(reading)
    while pager.done != [len(t) for t in texts] and (steps := steps + 1) < 500:
        step = pager.step()
        if not step:
            continue
        context = context_of(metadata([one[1:] for one in step], padding=2))
        now = run.running(context)
        now.see(torch.tensor([*(t for i, _, at, new in step for t in texts[i][at : at + new]), 0, 0]))
        for path in reading.read:
            rows = [inputs[path][i][at : at + new] for i, _, at, new in step]
            now.read(path, torch.cat([*rows, torch.full((2, rows[0].shape[1]), torch.nan)]))
        found, begin_at = now.choice("elsewhere", torch.cat([*rows, rows[0][:1], rows[0][:1]])), 0
        for i, _, at, new in step:
            here = slice(begin_at, begin_at + new)
            assert torch.equal(found.chosen[here], whole[i].chosen[at : at + new])
            torch.testing.assert_close(
                found.weights[here], whole[i].weights[at : at + new], rtol=1e-4, atol=1e-5
            )
            begin_at, checks = begin_at + new, checks + 1
        assert bool((found.chosen[begin_at:] == -1).all())
    assert pager.done == [len(t) for t in texts]
    assert pager.shared
    assert pager.shared_in_step
    assert checks > len(texts)


def _vector(text, path):
    return torch.randn(32, generator=torch.Generator().manual_seed(hash((text, path == PATH)) % 2**31)) * 2


def test_nothing_is_kept_while_vllm_warms_up(served):
    _, settings, checked = served("gander")
    run = gander.GanderRun(checked.reading, Pool.load(settings.pool).names, lambda: SIZE, "cpu")
    run.acting["there"] = everybody(checked.reading)
    context = context_of(None)
    now, u = run.running(context), torch.randn(6, 32)
    now.see(torch.arange(6))
    now.read(PATH, u)
    assert bool((now.choice("there", u).chosen == -1).all())
    assert not len(run.kept.positions)


def test_what_hides_tokens_is_refused(served):
    _, settings, checked = served("gander")
    run = gander.GanderRun(checked.reading, Pool.load(settings.pool).names, lambda: SIZE, "cpu")
    run.acting["there"] = everybody(checked.reading)
    context = context_of(metadata([([3], 0, 3)]))
    with pytest.raises(RoutingError, match="hasn't seen the ids"):
        run.running(context).read(PATH, torch.randn(3, 32))
    run.running(context).see(torch.arange(3))
    with pytest.raises(RoutingError, match=r"sees \[2\] tokens in a step of 3"):
        run.running(context).read(PATH, torch.randn(2, 32))
    with pytest.raises(RoutingError, match="hasn't run before the blocks that act"):
        run.running(context).choice("there", torch.randn(3, 32))
    with pytest.raises(RoutingError, match="several micro-batches"):
        run.running(SimpleNamespace(attn_metadata=[{}, {}]))


def test_a_read_module_whose_input_is_split_is_refused(served, make_base):
    folder, settings, checked = served("gander", {"name": "o", "targets": ["o_proj"], "seed": 4})
    base = load_base(folder)
    layers = Layers(settings, checked, lambda path: path, lambda: SIZE, "cpu")
    found = [(*one, layers.take(one[0], MERGED)) for one in linears(base.model, 0, 2)]
    linear, weight, _, parts = found[1]
    with pytest.raises(RoutingError, match=r"would read model\.layers\.0\.self_attn\.o_proj, whose input"):
        layers.make(linear, parts, weight.data, torch.clone)


@pytest.mark.parametrize("tables", [0, 2])
def test_a_model_without_one_table_of_tokens_is_refused(served, tables):
    folder, settings, checked = served("gander")
    layers = Layers(settings, checked, lambda path: path, lambda: SIZE, "cpu")
    for one in linears(load_base(folder).model, 0, 1):
        layers.take(one[0], MERGED)
    for _ in range(tables):
        layers.take_embedding(torch.nn.Identity())
    with pytest.raises(RoutingError, match=f"has {tables} tables of tokens"):
        layers.check_taken()
