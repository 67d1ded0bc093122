"""load_base: every kind of spec that can be had without a network, and every refusal by its message."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from conftest import FAMILIES, make_tokenizer
from phatgoose.errors import BaseModelError, StorageError
from phatgoose.fingerprints import same_base
from phatgoose.models.base.base import Base
from phatgoose.models.base.load import DEFAULT_BASE, load_base


@pytest.fixture
def saved(make_base, tmp_path):
    """saved(family) → (the base, the folder it was saved in)."""

    def save(family="llama", **options):
        base = make_base(family, **options)
        folder = tmp_path / f"saved-{family}"
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        return base, folder

    return save


def edit(file, **changes):
    data = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            data.pop(key, None)
        else:
            data[key] = value
    file.write_text(json.dumps(data))


# What loads


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("as_path", [True, False])
def test_a_folder_loads_as_plain_transformers_does(saved, family, as_path):
    base, folder = saved(family)
    loaded = load_base(folder if as_path else str(folder))
    plain = (AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM).from_pretrained(folder)
    assert type(loaded.model) is type(plain)
    assert loaded.spec == str(folder)
    assert loaded.is_encoder_decoder == (family == "t5")
    ids = torch.tensor([[5, 9, 31, 200, 1]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})
    assert torch.equal(loaded.model(**inputs).logits, plain(**inputs).logits)
    assert not loaded.model.training
    assert loaded.tokenizer("yes no").input_ids == base.tokenizer("yes no").input_ids
    assert loaded.tokenizer.padding_side == ("right" if family == "t5" else "left")
    assert loaded.fingerprint.samples == base.fingerprint.samples
    assert loaded.notes == ()


def test_t5_with_a_head_of_its_own_keeps_it(saved):
    base, folder = saved("t5")
    base.model.lm_head.weight = torch.nn.Parameter(torch.randn(320, 32))
    base.model.save_pretrained(folder)
    loaded = load_base(folder)
    assert torch.equal(loaded.model.lm_head.weight, base.model.lm_head.weight)
    assert not torch.equal(loaded.model.shared.weight, loaded.model.lm_head.weight)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(saved, asked, expected):
    base, folder = saved("llama", dtype=torch.bfloat16)
    loaded = load_base(folder, dtype=asked)
    assert {p.dtype for p in loaded.model.parameters()} == {expected}
    assert same_base(base.fingerprint, loaded.fingerprint).level == "same"


def test_device_and_device_map(saved):
    base, folder = saved("qwen")
    for options in (
        {"device": "cpu"},
        {"device": torch.device("cpu")},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
    ):
        loaded = load_base(folder, **options)
        assert loaded.device == torch.device("cpu")
        assert loaded.fingerprint.samples == base.fingerprint.samples


def test_a_tokenizer_without_padding_pads_with_the_end_token(saved):
    _, folder = saved("gpt2")
    edit(folder / "tokenizer_config.json", pad_token=None)
    edit(folder / "generation_config.json", pad_token_id=None)
    loaded = load_base(folder)
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token == "</s>"
    batch = loaded.tokenizer(["yes", "yes no maybe"], padding=True, return_tensors="pt")
    assert batch.attention_mask[0, 0] == 0
    assert loaded.model.generation_config.pad_token_id == loaded.tokenizer.eos_token_id


def test_a_sentencepiece_tokenizer(saved, tmp_path):
    """google/t5-xl-lm-adapt and its kin have spiece.model alone."""
    if importlib.util.find_spec("google.protobuf") is None if importlib.util.find_spec("google") else True:
        pytest.skip("protobuf is not installed")
    import sentencepiece

    _, folder = saved("t5")
    (folder / "tokenizer.json").unlink()
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(["the quick brown fox jumps over the lazy dog", "yes no maybe true false"] * 20)
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "spiece"), vocab_size=60, model_type="unigram", pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    config = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_base(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    assert loaded.tokenizer("the quick fox").input_ids == [*model.encode("the quick fox"), 1]


def test_sharded_checkpoints(saved):
    base, folder = saved("llama")
    (folder / "model.safetensors").unlink()
    base.model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert load_base(folder).fingerprint.samples == base.fingerprint.samples


# What is refused, and how


def refused(message, spec, **options):
    with pytest.raises(BaseModelError, match=message) as caught:
        load_base(spec, **options)
    return str(caught.value)


def test_specs_that_lead_nowhere(tmp_path, monkeypatch):
    refused("did you mean 'smollm2-135m-instruct-q4'", "smollm2-135m-instruct")
    refused("no such file or folder", str(tmp_path / "nothing"))
    refused("no such file or folder", "./nothing")
    refused("no such file or folder", "nothing.gguf")
    refused("no such file or folder", "")
    refused("no such file or folder", "a b/c")
    refused("no such file or folder", f"{tmp_path}:nothing.gguf")
    (tmp_path / "x.safetensors").write_bytes(b"x")
    refused("is a file, and not a GGUF file", str(tmp_path / "x.safetensors"))
    refused("holds no model: there is no config.json", str(tmp_path))
    (tmp_path / "m.Q4.gguf").write_bytes(b"x")
    refused(r"holds GGUF files: say which one, as '.*:m.Q4.gguf'", str(tmp_path))


def test_revisions_only_on_the_hub(saved):
    _, folder = saved()
    refused("is a folder and has no revisions", str(folder), revision="main")
    refused("is an alias and has no revisions", DEFAULT_BASE, revision="main")
    refused("two revisions: 'a' in 'org/name@a', and revision='b'", "org/name@a", revision="b")


def test_no_network_says_what_was_tried():
    """HF_HUB_OFFLINE is set for all tests."""
    text = refused("HF_HUB_OFFLINE is set", "org/name")
    assert "no folder or file 'org/name' here" in text
    assert "known: gemma3-270m-pretrained-q4, smollm2-135m-instruct-q4" in refused(
        "HF_HUB_OFFLINE is set", "gpt2"
    )
    refused("HF_HUB_OFFLINE is set", "HuggingFaceTB/SmolLM2-135M-Instruct")  # no misspelt alias
    refused("file.gguf of 'org/name@v1'", "org/name@v1:file.gguf")


def hub_error(kind, **attributes):
    """The Hub's error without a response object, whose type changes between versions."""
    error = kind.__new__(kind)
    error.args = ("said by the Hub with hf_abcdefghijklmnop",)
    return error


