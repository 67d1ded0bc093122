"""Model cards: what they say, what they must not say, and whose they are."""

from __future__ import annotations

import copy
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel

from phatgoose import Expert, Pool
from phatgoose.errors import ExpertError
from phatgoose.experts.card.card import (
    CARD_LIMIT_BYTES,
    MARK,
    Facts,
    code,
    expert_card,
    hub_id,
    own_card,
    pool_card,
    public,
)
from phatgoose.experts.names import CARD_FILE
from phatgoose.experts.pool_folder import add_to_folder, remove_from_folder
from phatgoose.files import write_json

RECORD = {
    "kind": "expert",
    "base": {"spec": "org/base@v1", "architecture": {}, "samples": {}},
    "task": {"name": "bigbench:tense", "hash": "ab" * 32, "rows": {"used": 485, "train": 490}},
    "config": {"steps": 60, "rows_per_step": 16, "learning_rate": 0.001},
    "versions": {"phatgoose": "0.1.0", "torch": "2.13.0"},
    "validation_losses": [[20, 0.5], [40, 0.25], [60, 0.375]],
    "tokens": 82425,
    "seconds": 160.643,
    "gate": {"validation_losses": [[15, 0.125]], "config": {"steps": 30}},
}
CONFIG = {"peft_type": "LORA", "r": 16, "lora_alpha": 1, "base_model_name_or_path": "org/base"}


def facts(record=RECORD, config=CONFIG, gates=True, **others):
    return Facts("one", config, record, gates, **others)


def front(text):
    """The front matter, as the Hub reads it."""
    return ModelCard(text).data.to_dict()


def test_an_experts_card_says_what_is_recorded():
    text = expert_card(facts(modules=210, parameters=4884480, origin="org/x@" + "0" * 40))
    assert front(text) == {
        "base_model": "org/base",
        "library_name": "peft",
        "tags": ["phatgoose", "lora", "base_model:adapter:org/base"],
    }
    for words in (
        "# `one`",
        "`LoRA, rank 16`",
        "210 modules",
        "4,884,480 parameters",
        "`org/base@v1`",
        "`bigbench:tense`, 485 rows used",
        "ab" * 32,
        "one vector per module",
        "| validation loss | 0.2500, gated 0.1250 |",
        "60 steps of 16 rows, at learning rate 0.001, 82,425 tokens, 160.643 s",
        "`phatgoose 0.1.0`",
        "org/x@" + "0" * 40,
        'AutoModel.from_pretrained("org/base")',
        'PeftModel.from_pretrained(base, "REPOSITORY")',
        'Expert.pull("REPOSITORY")',
        'load_base("org/base@v1")',
        MARK,
    ):
        assert words in text, words


def test_the_examples_on_a_card_are_python():
    texts = [
        expert_card(facts()),
        expert_card(facts({}, {})),
        pool_card([(facts(), "experts/one")], "org/base"),
    ]
    for text in [*texts, pool_card([(facts(), "experts/one")], None)]:
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert blocks
        for block in blocks:
            compile(block, "card", "exec")


@pytest.mark.parametrize(
    ("config", "kind", "tag"),
    [
        ({"peft_type": "LORA", "r": 4, "use_dora": True}, "`DoRA, rank 4`", "lora"),
        ({"peft_type": "IA3"}, "`(IA)³`", "ia3"),
        ({"peft_type": "VERA"}, "`VeRA`", None),
        ({"peft_type": "VERA", "r": 256}, "`VeRA, rank 256`", None),
        ({"peft_type": "ADALORA", "r": 8}, "`AdaLoRA`", None),
        ({"peft_type": "ELSE", "r": 8}, "`ELSE`", None),
        ({"config": {"reduction_factor": 16}}, "`bottleneck adapter`", None),
    ],
)
def test_kinds(config, kind, tag):
    text = expert_card(facts({}, config))
    assert kind in text
    assert front(text)["tags"] == ["phatgoose", *([tag] if tag else [])]
    assert ("## With plain PEFT" in text) == ("peft_type" in config)
    assert front(text)["library_name"] == ("peft" if "peft_type" in config else "adapter-transformers")


