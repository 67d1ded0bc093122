"""Layers inside a mixture-of-experts base, which transformers keeps in 3-D parameters and not in modules.

In: an experts module. Out: a `Slot` for each of its linear layers, on which hooks go as on any module.
"""