NoRoute = type("ConnectError", (Exception,), {"__module__": "httpx"})
LOGIN = r"gated. Ask for access at https://huggingface.co/org/name, then log in with `hf auth"


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (hub_error(GatedRepoError), LOGIN),
        (hub_error(RepositoryNotFoundError), "no such model on the Hub, or it is private.*no folder or file"),
        (hub_error(RevisionNotFoundError), "no such revision"),
        (NoRoute("Name or service not known"), "the Hub can't be reached.*check the network"),
        (TimeoutError("read timed out"), "the Hub can't be reached.*check the network"),
        (None, "OSError: something with hf_… inside"),
    ],
)
def test_what_the_hub_answers(monkeypatch, cause, message):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def refuse(**_):
        raise OSError("something with hf_abcdefghijklmnop inside") from cause

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    assert "abcdefghijklmnop" not in refused(message, "org/name@main")


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (hub_error(RepositoryNotFoundError), "no such model on the Hub.*no folder or file"),
        (NoRoute("Name or service not known"), "the Hub can't be reached"),
    ],
)
def test_a_mistyped_base_is_asked_for_once(monkeypatch, tmp_path, cause, message):
    """transformers would ask six times, with pauses that add up to half a minute."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []

    def refuse(*_, **__):
        asked.append(1)
        raise cause

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda **_: pytest.fail("transformers was asked"))
    for spec in ("org/mistyped", "org/mistyped:model.gguf"):
        refused(message, spec)
    assert len(asked) == 2


def test_no_space_for_a_download(monkeypatch):
    def refuse(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(StorageError, match="no space left"):
        load_base("org/name")


def test_pickles_are_not_opened(saved):
    base, folder = saved()
    (folder / "model.safetensors").unlink()
    torch.save(base.model.state_dict(), folder / "pytorch_model.bin")
    text = refused("only pytorch_model.bin; weights in pickle files are not read", folder)
    assert "use_safetensors=False).save_pretrained('converted')" in text
    (folder / "pytorch_model.bin").unlink()
    refused(r"no \*.safetensors file", folder)


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json"])
def test_a_file_without_permission_is_not_called_missing(saved, name, monkeypatch):
    """safetensors says of it that there is no such file; transformers goes on without generation settings."""
    _, folder = saved()
    monkeypatch.setattr(os, "access", lambda path, **_: Path(path).name != name)
    refused(f"{name} can't be read: no permission", folder)


def test_truncated_weights_are_named(saved):
    _, folder = saved()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(r"model.safetensors is damaged: .*copy it again", folder)
    file.write_bytes(b"\xff" * 50)
    refused(r"model.safetensors is damaged", folder)


def test_weights_that_are_missing_or_of_another_shape(saved):
    _, folder = saved()
    file = folder / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, file, {"format": "pt"})
    refused("no weights for 1 tensors of LlamaForCausalLM, 'model.norm.weight' among them", folder)
    save_file(tensors | {"model.norm.weight": torch.cat([norm, norm])}, file, {"format": "pt"})
    refused("can't load the weights", folder)


def test_a_model_without_a_head_is_refused(saved):
    from transformers import LlamaModel

    base, folder = saved()
    assert isinstance(base.model.model, LlamaModel)
    base.model.model.save_pretrained(folder)
    refused(r"'lm_head.weight' among them.*\['LlamaModel'\].*needs a language-model head", folder)


def test_configs_that_lead_nowhere(saved):
    _, folder = saved()
    config = folder / "config.json"
    kept = config.read_text()
    edit(config, model_type="no-such-architecture")
    refused("transformers doesn't know its architecture.*no-such-architecture", folder)
    edit(config, model_type="vit")
    refused("transformers doesn't know its architecture", folder)
    edit(config, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text("raise SystemExit('this code must not run')")
    refused("Python code from its own repository", folder)
    config.write_text(kept[: len(kept) // 2])
    refused("can't load the configuration", folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_tokenizer_is_not_made_up(saved, family):
    _, folder = saved(family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused("can't load the tokenizer", folder)


def test_tokenizers_that_do_not_fit(saved):
    _, folder = saved()
    edit(folder / "tokenizer_config.json", eos_token=None)
    refused("no end-of-sequence token", folder)
    other = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer, eos_token="</s>", pad_token="[NEW]"
    )
    other.save_pretrained(folder)
    refused("its pad_token at 320, but the model embeds only 320", folder)


def test_an_adapter_is_no_base(make_expert, make_base, saved):
    expert = make_expert(make_base("llama"))
    refused("is a PEFT adapter, not a base", expert.folder)
    _, folder = saved()
    shutil.copy(expert.folder / "adapter_config.json", folder)
    refused("is a PEFT adapter, not a base", folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "floaty"}, "unknown dtype 'floaty'"),
        ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"dtype": torch.int8}, "a floating torch dtype, got torch.int8"),
        ({"device": "warp:0"}, "the device 'warp:0' can't be used"),
        ({"device": "cuda:99"}, "the device 'cuda:99' can't be used"),
        ({"device": "cpu", "device_map": "auto"}, "not both"),
        ({"quantization": "5bit"}, "unknown quantization '5bit'"),
    ],
)
def test_options_are_checked_first(options, message):
    refused(message, "org/never-looked-up", **options)


def test_packing_needs_bitsandbytes(saved, monkeypatch):
    from transformers import BitsAndBytesConfig

    _, folder = saved()
    if importlib.util.find_spec("bitsandbytes") is None:
        for asked in ("8bit", "4bit", BitsAndBytesConfig(load_in_8bit=True)):
            refused("pip install bitsandbytes", folder, quantization=asked)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = load_base(folder)
        for asked in ("8bit", "4bit"):
            loaded = load_base(folder, quantization=asked)
            assert same_base(base.fingerprint, loaded.fingerprint).level == "same"


def test_a_head_is_handed_what_it_reads_in_one_piece(make_base):
    """A slice makes torch copy a frozen head for every row."""
    base = make_base("llama")
    head, given = base.model.get_output_embeddings(), []
    again = Base(base.model, base.tokenizer, "again")
    head.register_forward_hook(lambda module, args, output: given.append(args[0]))
    again.model.generate(torch.randint(2, 300, (3, 7)), max_new_tokens=2, min_new_tokens=2)
    assert [tuple(x.shape) for x in given] == [(3, 1, base.model.config.hidden_size)] * 2
    assert all(x.is_contiguous() for x in given)
    assert len(head._forward_pre_hooks) == 1
