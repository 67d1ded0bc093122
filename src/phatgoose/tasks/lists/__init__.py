"""Named lists of tasks: pools to train on and suites to evaluate on, from the paper and ours.

In: a name. Out: entries, each one task or a mixture of several. A new list is a file here and a line in `pools.py` or `suites.py`.
"""
