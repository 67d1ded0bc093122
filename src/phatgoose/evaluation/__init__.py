"""Evaluation: accuracy of a model, routed or not, on the test rows of some tasks.

In: a base and tasks. Out: `Scores`, one prediction per row, with bootstrap intervals. run.py is the entry. Then:

    rows.py            an example → token ids of its prompt and answers
    rank.py            rows with choices: the likeliest choice
    generate.py        rows without: exact match of the greedy answer (rouge.py: ROUGE-L)
    prefill.py         prompts → key-value caches; shared prefixes are computed once
    continuations.py   answers after those prompts → logits
    batching.py        which prompts or answers share a forward
    statistics.py      values → intervals and p-values

What can't be measured raises an `EvaluationError` that names task and row: a logit that isn't finite, a model whose
scores mean nothing (`prefill.check_scorable_once`). results.py writes scores as JSON. harness.py connects
lm-evaluation-harness. A new metric of generated answers goes into rouge.py.
"""
