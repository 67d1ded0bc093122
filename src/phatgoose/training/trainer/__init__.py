"""One training from start to end, whatever is trained: rows, loop, checkpoints, progress.

In: a base, trainable parameters, a loss and rows. Out: trained parameters; the base comes back as it was.
"""
