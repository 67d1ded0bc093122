"""Which request a token of vLLM's flat batch belongs to, and what is kept for each block of the key-value cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from phatgoose.errors import RoutingError
from phatgoose.vllm.steps import BlockStates, Step

SIZE = 4


def metadata(requests, padding=0):
    """As vLLM describes a step. requests: (blocks, tokens computed before, new tokens)."""
    starts, lengths, slots = [0], [], []
    for blocks, before, new in requests:
        starts.append(starts[-1] + new)
        lengths.append(before + new)
        slots += [blocks[p // SIZE] * SIZE + p % SIZE for p in range(before, before + new)]
    longest = max(len(blocks) for blocks, _, _ in requests)
    table = [[*blocks, *[0] * (longest - len(blocks))] for blocks, _, _ in requests]
    return SimpleNamespace(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=torch.tensor(table, dtype=torch.int32),
        slot_mapping=torch.tensor([*slots, *[-1] * padding]),
    )


def told(step):
    return [(r.begin, r.tokens, r.first, r.continues, r.ends) for r in step.requests]


def test_what_each_request_continues_and_which_blocks_it_ends():
    step = Step.of(metadata([([7], 0, 3), ([5, 2, 9], 3, 6), ([3, 8], 4, 1), ([6], 1, 1)], padding=2), SIZE)
    assert step.tokens == 11
    assert told(step) == [
        (0, 3, 0, None, ((7, 3),)),
        (3, 6, 3, 5, ((5, 1), (2, 5), (9, 6))),
        (9, 1, 4, 3, ((8, 1),)),
        (10, 1, 1, 6, ((6, 1),)),
    ]


def test_rows_without_tokens_are_no_requests():
    given = metadata([([7], 2, 0), ([5], 0, 1)])
    assert told(Step.of(given, SIZE)) == [(0, 1, 0, None, ((5, 1),))]


def test_a_step_that_writes_nothing_is_none():
    given = metadata([([7], 0, 3)])
    given.slot_mapping.fill_(-1)
    assert Step.of(given, SIZE) is None


def test_blocks_of_another_size_are_refused():
    given = metadata([([7, 3], 2, 4)])
    with pytest.raises(RoutingError, match="elsewhere than in blocks of 2 "):
        Step.of(given, 2)
    given.slot_mapping[1] = -1
    with pytest.raises(RoutingError, match="elsewhere"):
        Step.of(given, SIZE)


def test_attention_that_does_not_say_is_refused():
    given = metadata([([7], 0, 3)])
    del given.block_table
    with pytest.raises(RoutingError, match=r"SimpleNamespace.*in its block_table.*--attention-backend"):
        Step.of(given, SIZE)


def test_who_continues_behind_blocks_of_the_same_step_comes_after_them():
    # The second continues behind the first block of the first, the third behind what the second writes.
    step = Step.of(metadata([([1, 4, 5], 8, 2), ([1, 2], 0, 6), ([1, 4], 4, 4), ([9], 1, 1)]), SIZE)
    first, second, third, fourth = step.requests
    assert list(step.rounds()) == [[second, fourth], [third], [first]]


def keep(kept, requests, rows):
    step = Step.of(metadata(requests), SIZE)
    kept.keep(step.requests, torch.tensor(rows, dtype=torch.float32)[..., None])


def before(kept, *requests):
    found = kept.before(Step.of(metadata(requests), SIZE).requests)
    return None if found is None else found[:, 0].tolist()


def test_states_follow_blocks():
    kept = BlockStates(1)
    assert before(kept, ([3, 1], 0, 5)) is None
    keep(kept, [([3, 1], 0, 5)], [[10, 11, 12, 13, 14]])
    assert before(kept, ([3, 1], 5, 1), ([2], 0, 1)) == [14, 0]
    assert before(kept, ([3, 7], 4, 2)) == [13]  # another request, behind the full block
    keep(kept, [([3, 1], 5, 1), ([3, 7], 4, 1)], [[20], [30]])
    assert before(kept, ([3, 1], 6, 1), ([3, 7], 5, 1), ([3, 9], 4, 1)) == [20, 30, 13]


def test_what_was_not_read_is_refused():
    kept = BlockStates(1)
    with pytest.raises(RoutingError, match=r"goes on behind token 3, .* of no token"):
        before(kept, ([3, 1], 4, 1))
    keep(kept, [([3, 1], 0, 7)], [list(range(7))])
    for position in (5, 6):  # tokens were taken back
        with pytest.raises(RoutingError, match=rf"behind token {position - 1}, .* of token 6"):
            before(kept, ([3, 1], position, 1))
    with pytest.raises(RoutingError, match=r"behind token 7, .* of token 6"):  # a token was skipped
        before(kept, ([3, 1, 4], 8, 1))
