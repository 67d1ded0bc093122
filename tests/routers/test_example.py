"""Routers by text against brute force and their formulas, on a toy encoder."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

from phatgoose.errors import BaseModelError, RoutingError
from phatgoose.experts.data_signature import DataSignature
from phatgoose.ops import backend
from phatgoose.routers import Centroid, Retrieval, SoftCentroid, parse_router
from phatgoose.routers.context import RoutingContext, Texts
from phatgoose.routers.router import Candidates, Setup

OPS, WIDTH, SHA = backend("reference"), 9, "a" * 64


class Toy:
    """A text's vector is random, and always the same."""

    name, sha256 = "toy", SHA

    def __call__(self, texts):
        rows = [
            torch.randn(WIDTH, generator=torch.Generator().manual_seed(zlib.crc32(t.encode()))) for t in texts
        ]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1) if rows else torch.zeros(0, WIDTH)


class Fake:
    def __init__(self, name, signature):
        self.name, self.signature = name, signature


class Unreadable:
    """An expert whose signature mustn't be read."""

    name = "unreadable"

    @property
    def signature(self):
        raise AssertionError("was read")


def decode(ids):
    return "".join(chr(97 + i) for i in ids)


def pool(*counts, sha=SHA, seed=0):
    torch.manual_seed(seed)
    vectors = [torch.nn.functional.normalize(torch.randn(n, WIDTH), dim=1) for n in counts]
    return [Fake(f"e{i}", DataSignature(None, v, "toy", sha)) for i, v in enumerate(vectors)], vectors


def setup(experts, decode=decode):
    return Setup(tuple(experts), decode, lambda name: Toy())


def candidates(names, members):
    return Candidates("m", names, members, (None,) * len(members), 5)


def context(texts, rows, length):
    return RoutingContext("m", rows, length, None, None, lambda path: texts)


def fixed(prompts, length):
    return Texts(
        tuple(prompts), torch.zeros(len(prompts), length, dtype=torch.bool), None, ((),) * len(prompts)
    )


PROMPTS = ["one", "two", (3, 4, 5), "four", "one"]


def vectors_of(prompts):
    return Toy()([p if isinstance(p, str) else decode(p) for p in prompts])


def test_library_is_embeddings_under_its_old_name():
    experts, _ = pool(4, 1)
    with pytest.warns(DeprecationWarning, match=r"Centroid\.library is now embeddings"):
        found = Centroid().library(setup(experts))
    texts = fixed(PROMPTS, 2)
    assert torch.equal(found.prompts(texts), Centroid().embeddings(setup(experts)).prompts(texts))


def test_retrieval_is_a_brute_force_search():
    experts, vectors = pool(40, 1, 7, 1000)
    bound = Retrieval().prepared(setup(experts)).bind(candidates(("e0", "e1", "e2", "e3"), (0, 1, 2, 3)))
    chosen, weights = bound(torch.zeros(10, 5), context(fixed(PROMPTS, 2), 5, 2), OPS)
    assert chosen.shape == weights.shape == (10, 1)
    assert weights.unique().tolist() == [1.0]
    for row, q in enumerate(vectors_of(PROMPTS)):
        best, expert = -2.0, None
        for number, texts in enumerate(vectors):
            for x in texts:
                similarity = sum(float(a) * float(b) for a, b in zip(q, x, strict=True))
                if similarity > best + 1e-6:
                    best, expert = similarity, number
        assert chosen[2 * row : 2 * row + 2, 0].tolist() == [expert] * 2


def test_centroid_takes_the_nearest_mean():
    experts, vectors = pool(40, 3, 7)
    bound = Centroid().prepared(setup(experts)).bind(candidates(("e0", "e1", "e2"), (0, 1, 2)))
    chosen, _ = bound(torch.zeros(5, 5), context(fixed(PROMPTS, 1), 5, 1), OPS)
    cosines = torch.stack(
        [torch.nn.functional.cosine_similarity(vectors_of(PROMPTS), v.mean(0)[None]) for v in vectors], 1
    )
    assert chosen[:, 0].tolist() == cosines.argmax(1).tolist()
    assert len(set(chosen[:, 0].tolist())) > 1


def test_an_expert_that_is_missing_at_a_module_does_nothing_there_and_beams_repeat_their_prompt():
    experts, _ = pool(40, 3, 7)
    whole = Centroid().prepared(setup(experts))
    texts = fixed(PROMPTS, 1)
    every, _ = whole.bind(candidates(("e0", "e1", "e2"), (0, 1, 2)))(
        torch.zeros(10, 5), context(texts, 10, 1), OPS
    )
    assert every[0::2].tolist() == every[1::2].tolist()
    some, _ = whole.bind(candidates(("e0", "e1", "e2"), (2, 0)))(
        torch.zeros(10, 5), context(texts, 10, 1), OPS
    )
    assert some[:, 0].tolist() == [{0: 1, 1: -1, 2: 0}[e] for e in every[:, 0].tolist()]


