"""Evaluation: accuracy of a model, routed or not, on the test rows of some tasks.

In: a base and tasks. Out: `Scores`, one prediction a row, with bootstrap intervals. run.py is the entry; it
goes this way:

    rows.py            an example → token ids of its prompt and answers
    rank.py            rows with choices: the likeliest choice
    generate.py        rows without: exact match of the greedy answer (rouge.py: by ROUGE-L)
    prefill.py         prompts → key-value caches, computed once for what many prompts begin with (prefix_tree.py)
    continuations.py   answers behind those prompts → logits (uncached.py: without a cache; batching.py: what
    shares a forward) statistics.py      values → intervals and p-values

results.py writes scores as JSON. harness.py connects lm-evaluation-harness. A new metric of generated answers
goes into rouge.py.
"""
