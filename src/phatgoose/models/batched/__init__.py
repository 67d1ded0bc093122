"""Several routings in one forward pass, as a server needs them.

In: pools prepared for one model, and before each pass a plan of which sequence goes by which routing.
Out: hooks that give each sequence what `route` alone would have given it.
"""