def test_a_plain_adapter_has_a_card_too():
    text = expert_card(facts({}, {"peft_type": "LORA", "r": 8, "base_model_name_or_path": None}, gates=False))
    assert front(text) == {"library_name": "peft", "tags": ["phatgoose", "lora"]}
    assert "`phatgoose gate` trains them" in text
    assert "validation loss |" not in text


def test_a_pools_card_has_a_row_for_each_expert():
    plain = Facts("two", {"peft_type": "IA3"}, {}, False, origin="org/two@" + "1" * 40)
    text = pool_card([(facts(), "experts/one"), (plain, "experts/two.2")], "org/base@v1")
    assert front(text)["base_model"] == "org/base"
    assert "| `one` | `bigbench:tense` | `LoRA, rank 16` | yes | 0.2500, gated 0.1250 | – |" in text
    assert f"| `two` | – | `(IA)³` | no | – | `org/two@{'1' * 40}` |" in text
    assert 'subfolder="experts/one"' in text
    assert 'Pool.pull("REPOSITORY")' in text


EVIL = [
    "x\n---\nlicense: mit\n---\n# owned",
    "`code` <script>alert(1)</script> ![i](http://x/y.png) [l](javascript:x) | a | b",
    "```\n```python\nimport os",
    '"); import os  #',
    "a" * 5000,
    "org/" + "a" * 5000 + "@" + "a" * 5000,
    "\x1b[31m\u202egnp.exe\u200b\0\r\n- item",
    "{{ 7 * 7 }} {% raw %} ${x} <!-- ",
]


@pytest.mark.parametrize("text", EVIL)
def test_text_of_others_stands_there_literally(text):
    record = {
        "base": {"spec": text},
        "task": {"name": text, "hash": text, "rows": {"used": text}},
        "kind": "merged",
        "experts": [text, text],
        "config": {"steps": text},
        "versions": {text: text},
        "validation_losses": [[1, text], text],
        "gate": text,
    }
    harmless = expert_card(facts({**record, "base": {"spec": "b"}}, {"peft_type": "LORA"}))
    for config in ({"peft_type": text, "r": text, "base_model_name_or_path": text}, {"peft_type": "LORA"}):
        for card in (
            expert_card(facts(record, config, origin=text)),
            pool_card([(facts(record, config, origin=text), "experts/one")], text),
        ):
            assert set(front(card)) <= {"base_model", "library_name", "tags"}
            _, _, body = card.removeprefix("---\n").partition("\n---\n")
            assert yaml.safe_load(card.removeprefix("---\n").partition("\n---\n")[0])["library_name"]
            outside = re.sub(r"```python\n.*?\n```", "", body, flags=re.DOTALL)
            outside = re.sub(r"`[^`\n]*`", "", outside)
            assert "`" not in outside
            for piece in ("owned", "script", "javascript", "import os", "item", "7 * 7", "exe", "aaaa"):
                assert piece not in outside, piece
            assert all(line.isprintable() for line in card.splitlines())
            assert len(card) < 10000
            tables = [line for line in outside.splitlines() if line.startswith("|")]
            widths = {
                len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines() if line.startswith("|")
            }
            assert len(widths) == 1, tables
            assert body.count("\n# ") == 1
    assert harmless.count("```") % 2 == 0


