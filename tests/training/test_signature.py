"""Data signatures as they are made: mean inputs against plain PEFT, row by row, and texts as they are read back."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from training_helpers import make_task, state_of

from encoder_fixtures import make_encoder
from phatgoose.errors import BaseModelError, TrainingError
from phatgoose.experts.data_signature import describe
from phatgoose.experts.expert import Expert
from phatgoose.models.attach.attach import route
from phatgoose.models.base.sentence_encoder import load_encoder
from phatgoose.models.moe.names import modules_by_path
from phatgoose.models.text.encoding import encode_input
from phatgoose.training import signature
from phatgoose.training.signature import SignatureConfig, make_signature


@pytest.fixture
def encoder(tmp_path):
    return str(make_encoder(tmp_path / "encoder", max_tokens=60))


def plainly(base, folder, task, most):
    """Mean input of every adapted module of plain PEFT's model, one row at a time, no padding."""
    model = PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval()
    sums, counts = {}, {}
    for path, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):

            def hook(m, args, path=path):
                u = args[0].reshape(-1, args[0].shape[-1]).double()
                sums[path] = sums.get(path, 0) + u.sum(0)
                counts[path] = counts.get(path, 0) + len(u)

            module.register_forward_pre_hook(hook)
    for example in task.train[:most]:
        answer, end = example.targets[0], base.tokenizer.eos_token_id
        with torch.no_grad():
            if base.is_encoder_decoder:
                ids = base.tokenizer(example.input)["input_ids"]
                target = [*base.tokenizer(answer)["input_ids"], end]
                model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[0, *target[:-1]]]))
            else:
                ids = [*base.tokenizer(f"{example.input} {answer}")["input_ids"], end]
                model(input_ids=torch.tensor([ids]))
    return {path: sums[path] / counts[path] for path in sums}, counts


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_activations_are_the_mean_inputs_with_the_expert_on(
    make_base, make_expert, tmp_path, encoder, family
):
    base, task = make_base(family), make_task(train=13)
    expert = make_expert(base, "one", scale=0.5)
    before = state_of(base.model)
    made = make_signature(base, expert, task, SignatureConfig(encoder=encoder, rows=13, rows_per_batch=4))
    assert state_of(base.model) == before
    assert expert.signature is None
    means, counts = plainly(base, expert.folder, task, 13)
    assert made.signature.activations.keys() == means.keys()
    for path, mean in made.signature.activations.items():
        assert float((mean.double() - means[path]).norm() / means[path].norm()) < 1e-5
    record = made.provenance["signature"]
    assert (record["rows"], record["tokens"]) == (13, max(counts.values()))
    assert record["encoder"] == "encoder"
    again = Expert.load(made.save(tmp_path / "expert"))
    assert again.signature.hash == made.signature.hash


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_means_of_prompts_are_the_bare_bases_standardised_inputs(make_base, make_expert, tmp_path, family):
    base, task = make_base(family), make_task(train=13)
    expert = make_expert(base, "one", scale=0.5)
    before = state_of(base.model)
    made = make_signature(base, expert, task, SignatureConfig(texts=0, rows=13, rows_per_batch=4))
    assert state_of(base.model) == before
    sums, count = {}, 0
    modules = modules_by_path(base.model, expert.updates)
    for path in expert.updates:

        def hook(m, args, output, path=path):
            u = args[0][0].double()
            u = u - u.mean(-1, keepdim=True)
            sums[path] = sums.get(path, 0) + (u / (u.square().mean(-1, keepdim=True) + 1e-5).sqrt()).sum(0)

        modules[path].register_forward_hook(hook)
    stack = base.model.get_encoder() if base.is_encoder_decoder else base.model.base_model
    for example in task.train[:13]:
        ids = encode_input(base, example)
        count += len(ids)
        with torch.no_grad():
            stack(input_ids=torch.tensor([ids]))
    # A decoder behind an encoder reads no prompt.
    assert made.signature.prompts.keys() == sums.keys()
    assert (len(sums) < len(expert.updates)) == base.is_encoder_decoder
    for path, mean in made.signature.prompts.items():
        assert float((mean.double() - sums[path] / count).norm() / mean.norm()) < 1e-5
    again = Expert.load(made.save(tmp_path / "expert"))
    assert again.signature.prompts.keys() == sums.keys()
    assert "of 13 rows and their prompts" in describe(again.provenance["signature"])


def test_texts_are_the_prompts_as_the_tokenizer_gives_them_back(make_base, make_expert, encoder):
    base, task = make_base("llama"), make_task(train=9)
    expert = make_expert(base, "one")
    made = make_signature(base, expert, task, SignatureConfig(encoder=encoder, rows=0, texts=5, seed=3))
    assert made.signature.activations is None
    whole = load_encoder(encoder)([e.input for e in task.train])
    found = [int((whole @ x).argmax()) for x in made.signature.texts]
    assert found == sorted(set(found))
    assert len(found) == 5
    torch.testing.assert_close(made.signature.texts, whole[found])
    other = make_signature(base, expert, task, SignatureConfig(encoder=encoder, rows=0, texts=5, seed=4))
    assert made.provenance["signature"]["key"] != other.provenance["signature"]["key"]


def test_a_stopped_one_goes_on_and_ends_in_the_same_numbers(
    make_base, make_expert, tmp_path, encoder, monkeypatch
):
    base, task = make_base("llama"), make_task(train=17)
    expert, config = make_expert(base, "one"), SignatureConfig(encoder=encoder, texts=0, rows_per_batch=2)
    whole = make_signature(base, expert, task, config)
    monkeypatch.setattr(signature, "SAVE_SECONDS", 0.0)
    real, calls = signature._forward, []

    def stopping(base, rows):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(len(rows))
        real(base, rows)

    monkeypatch.setattr(signature, "_forward", stopping)
    with pytest.raises(KeyboardInterrupt):
        make_signature(base, expert, task, config, work_folder=tmp_path / "work")
    ran = []
    monkeypatch.setattr(signature, "_forward", lambda base, rows: (ran.append(len(rows)), real(base, rows)))
    found = make_signature(base, expert, task, config, work_folder=tmp_path / "work")
    assert len(ran) == 5
    assert found.signature.hash == whole.signature.hash
    assert found.provenance["signature"]["tokens"] == whole.provenance["signature"]["tokens"]
    ran.clear()
    make_signature(base, expert, make_task(train=16), config, work_folder=tmp_path / "work")  # other rows
    assert len(ran) == 8


def test_what_cannot_be_made_is_refused(make_base, make_expert, encoder):
    base = make_base("llama")
    expert, config = make_expert(base, "one"), SignatureConfig(encoder=encoder)
    with pytest.raises(TrainingError, match="no training rows"):
        make_signature(base, expert, make_task(train=0), config)
    with pytest.raises(BaseModelError):
        make_signature(make_base("llama", seed=9), expert, make_task(), config)
    from phatgoose import Pool

    route(base, Pool([expert]))
    with pytest.raises(TrainingError, match="routing is attached"):
        make_signature(base, expert, make_task(), config)
    for wrong, says in [
        ({"rows": -1}, "rows = -1: expected at least 0"), ({"texts": 1001}, "expected at most 1000"),
        ({"rows": 0, "texts": 0}, "both 0"), ({"rows_per_batch": 0}, "rows_per_batch"),
    ]:  # fmt: skip
        with pytest.raises(TrainingError, match=says):
            SignatureConfig(**wrong)
