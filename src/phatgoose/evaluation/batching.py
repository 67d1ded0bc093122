"""Which items share a forward: little padding, few forwards, within given limits.

Design. All items of a batch are padded to its longest one, so a batch of n items of at most L tokens costs n·L
tokens, and each forward costs some fixed time in addition (`FORWARD_COST`, counted in tokens). Items are
sorted by length, longest first, and batches are cut from the front. A batch takes as many items as its limits
allow. It is cut shorter where that pays: with the cut after item k, the n − k items that follow are padded to
the length of item k + 1 instead of L, which saves (L − length[k + 1])·(n − k) tokens and costs one more
forward. The cut that saves most is made if it saves more than a forward costs. This is greedy, not optimal,
and takes O(n) a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FORWARD_COST = 64
"""Fixed cost of a forward, in tokens: measured for a model of 135M parameters on a CPU."""


def split_into_batches(
    lengths: Sequence[int],
    limits: Sequence[tuple[int, int]],
    max_rows: int,
    forward_cost: int = FORWARD_COST,
) -> list[list[int]]:
    """Splits the numbers of `lengths` into batches, longest first; see the module's text.

    Args:
        limits: (extra, most) pairs: a batch of n items padded to length L needs n·(L + extra) <= most. A
            single item may exceed that, since it can't be split.
        max_rows: the most items in a batch.
    """
    sizes = np.asarray(lengths)
    order = np.argsort(-sizes, kind="stable")
    sizes = sizes[order]
    batches, start = [], 0
    while start < len(order):
        longest = int(sizes[start])
        # Items of no length and no extra use up no limit.
        fitting = [most // (longest + extra) for extra, most in limits if longest + extra]
        end = min(len(order), start + max(1, min([max_rows, *fitting])))
        # saved[j]: padding that a cut before item start + 1 + j saves on that item and those after it in this batch.
        saved = (longest - sizes[start + 1 : end]) * np.arange(end - start - 1, 0, -1)
        if saved.size and saved.max() > forward_cost:
            end = start + 1 + int(saved.argmax())
        batches.append(order[start:end].tolist())
        start = end
    return batches