@pytest.mark.parametrize("every", [0, 1, 2, 3])
@pytest.mark.parametrize("temperature", [1, 4])
def test_soft_centroid_is_its_formula_at_every_token(every, temperature):
    experts, vectors = pool(40, 3, 7)
    router = SoftCentroid(temperature=temperature, every=every)
    bound = router.prepared(setup(experts)).bind(candidates(("e0", "e1", "e2"), (0, 2)))
    ids = torch.tensor([[7, 8, 1, 2, 3], [9, 9, 9, 6, 0]])
    fresh = torch.tensor([[False, False, True, True, True], [False, False, False, True, False]])
    texts = Texts(((7, 8), "text"), fresh, ids, ((), (4, 4)))
    chosen, weights = bound(torch.zeros(10, 5), context(texts, 2, 5), OPS)
    assert chosen.tolist() == [[0, 1]] * 10
    so_far = [[decode([7, 8]), decode([7, 8]), decode([7, 8, 1]), decode([7, 8, 1, 2]), decode([7, 8, 1, 2, 3])],
              ["text", "text", "text", "text" + decode([4, 4, 6]), "text"]]  # fmt: skip
    behind = [[0, 0, 1, 2, 3], [0, 0, 0, 3, 0]]
    means = [v.mean(0) / v.mean(0).norm() for v in vectors]
    for row in range(2):
        for place in range(5):
            number = behind[row][place]
            count = number // every * every if every else 0
            text = so_far[row][place]
            text = text[: len(text) - (number - count)]  # a character a token
            (q,) = Toy()([text])
            s = [float(q @ m) for m in means]
            s[s.index(max(s))] *= temperature
            total = sum(map(math.exp, s))
            expected = [math.exp(s[0]) / total, math.exp(s[2]) / total]
            assert weights[row * 5 + place].tolist() == pytest.approx(expected, rel=1e-5)


def test_an_encoder_decoders_answer_is_a_text_of_its_own():
    experts, _ = pool(4, 3)
    library = SoftCentroid().embeddings(setup(experts))
    texts = Texts(((1, 2),), torch.tensor([[True]]), torch.tensor([[5]]), ((3,),), apart=True)
    assert torch.equal(library.so_far(texts, 1)[0, 0], Toy()([f"{decode([1, 2])} {decode([3, 5])}"])[0])


def test_what_is_missing_is_named():
    experts, _ = pool(4, 3)
    with pytest.raises(RoutingError, match="pass the Base"):
        Retrieval().prepared(setup(experts, decode=None))
    bare = [experts[0], Fake("bare", None), Fake("means", DataSignature({"m": torch.ones(5)}))]
    for name in ("bare", "means"):
        with pytest.raises(
            RoutingError, match=f"expert '{name}' has no embedded training texts, which Centroid needs"
        ):
            Centroid().prepared(setup([e for e in bare if e.name in ("e0", name)]))
    with pytest.raises(RoutingError, match="expert 'bare'"):  # before any signature behind it is read
        Centroid().prepared(setup([*bare[:2], Unreadable()]))
    other, _ = pool(2, sha="b" * 64)
    other[0].name = "stranger"
    with pytest.raises(RoutingError, match="'e0' and 'stranger' embedded their texts with two encoders"):
        Retrieval().prepared(setup([experts[0], *other]))
    with pytest.raises(RoutingError, match="'toy' is another encoder"):
        Retrieval().prepared(setup(other))

    def nowhere(name):
        raise BaseModelError("no such folder.")

    with pytest.raises(RoutingError, match=r"can't be loaded: no such folder.*encoder=FOLDER"):
        Retrieval().prepared(Setup(tuple(experts), decode, nowhere))
    with pytest.raises(RoutingError, match=r"attach it with route\(\)"):
        Retrieval().bind(candidates(("e0",), (0,)))
    unknown = Texts(
        ("x",), torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.long), ("rows of one …",)
    )
    bound = SoftCentroid().prepared(setup(experts)).bind(candidates(("e0", "e1"), (0, 1)))
    with pytest.raises(RoutingError, match="what was written behind the prompt is unknown: rows of one"):
        bound(torch.zeros(1, 5), context(unknown, 1, 1), OPS)


def test_settings_are_parsed_checked_and_described():
    assert parse_router("soft-centroid:every=0,temperature=2") == SoftCentroid(temperature=2, every=0)
    assert parse_router("retrieval:encoder=some/folder") == Retrieval(encoder="some/folder")
    assert Retrieval(encoder="x").describe() == {"router": "Retrieval"}
    assert SoftCentroid().describe() == {"router": "SoftCentroid", "temperature": 4, "every": 1}
    for wrong in ({"every": -1}, {"temperature": 0}, {"every": True}):
        with pytest.raises(RoutingError, match="expected a whole number"):
            SoftCentroid(**wrong)
