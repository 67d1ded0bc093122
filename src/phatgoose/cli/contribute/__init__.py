"""Commands of a contributor: train an expert, gates, a data signature; convert; publish.

In: a base, a task or an adapter. Out: an expert's folder.
"""
