"""Whole models: a random base of some model's shape, random experts at every linear layer, and the ways to route them.

All contestants share one base and one set of stacks. Each round attaches a contestant, times one step, and detaches it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import torch
from bench_machine import medians
from peft import ArrowConfig
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import Routing
from phatgoose.models.attach.hooks import Hooks
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.context.streams import Streams
from phatgoose.models.trace.record import trace
from phatgoose.ops import backend, fast
from phatgoose.routers import PHATGOOSE, Router, parse_router
from phatgoose.routers.router import BoundRouter

PAST = 64
"""Tokens in the key-value cache before a decode step."""


SHAPES = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "t5-xl": {
        "vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
}  # fmt: skip


def base_model(layers: int = 30, shape: str = "smollm2-135m", device: str = "cpu") -> PreTrainedModel:
    """A random model of this shape, in bfloat16; an encoder–decoder has `layers` blocks on either side."""
    torch.manual_seed(0)
    with torch.device(device):
        if "d_model" in SHAPES[shape]:
            model = T5ForConditionalGeneration(T5Config(num_layers=layers, **SHAPES[shape]))
        else:
            model = LlamaForCausalLM(
                LlamaConfig(num_hidden_layers=layers, max_position_embeddings=8192, **SHAPES[shape])
            )
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    # Otherwise attention would average random tokens, and all of them would choose the same few experts.
    model.get_input_embeddings().weight.mul_(100)
    return model


def random_pool(model: PreTrainedModel, experts: int, rank: int) -> Pool:
    """Experts of random values with random gates at every linear layer; one expert's tensors are slices of a
    module's."""
    generator = torch.Generator().manual_seed(1)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    tensors: list[dict[str, Tensor]] = [{} for _ in range(experts)]
    gates: list[dict[str, Tensor]] = [{} for _ in range(experts)]
    for path, module in modules.items():
        d_in, d_out = module.in_features, module.out_features
        a = torch.empty(experts, rank, d_in, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        b = torch.empty(experts, d_out, rank, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        v = torch.randn(experts, d_in, generator=generator)
        for e in range(experts):
            tensors[e][f"base_model.model.{path}.lora_A.weight"] = a[e]
            tensors[e][f"base_model.model.{path}.lora_B.weight"] = b[e]
            gates[e][path] = v[e]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none",
        "target_modules": sorted({n.rpartition(".")[2] for n in modules}),
    }  # fmt: skip
    return Pool([Expert(f"e{e:04}", config, tensors[e], gates[e]) for e in range(experts)])


@dataclass(eq=False)
class Ways:
    """Attaches and detaches each contestant.

    Those with the name of a backend are PHATGOOSE by it. Those that begin with "gander" are this router, as users write
    it. `made` are routings that are there already, by their names.
    """

    model: PreTrainedModel
    pool: Pool
    names: list[str]
    made: dict[str, Routing] = field(default_factory=dict)
    routings: dict[str, Routing] = field(default_factory=dict)
    arrows: list[ArrowLoraLinearLayer] = field(default_factory=list)
    handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        device, first = self.model.device, next(iter(self.made.values()), None)
        if first is None:
            first = Routing(self.model, self.pool, PHATGOOSE(2), RouteOptions())
        for site in first.sites:
            site.stack = site.stack.to(device)
        for name in self.names:
            if name in self.made:
                self.routings[name] = self.made[name]
            elif name in ("cpu", "triton", "torch", "reference"):
                router = None if isinstance(first.router, PHATGOOSE) else PHATGOOSE(2)
                self.routings[name] = sharing(first, name, router)
            elif name.startswith("gander"):
                self.routings[name] = sharing(first, "auto", parse_router(name))
                observe_random(self.routings[name])
        self.sites = first.sites
        if "arrow" in self.names:
            self.deltas = [_arrow(site) for site in self.sites]

    def attach(self, name: str) -> None:
        self.detach()
        if name in self.routings:
            self.routings[name].attach()
        elif name == "dense":
            self.handles = [s.module.register_forward_hook(_dense(s)) for s in self.sites]
        elif name == "arrow":
            for site, delta in zip(self.sites, self.deltas, strict=True):
                self.handles.append(site.module.register_forward_hook(delta))

    def detach(self) -> None:
        for routing in self.routings.values():
            routing.detach()
        for handle in self.handles:
            handle.remove()
        self.handles = []


def sharing(first: Routing, backend_name: str, router: Router | None = None) -> Routing:
    """A routing with the same stacks, another backend and, if it is given, another router."""
    other = copy.copy(first)
    other.ops, other._hooks = backend(backend_name), Hooks()
    other.sites = [copy.copy(site) for site in first.sites]
    if router is not None:
        other.router, other.streams = router, Streams(first.model, remembers=router.remembers)
        other.prepared_router = router.prepared(other.setup())
    for site in other.sites:
        site.routing = other
        if router is not None:
            site.bind()
        site.prepare()
    return other


def observe_random(routing: Routing, passages: int = 24, pieces: int = 24) -> dict[str, float]:
    """Shows random tokens to a router that needs plain text and the reference text: so many rows of 64 for either.

    Returns seconds: in the router on plain text and on the reference text, and of both passes with the base.
    """
    model, seconds = routing.model, {"whitening": 0.0, "statistics": 0.0}
    read, start = [site for site in routing.sites if site.router.needs_reference], time.perf_counter()
    for rows, part in ((passages, "whitening"), (pieces, "statistics")):
        ids = torch.randint(
            0, model.config.vocab_size, (rows, 64), generator=torch.Generator().manual_seed(4)
        )
        more = {"decoder_input_ids": ids[:, :1]} if model.config.is_encoder_decoder else {}

        def observe(router: BoundRouter, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            began = time.perf_counter()
            if part == "whitening":  # noqa: B023 - called in this very round
                router.observe_plain(args[0], routing.ops)
            else:
                router.observe(args[0].flatten(0, 1), routing.ops)
            seconds[part] += time.perf_counter() - began  # noqa: B023

        handles = [s.module.register_forward_hook(partial(observe, s.router)) for s in read]
        model.base_model(input_ids=ids, **more)
        for handle in handles:
            handle.remove()
    return {**seconds, "with_passes": time.perf_counter() - start}


def _dense(site: object) -> Callable[..., Tensor]:
    """The formula written directly: every expert on every token, with a weight of zero for those not chosen."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        u, y = args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])
        chosen, weights = fast.choose(fast.gate_scores(u, site.router.gates), 2)
        return fast.dense(u, y, site.stack, chosen, weights).reshape(output.shape)

    return hook


def _arrow(site: object) -> Callable[..., Tensor]:
    """PEFT's own Arrow layer without PEFT's wrapper, which makes it faster. Prototypes are given, not computed."""
    stack, names = site.stack, [f"task_{e}" for e in range(site.stack.experts)]
    config = ArrowConfig(top_k=2)
    config.task_adapter_names = names
    layer = ArrowLoraLinearLayer(stack.A.shape[1], config)
    layer.register_buffer("prototypes", site.router.gates.to(stack.A.dtype), persistent=False)
    layer._protos_ready = True
    a = {n: SimpleNamespace(weight=stack.A[stack.rows(e)]) for e, n in enumerate(names)}
    b = {n: SimpleNamespace(weight=stack.B[stack.rows(e)].T.contiguous()) for e, n in enumerate(names)}
    scaling = dict.fromkeys(names, 1.0)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + layer(args[0], a, b, nn.Identity(), scaling)

    return hook


@dataclass(frozen=True)
class Step:
    """A step of a model: `batch` rows of `length` new tokens; a decode step continues from a cache."""

    name: str
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length


DECODE_1, DECODE_8, PREFILL = (
    Step("decode, batch 1", 1, 1),
    Step("decode, batch 8", 8, 1),
    Step("prefill 512", 1, 512),
)


def runner(model: PreTrainedModel, step: Step) -> Callable[[int], Tensor]:
    """A function of the round's number, which determines the tokens. An encoder–decoder's prefill is its
    encoder and one token of its decoder; its decode step is the decoder's, after PAST tokens and with as many
    encoded ones.
    """
    size = model.config.vocab_size
    ids = torch.randint(0, size, (64, step.batch, step.length), generator=torch.Generator().manual_seed(2))
    past = torch.randint(0, size, (step.batch, PAST), generator=torch.Generator().manual_seed(3))
    start = torch.zeros(step.batch, 1, dtype=torch.long)
    two = model.config.is_encoder_decoder
    if step.length > 1:
        if two:
            return lambda number: model(ids[number % 64], decoder_input_ids=start, use_cache=False).logits
        return lambda number: model(ids[number % 64], use_cache=False, logits_to_keep=1).logits
    cache: EncoderDecoderCache | DynamicCache = DynamicCache(config=model.config)
    given: dict[str, object] = {"past_key_values": cache, "use_cache": True}
    if two:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        given |= {"past_key_values": cache, "encoder_outputs": model.encoder(past)}
    name = "decoder_input_ids" if two else "input_ids"
    model(**{name: past}, **given)

    def decode(number: int) -> Tensor:
        logits = model(**{name: ids[number % 64]}, **given).logits
        (cache.self_attention_cache if two else cache).crop(-1)
        return logits

    return decode


def measure(ways: Ways, step: Step, rounds: int) -> dict[str, object]:
    """Medians in milliseconds, ratios to the base, the experts that were chosen and the bytes they take to read."""
    with torch.inference_mode():
        runs = {}
        for name in ways.names:
            ways.attach(name)  # a cache is read on by the router that filled it
            runs[name] = runner(ways.model, step)
        found = medians(runs, rounds, {n: (lambda n=n: ways.attach(n)) for n in ways.names})
        ways.detach()
        distinct = distinct_experts(ways, runs)
        read = weights_read(ways.model, runner(ways.model, step))
    return {
        "step": step.name, "tokens": step.tokens, "experts": len(ways.pool.experts), "rounds": rounds,
        **beside_base(found), **cost(ways, distinct, read, step.batch),
    }  # fmt: skip


def beside_base(seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Milliseconds, and ratios to the base, which may be missing."""
    base = seconds.get("base", float("nan"))
    return {
        "milliseconds": {n: 1e3 * t for n, t in seconds.items()},
        "ratio": {n: t / base for n, t in seconds.items() if n != "base"},
    }


def distinct_experts(ways: Ways, runs: dict[str, Callable[[int], object]]) -> dict[str, int]:
    """How many experts each module used in one step, by the paths of the modules that ran: of PHATGOOSE, or else of
    Gander."""
    ways.detach()
    name = min(ways.routings, key=lambda name: name.startswith("gander"))
    ways.routings[name].attach()
    with trace(ways.model) as seen:
        runs[name](1)
    ways.routings[name].detach()
    ways.model.__dict__.pop("_phatgoose_routing", None)
    return {c.path: int(c.experts[c.experts >= 0].unique().numel()) for c in seen.choices}


def weights_read(model: PreTrainedModel, run: Callable[[int], object]) -> int:
    """Bytes of the base's weights that one step reads: those of the modules that ran, without tables of which
    it reads a few rows."""
    read: dict[int, int] = {}

    def note(module: nn.Module, *_: object) -> None:
        if not isinstance(module, nn.Embedding):
            read.update({id(p): p.numel() * p.element_size() for p in module.parameters(recurse=False)})

    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    run(1)
    for handle in handles:
        handle.remove()
    return sum(read.values())


def gander_floors(
    routing: Routing, paths: Collection[str], base_bytes: int, linear: int, rows_of_batch: int
) -> dict[str, float]:
    """The least that Gander costs at a step: as many rows as it compares (counted in bfloat16), and one expert for each
    sequence behind them."""
    sites = [s for s in routing.sites if s.path in paths]
    evidence = [one for s in sites if s.router.needs_reference for one in s.router.evidence]
    compared = [x for one in evidence for x in (one.gates, one.span_norms and one.span_norms.rows)]
    scored = sum(rows.numel() for rows in compared if rows is not None)
    acting = sum(s.stack.ranks[0] * (s.stack.A.shape[1] + s.stack.B.shape[1]) for s in sites if s.router.acts)
    return {
        "byte_floor": 1 + 2 * (scored + rows_of_batch * acting) / base_bytes,
        "flop_floor": 1 + (scored + acting) / linear,
    }


def cost(ways: Ways, distinct: dict[str, int], base_bytes: int, rows_of_batch: int) -> dict[str, object]:
    """Bytes and multiplications of the base and of what routing adds, at a step, and their ratio: the floors.

    Bytes at decode: every weight of the base that the step reads once, every gate once (counted in bfloat16;
    the kernel reads 8 bits), the chosen experts' rows once a module. Multiplications at prefill: linear
    layers, gates and two experts a token.
    """
    sites = [s for s in ways.sites if s.path in distinct]
    linear = sum(s.stack.A.shape[1] * s.stack.B.shape[1] for s in sites)
    gates = sum(s.stack.experts * s.stack.A.shape[1] for s in sites)
    rows = [s.stack.ranks[0] * (s.stack.A.shape[1] + s.stack.B.shape[1]) for s in sites]
    chosen = 2 * sum(distinct[s.path] * r for s, r in zip(sites, rows, strict=True))
    floors = {
        name: gander_floors(routing, distinct, base_bytes, linear, rows_of_batch)
        for name, routing in ways.routings.items()
        if name.startswith("gander")
    }
    return {
        "distinct_experts": sum(distinct.values()) / len(distinct),
        "base_bytes": base_bytes,
        "gate_bytes": {"bfloat16": 2 * gates, "8 bits": gates},
        "expert_bytes": chosen,
        "byte_floor": 1 + (2 * gates + chosen) / base_bytes,
        "flop_floor": 1 + (gates + 2 * sum(rows)) / linear,
        "floors": floors,
    }