@pytest.mark.parametrize(
    "broken",
    [
        None,
        [],
        "x",
        {"base": "x", "task": [], "gate": 3, "config": None, "versions": [], "validation_losses": {}},
        {"validation_losses": [[1], [1, None], [1, float("nan")], [1, True], 3], "seconds": float("inf")},
        {"task": {"name": 3, "hash": 4, "rows": []}, "experts": {"a": 1}, "base": {"spec": 7}},
    ],
)
def test_records_of_any_shape_have_a_card(broken):
    for config in (
        {},
        {"peft_type": 3},
        {"peft_type": "LORA", "r": {}},
        {"peft_type": "LORA", "r": float("nan")},
    ):
        assert "nan" not in expert_card(facts(broken, config)).lower().replace("finance", "")
        assert pool_card([(facts(broken, config), "experts/one")], None)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/models/llama", "llama"),
        ("/home/me/My Models/llama/", "llama"),
        ("~/llama", "llama"),
        ("~me/secret/llama", "llama"),
        ("C:\\Users\\me\\llama", "llama"),
        ("\\\\server\\share\\llama", "llama"),
        ("../me/llama", "llama"),
        ("./llama", "llama"),
        ("jsonl:/home/me/My data/d.jsonl?input=q", "jsonl:d.jsonl?input=q"),
        ("hf:~/data/set", "hf:set"),
        ("trained on /home/me/x.jsonl", "trained on x.jsonl"),
        ("org/name@v1", "org/name@v1"),
        ("bigbench:a/b_json", "bigbench:a/b_json"),
        ("https://huggingface.co/org/name", "https://huggingface.co/org/name"),
        ("smollm2-135m-instruct-q4", "smollm2-135m-instruct-q4"),
        ("", ""),
        (None, ""),
    ],
)
def test_local_paths_are_cut(text, shown):
    assert public(text) == shown
    card = expert_card(facts({"base": {"spec": text}, "task": {"name": text}}, {"peft_type": "LORA"}))
    for part in ("home", "Users", "odels", "My ", "secret", "server", "share", "~", "/me"):
        assert part not in card, part


