"""The CPU backend: one compiled kernel that scores, chooses and mixes.

In: a module's input and output, gates, and a `Stack` of updates, all on the CPU in one dtype.
Out: the module's output with the chosen updates added, as `ops/reference.py` computes it.

A change of the arithmetic goes into `kernel/`, a change of what the kernel accepts into `backend.py`.
"""
