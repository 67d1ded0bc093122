"""Every architecture does what the table in docs/bases.md says: each cell is right against an oracle,
or refused by name."""

from __future__ import annotations

import pytest
from architecture_checks import CHECKS
from architecture_table import outcome, recorded

from architectures import ALL, DECODERS, ENCODER_DECODERS


def test_the_table_has_every_architecture_and_check():
    assert len(ALL) == len(DECODERS) + len(ENCODER_DECODERS)
    assert set(recorded()) == {(name, check) for name in ALL for check in CHECKS}


@pytest.mark.slow(89)
@pytest.mark.filterwarnings(
    "ignore"
)  # transformers', about kernels that aren't installed and odd tiny settings
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ALL)
def test_it_is_right_or_refused_as_the_table_says(name, check):
    assert outcome(name, check) == recorded()[name, check]
