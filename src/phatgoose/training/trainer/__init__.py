"""One training from start to end, whatever is trained: rows, loop, checkpoints, progress.

In: a `TrainingJob`, which says how to build and read what is trained. Out: the trained expert; the base comes back as
it was. `run.py` shows the order of steps; `loop.py` is transformers' Trainer.
"""
