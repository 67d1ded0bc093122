"""Asks vLLM in a process of its own: python ask.py REQUEST.json ANSWER.json. Every process of vLLM loads
the plugin by its entry point."""

from __future__ import annotations

import json
import sys
from pathlib import Path

TOP = 64


def main() -> None:
    request, target = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from vllm import LLM, SamplingParams

    settings = {
        "max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 16, "enable_prefix_caching": False,
        **request["engine"],
    }  # fmt: skip
    llm = LLM(**settings, max_logprobs=TOP, logprobs_mode="raw_logits", disable_log_stats=False)
    greedy = SamplingParams(temperature=0, max_tokens=request["tokens"], logprobs=TOP, ignore_eos=True)
    answers = [
        {
            "ids": list(one.outputs[0].token_ids),
            "logits": [{t: v.logprob for t, v in at.items()} for at in one.outputs[0].logprobs],
        }
        for prompts in request["calls"]
        for one in llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
    ]
    counts = {m.name: m.value for m in llm.get_metrics() if isinstance(getattr(m, "value", None), int)}
    target.write_text(json.dumps({"answers": answers, "counts": counts}))


if __name__ == "__main__":
    main()
