"""Which tokens a module sees: what a router or a trace may know beyond the activation.

In: the arguments of the running forward pass. Out: a `RoutingContext`, or a `RoutingError` where tokens cannot be
told apart. An architecture whose modules see other tokens than most is described in `matching.py`.
"""
