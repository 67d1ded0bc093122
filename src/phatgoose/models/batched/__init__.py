"""Several routings in one forward pass, as a server needs them.

In: `PoolVersion`s (pools prepared for one model), `Route`s through them, and around each pass a `BatchPlan` of which
sequence takes which route. Out: hooks that give each sequence what `route` alone would have given it.

How a pass is cut: the plan sorts a module's tokens into groups, once for all modules that see as many tokens.
Sequences on one route run together. So do all sequences with a single expert of one version, whatever the expert:
each token's choice is then known. The base's tokens are in no group. If every token is in one group, that runs as
`route` would, fused if possible; otherwise each group's tokens are gathered, mixed and put back. A group that fails
is tried again sequence by sequence, to find the one that is to blame.
"""
