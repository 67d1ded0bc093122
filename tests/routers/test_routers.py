"""Routers by themselves."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path

import pytest
import torch

from phatgoose import routers
from phatgoose.errors import RoutingError, UnknownName
from phatgoose.ops import backend
from phatgoose.routers import PHATGOOSE, Random, Single, Uniform, parse_router, parse_system
from phatgoose.routers.constant import _scramble
from phatgoose.routers.context import RoutingContext, Sequences, positions_from
from phatgoose.routers.router import Candidates


def test_splitmix_equals_its_definition_in_whole_numbers():
    def plain(z):
        mask = 2**64 - 1
        z = (z + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        return z - 2**64 if z >= 2**63 else z

    values = [0, 1, -1, 12345678901234567, -(2**63), 2**63 - 1]
    assert _scramble(torch.tensor(values)).tolist() == [plain(v % 2**64) for v in values]


def candidates(members=(0, 1, 2), names=("a", "b", "c"), d=8):
    return Candidates("m", names, members, tuple(None if m < 0 else torch.randn(d) for m in members), d)


def context(rows=4, length=50):
    ids = torch.arange(rows * length).reshape(rows, length)
    positions, real = positions_from(None, rows, length, 0, ids.device)
    return RoutingContext("m", rows, length, Sequences(ids, positions, real))


def test_random_draws_every_pair_about_equally_often():
    u = torch.zeros(200, 8)
    chosen, weights = Random(seed=1).bind(candidates())(u, context(), backend("reference"))
    assert weights.tolist() == [[0.5, 0.5]] * 200
    assert (chosen[:, 0] != chosen[:, 1]).all()
    counts = torch.bincount(chosen.reshape(-1), minlength=3) / 400
    assert torch.allclose(counts, torch.full((3,), 1 / 3), atol=0.06)


def test_random_draws_absent_experts_too_and_they_do_nothing():
    chosen, _ = Random(top_k=5).bind(candidates(members=(1,), names=("a", "b", "c")))(
        torch.zeros(200, 8), context(), backend("reference")
    )
    assert chosen.shape == (200, 3)
    assert (chosen == 0).sum(1).tolist() == [1] * 200
    assert (chosen == -1).sum(1).tolist() == [2] * 200


def test_constant_routers():
    u = torch.zeros(3, 8)
    chosen, weights = Uniform().bind(candidates(members=(0, 2)))(u, context(), backend("reference"))
    assert chosen.tolist() == [[0, 1]] * 3  # places among the candidates
    assert torch.allclose(weights, torch.full((3, 2), 1 / 3))
    chosen, weights = Single("c").bind(candidates(members=(0, 2)))(u, context(), backend("reference"))
    assert (chosen.tolist(), weights.tolist()) == ([[1]] * 3, [[1.0]] * 3)
    chosen, _ = Single(1).bind(candidates(members=(0, 2)))(u, context(), backend("reference"))
    assert chosen.shape == (3, 0)
    with pytest.raises(RoutingError, match="there is no expert 7: the pool has 3"):
        Single(7).check(("a", "b", "c"))


def test_null_candidate_takes_over_when_the_gate_says_no():
    d = 64
    gate = torch.randn(d)
    bound = PHATGOOSE().bind(Candidates("m", ("a", "b"), (0, -1), (gate, None), d))
    for sign in (1, -1):
        _, weights = bound(sign * gate[None], context(1, 1), backend("reference"))
        score = sign * d**0.5
        assert weights[0, 0].item() == pytest.approx(
            torch.tensor([abs(score), 0.0]).softmax(0)[0].item(), abs=1e-6
        )
    chosen, _ = bound(-gate[None], context(1, 1), backend("reference"))
    assert chosen[0, 0].item() == 1  # the null candidate leads


def test_a_name_goes_before_a_place():
    """Of experts named by numbers, single:2 is the one called 2, wherever it stands."""
    names = ("2", "0", "007")
    assert [parse_router(f"single:{text}").place(names) for text in ("2", "0", "007", "1")] == [0, 1, 2, 1]
    assert [Single(i).place(names) for i in range(3)] == [0, 1, 2]  # in Python a number is a place
    assert copy.deepcopy(parse_router("single:007")).place(names) == 2
    assert (
        parse_router("single:007").describe() != parse_router("single:7").describe()
    )  # results are kept by it
    for text in ("single:7", "single:3"):
        with pytest.raises(RoutingError, match="there is no expert"):
            parse_router(text).check(names)


def test_text_forms():
    assert parse_router("phatgoose") == PHATGOOSE()
    assert parse_router("PHATGOOSE:top_k=3") == PHATGOOSE(top_k=3)
    assert parse_router("random:seed=4,top_k=1") == Random(seed=4, top_k=1)
    assert parse_router("single:past-tense") == Single("past-tense")
    assert parse_router("single:2") == Single(2)
    assert parse_router("uniform") == Uniform()
    with pytest.raises(UnknownName, match="did you mean 'phatgoose'"):
        parse_router("fatgoose")
    with pytest.raises(RoutingError, match="has no setting 'k'"):
        parse_router("phatgoose:k=3")
    with pytest.raises(RoutingError, match="expected a whole number"):
        parse_router("phatgoose:top_k=two")
    with pytest.raises(RoutingError, match="top_k is given twice"):
        parse_router("phatgoose:top_k=3,top_k=2")
    assert PHATGOOSE(top_k=3).describe() == {"router": "PHATGOOSE", "top_k": 3}


@pytest.mark.parametrize(
    "text",
    ["phatgoose:", "phatgoose:,", "phatgoose:top_k=3,", "random:,seed=1", "random:seed=1,,top_k=1", "ties:", "ties:,",
     "ties:density=0.3,"],
)  # fmt: skip
def test_an_empty_setting_is_refused(text):
    with pytest.raises(RoutingError, match=rf"'{text}': a setting is empty\. Write key=value after"):
        parse_system(text)


def test_contexts_match_beams_and_kept_tokens_or_refuse():
    tokens = context(2, 5).tokens()
    beams = tokens.aligned(6, 5)
    assert torch.equal(beams.positions[:3], tokens.positions[:1].expand(3, 5))
    kept = tokens.aligned(2, 2, torch.tensor([4, 1]))
    assert kept.positions.tolist() == [[4, 1], [4, 1]]
    with pytest.raises(RoutingError, match="can't be matched"):
        tokens.aligned(2, 1)  # which one isn't said
    with pytest.raises(RoutingError, match="can't be matched"):
        tokens.aligned(3, 5)
    with pytest.raises(RoutingError, match="outside of a call"):
        RoutingContext("m", 1, 1, None).tokens()


def test_positions_count_past_a_cache_and_without_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions, real = positions_from(mask, 2, 2, 3, mask.device)
    assert positions.tolist() == [[1, 2], [3, 4]]
    assert real.all()
    positions, real = positions_from(mask, 2, 5, 0, mask.device)
    assert positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert real.tolist() == mask.bool().tolist()
    assert positions_from(None, 1, 2, 7, mask.device)[0].tolist() == [[7, 8]]
    before = torch.tensor(
        [2, 7]
    )  # of 7 cached ones; a recurrent model is given the mask of the new ones, or none
    assert positions_from(None, 2, 2, 7, mask.device, before)[0].tolist() == [[2, 3], [7, 8]]
    assert positions_from(mask, 2, 5, 7, mask.device, before)[0].tolist() == [
        [1, 1, 2, 3, 4],
        [7, 8, 9, 10, 11],
    ]
    with pytest.raises(RoutingError, match=re.escape("shape [2, 5]")):
        positions_from(mask, 2, 2, 4, mask.device)
    causal = torch.ones(5, 5).tril().bool() & mask.bool()[:, None, None]
    added = torch.where(causal, 0.0, torch.finfo(torch.bfloat16).min).to(torch.bfloat16)
    for whole in (causal, added, {"sliding_attention": causal[..., :2], "full_attention": causal}):
        positions, real = positions_from(whole, 2, 5, 0, mask.device)
        assert positions.tolist() == [[0, 1, 2, 3, 4]] * 2  # as the model itself counts without being told
        assert real.tolist() == mask.bool().tolist()
    for later in (
        causal[:, :, 3:],
        torch.nn.functional.pad(causal[:, :, 3:], (0, 4)),
    ):  # a static cache has room to spare
        assert positions_from(later, 2, 2, 3, mask.device)[1].all()
    for odd, said in ((causal[..., :4], "shape [2, 1, 5, 4]"), (mask[0], "shape [5]"), ("full", "a str")):
        with pytest.raises(RoutingError, match=re.escape(said)):
            positions_from(odd, 2, 5, 0, mask.device)


def test_the_room_has_the_names_of_the_table():
    """`routers/__init__.py` lists the classes of `ROUTERS` twice: for type checkers, and as its public names."""
    tree = ast.parse(Path(routers.__file__).read_text(encoding="utf-8"))
    checked = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imported = {f"{n.module}:{a.name}" for n in checked.body for a in n.names}
    assert imported == {*routers.ROUTERS.table.values(), "phatgoose.routers.router:Router"}
    functions = {"ROUTERS", "parse_router", "parse_system"}
    assert {*routers.__all__} == {path.partition(":")[2] for path in imported} | functions
    assert all(hasattr(routers, name) for name in routers.__all__)
