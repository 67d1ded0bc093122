"""lm-evaluation-harness' client for completions, against the same routed model in its own process."""

from __future__ import annotations

import pytest
from serving_fixtures import PROMPTS, greedy, running, settings, text

from harness_fixtures import ROWS, harness_choices, harness_task
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.records import Task
from phatgoose.serving.service import Service

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'phatgoose[harness]'"
)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow(22)
@pytest.mark.parametrize("as_tokens", [True, False])
def test_local_completions(make_base, make_expert, tmp_path, monkeypatch, as_tokens):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("LMEVAL_LOG_LEVEL", "ERROR")
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    base = make_base("llama")
    pool = Pool([make_expert(base, name, seed=seed, scale=0.6) for name, seed in (("one", 1), ("two", 2))])
    base.tokenizer.save_pretrained(tmp_path / "tokenizer")
    plain = harness_choices(base, ROWS)
    route(base, pool)
    wanted = harness_choices(base, ROWS)
    assert wanted != plain
    prompts = PROMPTS[:3]
    written = [text(base, greedy(base, p)).partition("e")[0] for p in prompts]
    unroute(base)
    task = harness_task(Task("toy", (), (), ROWS), tmp_path / "rows")
    with running(Service(base, settings(), pool=pool)) as server:
        lm = LocalCompletionsAPI(
            base_url=server.url + "/v1/completions",
            model="phatgoose",
            tokenizer=str(tmp_path / "tokenizer"),
            tokenizer_backend="huggingface",
            tokenized_requests=as_tokens,
            batch_size=3,
            num_concurrent=2,
            max_retries=1,
            max_length=512,
        )
        found = lm_eval.simple_evaluate(
            model=lm, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
        )
        asks = [
            Instance("generate_until", {}, (p, {"until": ["e"], "max_gen_toks": 12}), i)
            for i, p in enumerate(prompts)
        ]
        assert lm.generate_until(asks, disable_tqdm=True) == written
    samples = sorted(found["samples"]["phatgoose_toy"], key=lambda s: s["doc_id"])
    for sample, example, choice in zip(samples, ROWS, wanted, strict=True):
        totals = [float(r[0][0]) if isinstance(r[0], list | tuple) else float(r[0]) for r in sample["resps"]]
        assert totals.index(max(totals)) == choice.acc
        norms = [t / len(c) for t, c in zip(totals, example.choices, strict=True)]
        assert norms.index(max(norms)) == choice.acc_norm
