import copy
import hashlib
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from test_student import batch_of, plain_loss
from torch import nn
from training_helpers import SMALL, make_task, state_of

import phatgoose
from conftest import FAMILIES, make_tokenizer
from phatgoose.errors import BaseModelError, RoutingError, TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route
from phatgoose.models.base.base import Base
from phatgoose.training.config import GateConfig
from phatgoose.training.gate import GatedStudent, decode_path, encode_path, train_gate
from phatgoose.training.modules import target_paths
from phatgoose.training.trainer.progress import silent
from phatgoose.training.trainer.rows import training_rows

CONFIG = GateConfig(**SMALL)


@pytest.fixture
def task():
    return make_task()


class Gated(nn.Module):
    """W u + σ(vᵀu)·s·B A u, as it stands in the paper."""

    def __init__(self, inner, update):
        super().__init__()
        self.inner, self.update = inner, update
        self.v = nn.Parameter(torch.zeros(update.d_in))
        self.weight = inner.weight  # T5 asks its wo for it

    def forward(self, u):
        delta = self.update.scale * (u @ self.update.A.T) @ self.update.B.T
        return self.inner(u) + torch.sigmoid((u * self.v).sum(-1, keepdim=True)) * delta


def by_hand(base, expert):
    model = copy.deepcopy(base.model).requires_grad_(False)
    for path, update in expert.updates.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Gated(model.get_submodule(path), update))
    return model, {path: model.get_submodule(path).v for path in expert.updates}


def by_peft(base, expert, folder):
    """Plain PEFT with its own lora_B hooked: the other way to gate a frozen adapter."""
    expert.save(folder)
    model = PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval().requires_grad_(False)
    vectors = {}
    for path, update in expert.updates.items():
        layer, v = model.get_base_model().get_submodule(path), torch.zeros(update.d_in, requires_grad=True)
        inputs = []
        layer.register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.append(args[0]))
        layer.lora_B["default"].register_forward_hook(
            lambda m, args, out, inputs=inputs, v=v: out * torch.sigmoid(inputs.pop() @ v)[..., None]
        )
        vectors[path] = v
    return model, vectors


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_formulas(make_base, make_expert, family, tmp_path):
    base = make_base(family)
    expert = make_expert(base, gates=False)
    encoded, batch = batch_of(base)
    hand, hand_v = by_hand(base, expert)
    peft, peft_v = by_peft(base, expert, tmp_path / "saved")
    student = GatedStudent(base.model, expert.updates, CONFIG)
    found_v = {decode_path(key): gate.weight for key, gate in student.gates.items()}
    assert set(student.trained()) == {f"gates.{encode_path(path)}.weight" for path in expert.updates}
    for scale in (0.0, 0.3):  # as they start, and somewhere else
        generator = torch.Generator().manual_seed(4)
        for path, v in hand_v.items():
            values = torch.randn(v.shape, generator=generator) * scale
            for one in (v, peft_v[path], found_v[path]):
                with torch.no_grad():
                    one.copy_(values)
                one.grad = None
        expected = plain_loss(hand, base, encoded)
        other = plain_loss(peft, base, encoded)
        found = student(**batch) / (batch["labels"] != -100).sum()
        for loss in (expected, other, found):
            loss.backward()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-6)
        for path, v in hand_v.items():
            torch.testing.assert_close(found_v[path].grad[0], v.grad, rtol=2e-3, atol=2e-6)
            torch.testing.assert_close(peft_v[path].grad, v.grad, rtol=2e-3, atol=2e-6)
            assert v.grad.abs().max() > 0


def test_gates_in_bfloat16_have_the_gradients_of_float32(make_base, make_expert):
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        base = make_base("llama", dtype=dtype)
        expert = make_expert(make_base("llama"), gates=False)
        student = GatedStudent(base.model, expert.updates, CONFIG)
        student(**batch_of(base)[1]).backward()
        assert all(p.grad.dtype == torch.float32 for p in student.trained().values())
        grads.append(torch.cat([p.grad.flatten() for p in student.trained().values()]))
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.99
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 0.15