def test_a_folder_here_is_no_hub_id(tmp_path, monkeypatch):
    assert hub_id("org/name") == hub_id("org/name@v1") == "org/name"
    assert (
        hub_id("name")
        is hub_id("a/b/c")
        is hub_id("/a/b")
        is hub_id(None)
        is hub_id("org/name:x.gguf")
        is None
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert hub_id("models/llama") is None


def test_a_base_that_others_can_load_is_in_the_example():
    for spec, shown in (
        ("smollm2-135m-instruct-q4", True),
        ("org/b@refs/pr/1", True),
        ("/home/x", False),
        ('a")', False),
    ):
        text = expert_card(facts({"base": {"spec": spec}}))
        assert (f'load_base("{spec}")' in text) == shown
        assert ('load_base("BASE")' in text) != shown


def test_code_spans():
    assert code("a|b`c\nd") == "`a\\|b'c d`"
    assert code("") == code(None) == code(" \n\0") == "–"
    assert code("x" * 300, 10) == "`" + "x" * 9 + "…`"


# On disk


@pytest.fixture
def base(make_base):
    return make_base("llama")


def test_a_card_is_written_with_the_expert_and_plain_peft_loads_it_all_the_same(base, make_expert, tmp_path):
    expert = make_expert(base, "one", rank=3)
    folder = expert.save(tmp_path / "e")
    text = (folder / CARD_FILE).read_text()
    assert text == expert_card(
        Facts("one", expert.adapter_config, expert.provenance, True, len(expert.updates), expert.parameters)
    )
    model = PeftModel.from_pretrained(copy.deepcopy(base.model), folder)
    assert model.active_adapter == "default"
    assert Expert.load(folder).equals(expert)


def test_pefts_empty_template_is_replaced_and_a_filled_one_kept(base, make_expert, tmp_path):
    expert = make_expert(base, "one", gates=False)
    template = (expert.folder / CARD_FILE).read_text()
    assert "[More Information Needed]" in template
    assert MARK in (expert.save(tmp_path / "a") / CARD_FILE).read_text()
    own = template.replace("# Model Card for Model ID", "# Tenses").replace("{", "(")
    (expert.folder / CARD_FILE).write_text(own)
    assert (Expert.from_peft(expert.folder).save(tmp_path / "b") / CARD_FILE).read_text() == own


def test_a_card_of_ones_own_travels_and_stays(base, make_expert, tmp_path):
    expert = make_expert(base, "one")
    folder = expert.save(tmp_path / "e")
    own = (folder / CARD_FILE).read_text().replace(MARK, "").replace("# `one`", "# Mine").encode()
    (folder / CARD_FILE).write_bytes(own)
    read = Expert.load(folder)
    pool = Pool([read]).save(tmp_path / "pool")
    assert (pool / "experts" / "one" / CARD_FILE).read_bytes() == own
    read.with_gates({p: g + 1 for p, g in read.gates.items()}).save(
        folder
    )  # in place, as `phatgoose gate` does
    assert (folder / CARD_FILE).read_bytes() == own


def test_a_card_of_ours_follows_what_it_describes(base, make_expert, tmp_path):
    folder = make_expert(base, "one", gates=False).save(tmp_path / "e")
    assert "`phatgoose gate` trains them" in (folder / CARD_FILE).read_text()
    read = Expert.load(folder)
    read.with_gates({p: u.A[0].float() for p, u in read.updates.items()}).save(folder)
    assert "`phatgoose gate` trains them" not in (folder / CARD_FILE).read_text()


def test_a_pools_card_follows_the_pool(base, make_expert, tmp_path):
    a, b, c = (make_expert(base, n, seed=i, gates=n != "c") for i, n in enumerate("abc"))
    pool = Pool([a, b]).save(tmp_path / "pool")

    def rows():
        return re.findall(r"^\| `(\w+)` \| .*? \| (yes|no) \|", (pool / CARD_FILE).read_text(), re.MULTILINE)

    assert rows() == [("a", "yes"), ("b", "yes")]
    add_to_folder(pool, c)
    assert rows() == [("a", "yes"), ("b", "yes"), ("c", "no")]
    remove_from_folder(pool, "b")
    assert rows() == [("a", "yes"), ("c", "no")]
    (pool / "experts" / "a" / "expert.json").write_text("{")
    (pool / "experts" / "c" / "adapter_config.json").unlink()
    remove_from_folder(pool, "a")
    assert rows() == [("c", "no")]
    (pool / CARD_FILE).write_text("mine")
    remove_from_folder(pool, "c")
    assert (pool / CARD_FILE).read_text() == "mine"


def test_cards_are_in_no_hash(base, make_expert, tmp_path):
    pool = Pool([make_expert(base, "one")]).save(tmp_path / "pool")
    for place in (pool, pool / "experts" / "one"):
        (place / CARD_FILE).write_text("changed")
    assert Pool.load(pool).names == ("one",)
    for place in (pool, pool / "experts" / "one"):
        (place / CARD_FILE).unlink()
    assert Pool.load(pool).names == ("one",)


def test_links_are_not_published(base, make_expert, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("the key")
    folder = make_expert(base, "one").save(tmp_path / "e")
    (folder / CARD_FILE).unlink()
    (folder / CARD_FILE).symlink_to(secret)
    assert own_card(folder) is None
    copied = Expert.load(folder).save(tmp_path / "copy")
    assert MARK in (copied / CARD_FILE).read_text()
    (folder / CARD_FILE).unlink()
    (folder / CARD_FILE).mkdir()
    assert own_card(folder) is None


def test_a_card_is_not_endless(base, make_expert, tmp_path):
    folder = make_expert(base, "one").save(tmp_path / "e")
    (folder / CARD_FILE).write_bytes(b"x" * (CARD_LIMIT_BYTES + 1))
    with pytest.raises(ExpertError, match=r"README.md is 1048577 bytes"):
        Expert.load(folder).save(tmp_path / "copy")
    pool = Pool([make_expert(base, "two", seed=1)]).save(tmp_path / "pool")
    (pool / CARD_FILE).write_bytes(b"x" * (CARD_LIMIT_BYTES + 1))
    add_to_folder(pool, make_expert(base, "three", seed=2))
    assert (pool / CARD_FILE).stat().st_size == CARD_LIMIT_BYTES + 1


def test_records_on_disk_may_hold_anything(base, make_expert, tmp_path):
    expert = make_expert(base, "one")
    folder = expert.save(tmp_path / "e")
    record = {**RECORD, "task": {"name": EVIL[1]}}
    write_json(folder / "expert.json", {"format": "phatgoose-expert", "version": 1, "provenance": record})
    pool = Pool([Expert.load(folder)]).save(tmp_path / "pool")
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", (pool / CARD_FILE).read_text())
