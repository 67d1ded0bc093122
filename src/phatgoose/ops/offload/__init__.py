"""Experts that stay in main memory or in a file and are copied to the device when tokens choose them.

In: a `Stack` on the host, a budget of device memory and the experts chosen at a module.
Out: the same sums as `ops/reference.py`, from the copies in the slots.

A new rule of which expert leaves a full device goes into `slots.py`.
"""
