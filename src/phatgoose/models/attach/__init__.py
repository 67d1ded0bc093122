"""Routing on and off a model: `route` and `unroute`.

In: a model, a pool, a router, `RouteOptions`. Out: the same model with one forward hook per adapted module.
`attach.py` checks everything and then attaches, `site.py` is routing at one module (start reading there),
`candidates.py` stacks the experts of a module, `hooks.py` is the only place that puts hooks on and takes them off. A
new check of a pool against a model, or another naming of modules, goes into `modules.py`.
"""
