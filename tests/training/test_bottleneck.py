"""Bottleneck adapters in training against the papers' own words: the whole layer's output, by hooks on whole layers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_student import batch_of, plain_loss
from test_train_expert import equal
from training_helpers import SMALL, make_task

from phatgoose.experts.adapters import adapterhub
from phatgoose.experts.adapters.peft_rules import ADAPTERHUB_RULES
from phatgoose.training.bottleneck import BottleneckStudent, adapter_locations, settings_of
from phatgoose.training.config import ExpertConfig
from phatgoose.training.expert import train_expert
from phatgoose.training.gate import decode_path
from phatgoose.training.trainer.progress import silent

DATA = Path(__file__).parent.parent / "data" / "adapterhub"
CONFIG = {**SMALL, "kind": "bottleneck", "reduction": 8}


def student_of(base, **settings):
    """With random weights everywhere."""
    config = ExpertConfig(**{**CONFIG, **settings})
    student = BottleneckStudent(base, adapter_locations(base, config), config, "one")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in student.trained().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return student


def adapters_of(student):
    """By path: x → U f(D x + d) + u₀ with copies of the weights."""
    found = {}
    for key, adapter in student.adapters.items():
        down, up = (copy.deepcopy(layer).requires_grad_() for layer in (adapter.down, adapter.up))
        found[decode_path(key)] = (down, up, lambda x, down=down, up=up: up(torch.relu(down(x))))
    return found


def by_hand(base, placement, adapters):
    """Whole layers of a copy of the base, hooked."""
    model = copy.deepcopy(base.model).requires_grad_(False)
    for i, layer in enumerate(model.model.layers):
        after = adapters[f"model.layers.{i}.mlp.down_proj"][2]
        if placement == "pfeiffer":
            layer.register_forward_hook(lambda m, args, out, f=after: out + f(out))
        elif placement == "houlsby":
            first = adapters[f"model.layers.{i}.self_attn.o_proj"][2]
            layer.self_attn.register_forward_hook(
                lambda m, args, out, f=first: (out[0] + f(out[0]), *out[1:])
            )
            layer.mlp.register_forward_hook(lambda m, args, out, f=after: out + f(out))
        else:
            stream = []
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda m, args, s=stream: s.append(args[0])
            )
            layer.mlp.register_forward_hook(lambda m, args, out, f=after, s=stream: out + 4 * f(s.pop()))
    return model


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby", "parallel"])
def test_loss_and_gradients_are_the_papers(make_base, placement):
    base = make_base("llama")
    encoded, batch = batch_of(base)
    student = student_of(base, placement=placement)
    adapters = adapters_of(student)
    assert len(adapters) == (4 if placement == "houlsby" else 2)
    base_copy = copy.deepcopy(base)
    for module in base_copy.model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    expected = plain_loss(by_hand(base_copy, placement, adapters), base, encoded)
    found = student(**batch) / (batch["labels"] != -100).sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found - plain_loss(base_copy.model, base, encoded)).abs() > 0.01
    expected.backward()
    found.backward()
    for key, adapter in student.adapters.items():
        down, up, _ = adapters[decode_path(key)]
        for one, other in ((adapter.down, down), (adapter.up, up)):
            torch.testing.assert_close(one.weight.grad, other.weight.grad, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(one.bias.grad, other.bias.grad, rtol=1e-3, atol=1e-6)
            assert one.weight.grad.abs().max() > 0


def test_only_adapters_are_trained_and_they_start_small(make_base):
    base = make_base("llama")
    config = ExpertConfig(**{**CONFIG, "reduction": 2, "init_std": 0.02})
    student = BottleneckStudent(base, adapter_locations(base, config), config, "one")
    assert {name.split(".")[0] for name in student.trained()} == {"adapters"}
    first, second = student.adapters.values()
    assert first.down.weight.shape == (16, 32)
    assert abs(first.down.weight.std() - 0.02) < 2e-3
    assert not torch.equal(first.down.weight, second.down.weight)
    assert not any(p.any() for p in (first.up.weight, first.up.bias, first.down.bias))
    again = BottleneckStudent(make_base("llama"), adapter_locations(base, config), config, "other")
    assert torch.equal(next(iter(again.adapters.values())).down.weight, first.down.weight)
    tiny = ExpertConfig(**{**CONFIG, "reduction": 1000})
    assert next(
        iter(BottleneckStudent(base, adapter_locations(base, tiny), tiny, "one").adapters.values())
    ).down.weight.shape == (1, 32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("case", ["pfeiffer", "houlsby", "parallel"])
def test_what_is_written_has_the_librarys_keys(family, case):
    """Reading and writing again the library's own file gives its very tensors."""
    config = json.loads((DATA / family / case / "adapter_config.json").read_text())
    tensors = load_file(DATA / family / case / "adapter.safetensors")
    written = adapterhub.to_tensors(adapterhub.to_contents(config, tensors, "here").updates, family, case)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby", "parallel"])
def test_our_placements_are_the_librarys_configs(placement):
    """Every setting that we write is the library's, and those we leave out have its defaults in that config."""
    ours = settings_of(ExpertConfig(kind="bottleneck", placement=placement))
    library = json.loads((DATA / "llama" / placement / "adapter_config.json").read_text())["config"]
    free = {"reduction_factor", "non_linearity", "init_weights", "dropout"}
    if placement == "parallel":
        free |= {"mh_adapter"}  # the fixture has both
    assert ours.keys() <= ADAPTERHUB_RULES.keys()
    assert {k: v for k, v in ours.items() if k not in free} == {k: library[k] for k in ours if k not in free}


def test_the_record_in_the_librarys_config(make_base, tmp_path):
    config = ExpertConfig(**CONFIG, activation="gelu_new")
    expert = train_expert(
        make_base("gpt2"), make_task(), config, name="my.one", work_folder=tmp_path, report=silent
    )
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written == expert.adapter_config
    assert (written["name"], written["model_type"], written["hidden_size"]) == ("my-one", "gpt2", 32)
    assert (written["model_class"], written["model_name"]) == ("GPT2LMHeadModel", "tiny-gpt2-0")
    assert written["config"]["non_linearity"] == "gelu_new"
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
    ]
    assert {u.bottleneck.activation for u in expert.updates.values()} == {"gelu_new"}
    clash = train_expert(make_base("gpt2"), make_task(), config, name="double", report=silent)
    assert clash.adapter_config["name"] == "double-adapter"  # ModuleDict has a method of that name
    assert {k.replace("double-adapter", "my-one") for k in clash.tensors} == expert.tensors.keys()


def test_seeds_and_dropout(make_base):
    def train(**settings):
        return train_expert(
            make_base("llama"), make_task(), ExpertConfig(**{**CONFIG, **settings}), report=silent
        )

    one = train(dropout=0.3)
    assert equal(one, train(dropout=0.3))
    assert not equal(one, train(dropout=0.3, seed=1))
    assert not equal(one, train())
