"""A pool in one file that is mapped into memory, so that it opens without reading a tensor.

In (`pack.py`): a pool's folder. Out: the same folder with one file of stacks, and what can't be stacked beside it.
In (`open.py`): such a folder. Out: a `Pool` whose tensors are views of the file.
"""
