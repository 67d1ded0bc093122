import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from training_helpers import LORA, SMALL, make_task
from transformers.pytorch_utils import Conv1D

from conftest import FAMILIES
from phatgoose.errors import TrainingError
from phatgoose.models.text.batch import collate
from phatgoose.training.config import ExpertConfig, GateConfig
from phatgoose.training.expert import add_adapter
from phatgoose.training.gate import GatedStudent
from phatgoose.training.modules import target_paths
from phatgoose.training.student import Student
from phatgoose.training.trainer.rows import training_rows

CONFIG = ExpertConfig(**SMALL, **LORA)


def batch_of(base, rows=5):
    drawn = training_rows(base, make_task(), CONFIG).train
    encoded = [drawn[i] for i in range(rows)]
    return encoded, collate(encoded, 0, is_encoder_decoder=base.is_encoder_decoder)


def plain_loss(model, base, encoded):
    """transformers' own loss on right-padded rows: all logits, prompt labels -100."""
    if base.is_encoder_decoder:
        batch = collate(encoded, 0, is_encoder_decoder=True)
        return model(**batch).loss
    width = max(e.length for e in encoded)
    ids, mask, labels = (torch.full((len(encoded), width), fill) for fill in (0, 0, -100))
    for i, e in enumerate(encoded):
        ids[i, : e.length] = torch.tensor(e.prompt_ids + e.target_ids)
        mask[i, : e.length] = 1
        labels[i, len(e.prompt_ids) : e.length] = torch.tensor(e.target_ids)
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_transformers(make_base, family):
    base = make_base(family)
    encoded, batch = batch_of(base)
    expected = plain_loss(base.model, base, encoded)
    found = Student(base.model, base.model, CONFIG)(**batch) / (batch["labels"] != -100).sum()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen", "gpt2"])
def test_logits_are_computed_at_targets_only(make_base, family):
    base = make_base(family)
    _, batch = batch_of(base)
    seen = []
    base.model.get_output_embeddings().register_forward_hook(
        lambda m, args, out: seen.append((args[0], out.shape))
    )
    Student(base.model, base.model, CONFIG)(**batch)
    ((given, shape),) = seen
    assert shape[1] <= batch["labels"].shape[1] + 1 < batch["input_ids"].shape[1]
    assert given.is_contiguous()  # a slice makes torch copy the head for every row


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_of_an_adapter_is_the_formulas(make_base, family):
    """Against autograd through W + s·BA put in the weights' place."""
    base = make_base(family)
    encoded, batch = batch_of(base)
    reference = copy.deepcopy(base.model)
    paths = target_paths(base.model, "all-linear")
    student = Student(add_adapter(base, paths, CONFIG), base.model, CONFIG)
    pairs, weights = {}, {}
    generator = torch.Generator().manual_seed(1)
    for path in paths:
        layer = base.model.get_submodule(path)
        halves = []
        for half in (layer.lora_A, layer.lora_B):
            parameter = half["default"].weight
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            halves.append(parameter.detach().clone().requires_grad_())
        a, b = halves
        delta = CONFIG.alpha / CONFIG.rank * b @ a
        weight = reference.get_submodule(path).weight
        weights[f"{path}.weight"] = weight + (
            delta.T if isinstance(reference.get_submodule(path), Conv1D) else delta
        )
        pairs[path] = (a, b, layer.lora_A["default"].weight, layer.lora_B["default"].weight)

    class Replaced(nn.Module):
        def __call__(self, **inputs):
            return functional_call(reference, weights, kwargs=inputs)

    expected = plain_loss(Replaced(), base, encoded)
    expected.backward()
    found = student(**batch) / (batch["labels"] != -100).sum()
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for a, b, found_a, found_b in pairs.values():
        torch.testing.assert_close(found_a.grad, a.grad, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found_b.grad, b.grad, rtol=1e-3, atol=1e-6)
    assert len(student.trained()) == 2 * len(paths)
    assert all(p.dtype == torch.float32 for p in student.trained().values())


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("dropout", [True, False])
def test_recomputing_activations_changes_no_gradient(make_base, family, dropout):
    grads = []
    for checkpointing in (False, True):
        base = make_base(family)
        config = ExpertConfig(**SMALL, **LORA, gradient_checkpointing=checkpointing, base_dropout=dropout)
        model = add_adapter(base, target_paths(base.model, "all-linear"), config)
        student = Student(model, base.model, config).train()
        with torch.no_grad():
            for p in student.trained().values():
                p.add_(0.05)
        passes = []
        layer = next(m for m in base.model.modules() if type(m).__name__ in ("LlamaMLP", "T5LayerFF"))
        layer.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        student(**batch_of(base)[1]).backward()
        assert len(passes) == 1 + checkpointing
        grads.append({n: p.grad for n, p in student.trained().items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_dropout_acts_where_it_is_asked_for(make_base):
    def losses(base_dropout, dropout):
        base = make_base("gpt2")
        for module in base.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        config = ExpertConfig(**SMALL, **LORA, base_dropout=base_dropout, dropout=dropout)
        student = Student(
            add_adapter(base, target_paths(base.model, "all-linear"), config), base.model, config
        ).train()
        with torch.no_grad():
            for p in student.trained().values():
                p.fill_(0.1)
        batch = batch_of(base)[1]
        return {student(**batch).item() for _ in range(3)}

    assert len(losses(False, 0.0)) == 1
    assert len(losses(True, 0.0)) == 3
    assert len(losses(False, 0.5)) == 3


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_bfloat16_is_close_to_float32(make_base, family):
    found = []
    for dtype, precision in (
        (torch.float32, "auto"),
        (torch.float32, "float32"),
        (torch.float32, "bfloat16"),
        (torch.bfloat16, "auto"),
    ):
        base = make_base(family, dtype=dtype)
        student = Student(base.model, base.model, GateConfig(precision=precision))
        found.append(student(**batch_of(base)[1]))
        assert found[-1].dtype == torch.float32
    assert found[0] == found[1]
    assert found[2] != found[0]
    torch.testing.assert_close(found[2], found[0], rtol=0.03, atol=0)
    torch.testing.assert_close(found[3], found[0], rtol=0.03, atol=0)


def test_precisions_that_a_base_does_not_allow(make_base):
    half, brain = (
        make_base("llama", dtype=torch.float16).model,
        make_base("llama", dtype=torch.bfloat16).model,
    )
    with pytest.raises(TrainingError, match=r"float16.*load it with dtype="):
        Student(half, half, GateConfig())
    with pytest.raises(TrainingError, match=r"base in float32.*bfloat16"):
        GatedStudent(brain, {}, GateConfig(precision="float32"))
