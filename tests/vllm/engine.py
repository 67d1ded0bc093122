"""A vLLM to ask, in processes of its own, and what our routing in transformers says to the same prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route
from phatgoose.models.base.load import load_base
from phatgoose.routers import parse_router

SECONDS = 1800
ASK = Path(__file__).parent / "ask.py"


def environment(ranks=1):
    """Of vLLM's processes: threads go where they find a core, and nothing is interpreted."""
    found = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")}
    cores = os.cpu_count() or 1
    bind = "nobind" if ranks == 1 else "|".join(str(rank % cores) for rank in range(ranks))
    return found | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": bind, "HF_HUB_OFFLINE": "1"}


def options(pool, router="phatgoose:top_k=2"):
    """hf_overrides, as a user passes them."""
    return {"quantization_config": {"quant_method": "phatgoose", "pool": str(pool), "router": router}}


def ask(folder, prompts, tokens, model, overrides, *, dtype="float32", eager=True, ranks=1):
    """vLLM's greedy answers: [{"ids", "logits": [{token: logit}]}], or what its log says where it refuses to start."""
    said = ask_often(folder, [prompts], tokens, model, overrides, dtype=dtype, eager=eager, ranks=ranks)
    return said if isinstance(said, str) else said["answers"]


def ask_often(folder, calls, tokens, model, overrides, *, dtype="float32", eager=True, ranks=1, **engine):
    """As `ask`, for several lists of prompts, one after the other: {"answers", "counts": vLLM's counters}.

    engine: more of vLLM's options.
    """
    engine = {
        "model": str(model),
        "dtype": dtype,
        "enforce_eager": eager,
        "tensor_parallel_size": ranks,
        "hf_overrides": overrides,
        **engine,
    }
    request, answer, log = folder / "request.json", folder / "answer.json", folder / "vllm.log"
    request.write_text(json.dumps({"engine": engine, "calls": calls, "tokens": tokens}))
    answer.unlink(missing_ok=True)
    with log.open("w") as out:
        subprocess.run(
            [sys.executable, str(ASK), str(request), str(answer)],
            env=environment(ranks), stdout=out, stderr=out, timeout=SECONDS, check=False,
        )  # fmt: skip
    return json.loads(answer.read_text()) if answer.exists() else log.read_text()


def ours(model, pool, router, sequences, dtype="float32"):
    """The logits [length, vocabulary] of each sequence, by route() in transformers; without a pool the base's."""
    base = load_base(model, dtype=dtype)
    if pool is not None:
        route(base, Pool.load(pool), parse_router(router), any_base=True)
    with torch.no_grad():
        return [base.model(input_ids=torch.tensor([s]), use_cache=False).logits[0].float() for s in sequences]


def compare(answers, prompts, logits):
    """(relative error of all logits vLLM gave, their largest error, tokens that aren't our first choice as gaps
    in our logits).

    logits: ours, of each prompt with vLLM's answer behind it.
    """
    found, expected, gaps = [], [], []
    for answer, prompt, rows in zip(answers, prompts, logits, strict=True):
        for i, (token, given) in enumerate(zip(answer["ids"], answer["logits"], strict=True)):
            row = rows[len(prompt) - 1 + i]
            expected.append(row[[int(t) for t in given]])
            found.append(torch.tensor(list(given.values())))
            if (best := int(row.argmax())) != token:
                gaps.append(float(row[best] - row[token]))
    found, expected = torch.cat(found), torch.cat(expected)
    return float((found - expected).norm() / expected.norm()), float((found - expected).abs().max()), gaps