@pytest.mark.slow(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_gates_moves(make_base, make_expert, task, family, capsys, tmp_path):
    base = make_base(family)
    expert = make_expert(base, gates=False)
    before = state_of(base.model)

    def digest():
        return {k: hashlib.sha256(t.numpy().tobytes()).hexdigest() for k, t in expert.tensors.items()}

    tensors, record = digest(), copy.deepcopy(dict(expert.provenance))
    gated = train_gate(base, expert, task, CONFIG, work_folder=tmp_path, report=silent)
    assert state_of(base.model) == before
    assert digest() == tensors
    assert (expert.gates, dict(expert.provenance)) == (None, record)
    assert all(gated.tensors[k] is expert.tensors[k] for k in expert.tensors)
    assert capsys.readouterr() == ("", "")
    assert sorted(gated.gates) == sorted(expert.updates) == target_paths(base.model, "all-linear")
    for path, gate in gated.gates.items():
        assert gate.dtype == torch.float32
        assert gate.shape == (expert.updates[path].d_in,)
        assert gate.any()
        assert gate.isfinite().all()


def test_training_is_adamw_on_the_formula(make_base, make_expert, task):
    config = GateConfig(
        steps=5, rows_per_step=6, rows_per_batch=2, validate_every=0, warmup_share=0.4, learning_rate=0.01
    )
    base = make_base("llama")
    expert = make_expert(base, gates=False)
    gated = train_gate(base, expert, task, config, report=silent)
    model, vectors = by_hand(base, expert)
    optimizer = torch.optim.AdamW(vectors.values(), lr=0.01, weight_decay=0.0)
    rows = training_rows(base, task, config)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, step / 2)
        plain_loss(model, base, [rows.train[i] for i in range(6 * step, 6 * step + 6)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for path, v in vectors.items():
        torch.testing.assert_close(gated.gates[path], v.detach(), rtol=1e-2, atol=1e-4)


def test_gates_lower_the_loss_on_the_rows_they_were_trained_on(make_base, make_expert, task):
    base = make_base("llama")
    expert = make_expert(base, gates=False)
    config = GateConfig(steps=40, rows_per_step=21, rows_per_batch=21, validate_every=0)
    gated = train_gate(base, expert, task, config, report=silent)
    rows = training_rows(base, task, config).train
    model, vectors = by_hand(base, expert)
    losses = []
    with torch.no_grad():
        for trained in (False, True):
            for path, v in vectors.items():
                v.copy_(gated.gates[path] * trained)
            losses.append(plain_loss(model, base, [rows[i] for i in range(21)]).item())
    assert gated.provenance["gate"]["losses"][0][1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1] < losses[0]


def test_the_record(make_base, make_expert, task):
    base = make_base("llama")
    expert = make_expert(base, gates=False)
    known = Expert(
        expert.name,
        expert.adapter_config,
        expert.tensors,
        provenance={**expert.provenance, "seconds": 100.0, "tokens": 10_000},
    )
    gated = train_gate(base, known, task, CONFIG, report=silent)
    record = gated.provenance["gate"]
    assert (record["kind"], record["base"]) == ("gate", base.fingerprint.to_json())
    assert GateConfig(**record["config"]) == CONFIG
    assert record["task"]["hash"] == task.hash
    assert record["parameters"] == sum(u.d_in for u in expert.updates.values())
    assert record["cost_share"] == {
        "seconds": pytest.approx(record["seconds"] / 100, abs=1e-4),
        "tokens": pytest.approx(record["tokens"] / 10_000, abs=1e-4),
    }
    assert train_gate(base, expert, task, CONFIG, report=silent).provenance["gate"]["cost_share"] == {}
    assert phatgoose.train_gate is train_gate


def test_saved_and_loaded(make_base, make_expert, task, tmp_path):
    base = make_base("gpt2")
    gated = train_gate(base, make_expert(base, gates=False), task, CONFIG, report=silent)
    gated.save(tmp_path / "saved")
    loaded = Expert.load(tmp_path / "saved")
    assert all(torch.equal(loaded.gates[p], gated.gates[p]) for p in gated.gates)
    assert loaded.provenance["gate"] == gated.provenance["gate"]


def test_experts_of_another_base_are_refused(make_base, make_expert, task):
    expert = make_expert(make_base("llama"), gates=False)
    before = state_of(make_base("llama").model)["config"]
    with pytest.raises(BaseModelError, match="expert 'one'"):
        train_gate(make_base("llama", seed=1), expert, task, CONFIG, report=silent)
    unknown = Expert("stray", expert.adapter_config, expert.tensors)
    with pytest.raises(
        TrainingError,
        match=r"isn't the expert's base: .* a module this model lacks: unknown module 'model.layers",
    ):
        train_gate(make_base("gpt2"), unknown, task, CONFIG, report=silent)
    wide = make_base("llama")
    wide.model.model.layers[0].mlp.up_proj = nn.Linear(32, 50, bias=False)
    with pytest.raises(
        TrainingError,
        match=r"isn't the expert's base: .* an update 32 → 48 at .*up_proj, where this model has 32 → 50",
    ):
        train_gate(Base(wide.model, make_tokenizer(), spec="wide"), unknown, task, CONFIG, report=silent)
    assert state_of(make_base("llama").model)["config"] == before


def test_gates_say_what_base_they_are_for(make_base, make_expert, task):
    base, other = make_base("llama"), make_base("llama", seed=5)
    plain = replace(make_expert(base, gates=False), provenance={})  # as a published adapter is
    assert plain.base is None
    gated = train_gate(base, plain, task, CONFIG, report=silent)
    assert gated.base == base.fingerprint
    with pytest.raises(BaseModelError):
        route(other, Pool([gated]))
    with pytest.raises(BaseModelError):
        Pool([gated, make_expert(other, "b")])
    with pytest.raises(BaseModelError):
        train_gate(other, gated, task, CONFIG, report=silent)


def test_an_expert_that_brings_another_bases_weights_gets_no_gate(make_base, make_expert, task):
    base, other = make_base("llama"), make_base("llama", seed=5)
    expert = make_expert(other, gates=False)
    copies = {"model.embed_tokens.weight": other.model.get_input_embeddings().weight.detach()}
    expert = replace(expert, provenance={})
    object.__setattr__(expert, "base_copies", copies)
    with pytest.raises(RoutingError, match=r"brings its own model.embed_tokens.weight"):
        train_gate(base, expert, task, CONFIG, report=silent)


def test_an_expert_that_does_nothing_gets_no_gate(make_base, make_expert, task):
    base = make_base("llama")
    expert = make_expert(base, gates=False)
    tensors = {k: t * 0 if "lora_B" in k else t for k, t in expert.tensors.items()}
    idle = Expert("idle", expert.adapter_config, tensors)
    before = state_of(base.model)
    with pytest.raises(TrainingError, match="no gate moved from zero"):
        train_gate(base, idle, task, CONFIG, report=silent)
    assert state_of(base.model) == before


def test_a_loss_that_is_not_finite_stops_at_once(make_base, make_expert, task):
    base = make_base("llama")
    expert = make_expert(base, gates=False)
    huge = {k: t * 1e25 for k, t in expert.tensors.items()}
    with pytest.raises(TrainingError, match="gate huge: the loss is nan at step 1"):
        train_gate(base, Expert("huge", expert.adapter_config, huge), task, CONFIG, report=silent)


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.q_proj", "a%2Eb.c%25", "lm_head"])
def test_paths_survive_a_module_dict(path):
    assert "." not in encode_path(path)
    assert decode_path(encode_path(path)) == path
