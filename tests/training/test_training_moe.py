"""Gates and data signatures of experts inside a mixture's experts."""

from __future__ import annotations

import copy

import pytest
import torch
from test_student import batch_of, plain_loss
from training_helpers import SMALL, make_task, state_of

from conftest import make_tokenizer
from moe_fixtures import by_hand, change, fused_experts, make, peft_adapter, per_expert
from phatgoose import Expert, Pool, route
from phatgoose.models.base.base import Base
from phatgoose.training.config import GateConfig
from phatgoose.training.gate import GatedStudent, decode_path, train_gate
from phatgoose.training.signature import SignatureConfig, make_signature

CONFIG = GateConfig(**SMALL)


def _base(family: str) -> Base:
    return Base(make(family), make_tokenizer(), family)


def _expert(base: Base, family: str, folder, old: bool) -> Expert:
    if old:
        per_expert(base.model, family, folder, 1, rank=2)
    else:
        peft_adapter(base.model, folder, 1, target_modules=[])
    return Expert.from_peft(folder, name="one")


@pytest.mark.parametrize(("family", "old"), [("qwen3_moe", True), ("qwen3_moe", False), ("gpt_oss", False)])
def test_gates_inside_experts_have_the_formulas_gradients(tmp_path, family, old):
    base = _base(family)
    expert = _expert(base, family, tmp_path / "a", old)
    encoded, batch = batch_of(base)
    vectors = {
        path: torch.randn(u.d_in, generator=torch.Generator().manual_seed(5)).mul_(0.3).requires_grad_()
        for path, u in expert.updates.items()
    }

    def at(path, slot, u):
        y = slot.weight @ u + (0 if slot.bias is None else slot.bias)
        return y + torch.sigmoid(vectors[path] @ u) * change(expert.updates[path], u)

    hand = by_hand(copy.deepcopy(base.model).requires_grad_(False), [expert], at)
    expected = plain_loss(hand, base, encoded)
    expected.backward()
    student = GatedStudent(base.model, expert.updates, CONFIG)
    for key, gate in student.gates.items():
        with torch.no_grad():
            gate.weight.copy_(vectors[decode_path(key)])
    found = student(**batch) / (batch["labels"] != -100).sum()
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    moved = 0
    for key, gate in student.gates.items():
        wanted = vectors[decode_path(key)].grad
        if wanted is None:  # no token came here
            assert gate.weight.grad is None
            continue
        moved += 1
        torch.testing.assert_close(gate.weight.grad[0], wanted, rtol=2e-3, atol=2e-6)
    assert moved > len(fused_experts(base.model)) * 4


@pytest.mark.slow(5)
@pytest.mark.parametrize(("family", "old"), [("qwen3_moe", True), ("qwen3_moe", False)])
def test_gates_and_signatures_inside_experts(tmp_path, family, old):
    base, task = _base(family), make_task()
    expert = _expert(base, family, tmp_path / "a", old)
    before = state_of(base.model)
    gated = train_gate(base, expert, task, CONFIG)
    assert state_of(base.model) == before
    assert gated.gates is not None
    assert gated.gates.keys() == expert.updates.keys()
    assert sum(bool(v.any()) for v in gated.gates.values()) > len(gated.gates) // 2
    signed = make_signature(base, gated, task, SignatureConfig(texts=0, rows=50, rows_per_batch=3))
    assert state_of(base.model) == before
    assert signed.signature is not None
    sums, counts = {}, {}

    def at(path, slot, u):
        sums[path] = sums.get(path, 0) + u.double()
        counts[path] = counts.get(path, 0) + 1
        return slot.weight @ u + (0 if slot.bias is None else slot.bias) + change(expert.updates[path], u)

    hand = by_hand(copy.deepcopy(base.model), [expert], at)
    end = base.tokenizer.eos_token_id
    for example in task.train:
        text = [*base.tokenizer(f"{example.input} {example.targets[0]}")["input_ids"], end]
        with torch.no_grad():
            hand(input_ids=torch.tensor([text]))
    for path in expert.updates:
        wanted = sums[path] / counts[path] if path in sums else torch.zeros(expert.updates[path].d_in)
        torch.testing.assert_close(
            signed.signature.activations[path].double(), wanted.double(), rtol=1e-3, atol=1e-4
        )
    signed.save(tmp_path / "signed")
    assert Expert.load(tmp_path / "signed", name="one").equals(signed)
    route(base, Pool([signed]))
