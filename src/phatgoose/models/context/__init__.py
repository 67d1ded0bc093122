"""Which tokens a module sees, and of which prompt.

In: the arguments of the running forward pass. Out: a `RoutingContext`, or a `RoutingError` where tokens can't be told
apart. Start with `streams.py` (tokens) and `prompts.py` (prompts). An architecture whose modules see other tokens
than most goes into `matching.py`, a cache that doesn't count its tokens into `runs.py`.
"""
