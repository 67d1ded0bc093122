"""The model's loop: many requests at once, each with its own routing, sampling and end.

In: jobs. Out: their tokens, and their text while it is written. `continuous.py` serves models with a cache of keys and
values (README.md says how it builds on transformers), `batched.py` the others.
"""
