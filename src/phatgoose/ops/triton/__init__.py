"""The GPU backend: a few Triton kernels.

In and out: those of every backend (`ops/reference.py`).

A kernel goes into `kernels.py`, its block sizes and grid into `launch.py`, what it accepts into `backend.py`.
"""
