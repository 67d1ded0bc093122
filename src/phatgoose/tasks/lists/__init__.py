"""Named lists of tasks: pools to train on and suites to measure on, from the paper and ours.

In: a name. Out: entries, each one task or a mixture of several. The lists themselves are pools.toml and
suites.toml: a new one is a section there.
"""
