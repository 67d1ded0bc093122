"""The model's loop: many requests at once, each with its own routing, sampling and end.

In: jobs. Out: their tokens and text as they come. `continuous.py` serves models with a cache of keys and values,
`batched.py` the others.
"""
