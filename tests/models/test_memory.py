"""What a router keeps beside a cache: states of the last tokens, whatever rows are taken and tokens cropped."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from phatgoose.errors import RoutingError
from phatgoose.models.context.memory import KEPT, MemoryLayer


def states(rows, tokens, draw):
    return torch.tensor([[[draw.random()] for _ in range(tokens)] for _ in range(rows)])


@pytest.mark.parametrize("seed", range(8))
def test_it_is_as_if_all_states_were_kept_in_one_tensor(seed):
    draw = random.Random(seed)
    layer, whole = MemoryLayer(None), states(3, 5, draw)
    layer.extend(whole)
    copies = []
    for _ in range(200):
        rows, length = whole.shape[:2]
        what = draw.choice(("extend", "extend", "extend", "reorder", "repeat", "select", "mask", "crop"))
        if what == "extend" or length < 10:
            new = states(rows, draw.choice((1, 1, 1, 7, KEPT + 9)), draw)
            layer.extend(new)
            whole = torch.cat([whole, new], 1)
        elif what == "reorder":
            index = torch.tensor([draw.randrange(rows) for _ in range(rows)])
            layer.reorder_cache(index)
            whole = whole[index]
        elif what == "repeat" and rows < 5:
            layer.batch_repeat_interleave(2)
            whole = whole.repeat_interleave(2, dim=0)
        elif what in ("select", "mask") and rows > 1:
            index = torch.tensor([True] + [draw.random() < 0.7 for _ in range(rows - 1)])
            layer.batch_select_indices(index if what == "mask" else index.nonzero()[:, 0].flip(0))
            whole = whole[index] if what == "mask" else whole[index.nonzero()[:, 0].flip(0)]
        elif what == "crop":
            tokens = draw.randrange(min(length - 5, 6))
            layer.crop(-tokens)
            whole = whole[:, : length - tokens]
        assert layer.tokens == whole.shape[1]
        assert torch.equal(layer.last(), whole[:, -1])
        copies.append((copy.copy(layer), whole))
    for one, known in copies:
        assert torch.equal(one.last(), known[:, -1])


def test_the_last_tokens_can_be_cropped_and_no_more_are_kept_than_needed():
    draw = random.Random(0)
    for passes in ([1] * 600, [600], [100] * 6):
        layer, whole = MemoryLayer(None), states(2, 600, draw)
        for part in whole.split(passes, dim=1):
            layer.extend(part)
        assert sum(one.states.shape[1] for one in layer.kept) < 2 * KEPT
        if passes == [600]:
            assert layer.kept[0].states.untyped_storage().nbytes() == 4 * 2 * KEPT
        layer.crop(-(KEPT - 1))
        assert torch.equal(layer.last(), whole[:, 600 - KEPT])
        layer.crop(-KEPT)
        with pytest.raises(RoutingError, match="cropped by more than 256"):
            layer.last()
