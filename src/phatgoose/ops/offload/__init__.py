"""Experts that stay on the host and are copied to the device when tokens choose them.

In: a `Stack` on the host, gates, and how much room there is on the device.
Out: the same sums as `ops/reference.py`, computed from the copies on the device.

Which expert leaves a full device is decided in `slots.py`.
"""
