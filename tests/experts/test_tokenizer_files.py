import copy
import json
import warnings

import pytest
from peft import LoraConfig, get_peft_model

from conftest import make_model, make_tokenizer
from phatgoose import Expert, Pool
from phatgoose.experts.files.tokenizer_files import differences, read_tokenizer_record, template_sha256


def compared(experts, tokenizer):
    return differences({e.name: e.provenance for e in experts}, tokenizer)


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def adapter(folder, tokenizer=None):
    get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def own():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def theirs(own):
    tokenizer = copy.deepcopy(own)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "another " + TEMPLATE
    return tokenizer


@pytest.mark.parametrize("how", ["load", "from_peft"])
def test_what_an_adapter_brings_is_told_at_load_and_kept(tmp_path, theirs, how):
    folder = adapter(tmp_path / "theirs", theirs)
    with pytest.warns(UserWarning, match=r"a chat template, 3 added tokens.*load the base from a folder"):
        expert = getattr(Expert, how)(folder)
    assert expert.provenance["tokenizer"]["added_tokens"] == {"<pad>": 0, "</s>": 1, "<tool>": 320}
    Pool([expert]).save(tmp_path / "pool")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the pool says it instead
        (again,) = Pool.load(tmp_path / "pool").experts
    assert again.provenance == expert.provenance


def test_a_plain_adapter_brings_nothing(tmp_path):
    expert = Expert.load(adapter(tmp_path / "plain"))
    assert "tokenizer" not in expert.provenance
    assert about_tokenizers(Pool([expert])) == []


def test_pools_name_the_experts_and_compare_them_with_a_base(tmp_path, own, theirs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = Expert.load(adapter(tmp_path / "same", own))
        other = Expert.load(adapter(tmp_path / "other", theirs))
    first, second = about_tokenizers(Pool([same, other]))
    assert "experts 'same', 'other' bring tokenizer files" in first
    assert "pool verify POOL --base BASE" in first
    assert "different chat templates" in second
    assert compared([same, other], theirs) == [d for d in compared([same], theirs) if "template" in d]
    template, tokens = compared([same, other], own)
    assert template.startswith(
        "expert 'other' brings a chat template of its own, and the base's is another one"
    )
    assert "other ids, 1 in all" in tokens
    assert "'<tool>' (id 320; the base: none)" in tokens
    assert about_tokenizers(Pool([same]), own) == []
    without = make_tokenizer()
    assert "the base has none" in compared([same], without)[0]


def test_the_template_of_its_own_training_is_compared(tmp_path, own, theirs):
    trained = {"task": {"chat_template": template_sha256(TEMPLATE + "\n")}}
    expert = Expert.from_peft(adapter(tmp_path / "plain"), provenance=trained)
    assert compared([expert], own) == []
    (line,) = compared([expert], theirs)
    assert "trained on conversations through another chat template" in line


@pytest.mark.parametrize(
    ("files", "tokens", "has_template"),
    [
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "x"}]}}, {}, True),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"7": {"content": "<a>"}}}}, {"<a>": 7}, False),
        ({"added_tokens.json": {"<a>": 7, "<b>": "x"}}, {"<a>": 7}, False),
        ({"tokenizer_config.json": [1]}, {}, False),
        ({"tokenizer_config.json": {"added_tokens_decoder": 3, "chat_template": 4}}, {}, False),
        ({"tokenizer.json": {"added_tokens": [{"id": 7, "content": "<a>"}, 3]}}, {"<a>": 7}, False),
    ],
)  # fmt: skip
def test_forms_of_the_files(tmp_path, files, tokens, has_template):
    assert read_tokenizer_record(tmp_path) is None
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    found = read_tokenizer_record(tmp_path)
    assert found["files"] == list(files)
    assert found["added_tokens"] == tokens
    assert (found["chat_template"] is not None) == has_template


def test_a_strangers_record_breaks_nothing(tmp_path, own):
    expert = Expert.load(adapter(tmp_path / "plain"))
    for odd in (3, {"files": 3}, {"files": [], "chat_template": 3, "added_tokens": {"a": "b"}}):
        made = Expert(**{**vars_of(expert), "provenance": {"tokenizer": odd}})
        assert compared([made], own) == []
        Pool([made]).warnings()


def about_tokenizers(pool, tokenizer=None):
    return [w for w in pool.warnings(tokenizer=tokenizer) if "template" in w or "added tokens" in w]


def vars_of(expert):
    return {"name": expert.name, "adapter_config": expert.adapter_config, "tensors": expert.tensors}
