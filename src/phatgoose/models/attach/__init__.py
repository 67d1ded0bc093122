"""Routing on and off a model: `route` and `unroute`.

In: a model, a pool, a router. Out: the same model with one forward hook a module. `attach.py` checks everything and then attaches;
`site.py` is routing at one module; `hooks.py` is the only place that puts hooks on and takes them off.
"""
