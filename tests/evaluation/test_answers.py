"""What ends an answer, what makes it right, and when it can no longer become right."""

import pytest

from phatgoose.evaluation.rows import MatchRule

END = 1


@pytest.fixture
def judge(tokenizer):
    def run(text, *targets, limit=50, ended=False, ends=(END,), **options):
        tokens = tokenizer(text).input_ids + ([END] if ended else [])
        found = MatchRule(tokenizer, frozenset(targets), frozenset(ends), limit).judge(tokens, **options)
        return found and (found.correct, found.text, found.complete)

    return run


@pytest.mark.parametrize(
    ("text", "targets", "verdict"),
    [
        ("walked", ("walked",), (True, "walked", True)),
        ("  walked \t", ("walked",), (True, "walked", True)),
        ("Walked", ("walked",), (False, "Walked", True)),
        ("walk", ("walked", "walk"), (True, "walk", True)),
        ("walk", ("walked",), (False, "walk", True)),
        ("", ("walked",), (False, "", True)),
        ("", ("",), (True, "", True)),
        ("über ", ("über",), (True, "über", True)),
    ],
)
def test_an_end_token_decides(judge, text, targets, verdict):
    assert judge(text, *targets, ended=True) == verdict


@pytest.mark.parametrize(
    ("text", "targets", "verdict"),
    [
        ("walked\nand on", ("walked",), (True, "walked", True)),
        ("walked \nx", ("walked",), (True, "walked", True)),
        ("\nwalked", ("walked",), (False, "", True)),
        ("a\nb", ("a\nb",), None),  # a target holds a newline: newlines don't end
        ("a\nb", ("a", "x\ny"), (False, "a\nb", False)),
        ("a\nb ", ("a\nb",), None),
    ],
)
def test_a_newline_decides_unless_a_target_holds_one(judge, text, targets, verdict):
    assert judge(text, *targets) == verdict


@pytest.mark.parametrize(
    ("text", "targets", "is_open"),
    [
        ("wal", ("walked",), True),
        ("  wal", ("walked",), True),
        ("", ("walked",), True),
        ("   ", ("walked",), True),
        ("walked", ("walked",), True),
        ("walked  ", ("walked",), True),
        ("walked  a", ("walked",), False),
        ("walked ", ("walked on",), True),
        ("walked  ", ("walked on",), False),
        ("Wal", ("walked",), False),
        ("ran", ("walked", "ran off"), True),
        ("ran", ("walked", "run"), False),
    ],
)
def test_gives_up_only_when_no_target_can_follow(judge, text, targets, is_open):
    found = judge(text, *targets)
    assert found == (None if is_open else (False, text.strip(), False))
    assert judge(text, *targets, to_the_end=True) is None


def test_half_a_character_may_become_any(tokenizer):
    tokens = tokenizer("zü").input_ids
    rule = MatchRule(tokenizer, frozenset(["zü"]), frozenset([END]), 50)
    assert tokenizer.decode(tokens[:-1]).endswith("�")
    assert rule.judge(tokens[:-1]) is None
    assert rule.judge([*tokens, END]).correct
    assert not MatchRule(tokenizer, frozenset(["yü"]), frozenset([END]), 50).judge(tokens[:-1]).complete


def test_the_limit_counts_the_end(tokenizer):
    tokens = [*tokenizer("walked").input_ids, END]
    targets, ends = frozenset(["walked"]), frozenset([END])
    assert MatchRule(tokenizer, targets, ends, len(tokens)).judge(tokens).correct
    cut = MatchRule(tokenizer, targets, ends, len(tokens) - 1).judge(tokens[:-1])
    assert (cut.correct, cut.text, cut.complete) == (False, "walked", False)


def test_any_of_several_end_tokens(judge, tokenizer):
    other = tokenizer("q").input_ids[0]
    assert judge("walkedq", "walked", ends=(END, other)) == (True, "walked", True)
    assert judge("walkedq", "walked") == (False, "walkedq", False)
