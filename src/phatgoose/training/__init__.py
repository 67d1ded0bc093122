"""Training: experts, gates, gates without data, and data signatures.

In: a base, a task and settings (`config.py`). Out: an `Expert` with its provenance; the base is afterwards as before.
Read `expert.py` or `gate.py` first: each says how its model is built, saved and read, and `trainer/` does the rest. A
new kind of adapter is a `Student` (`student.py`), as in `bottleneck.py`, chosen in `expert.py`.
"""
