"""PiSSA and its like, converted to plain LoRA, against the trained model as PEFT has it."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from conftest import TARGETS, make_tokenizer
from phatgoose import Expert, Pool, load_base, route, unroute
from phatgoose.errors import BaseModelError, ExpertError
from phatgoose.models.base.convert import convert_to_lora
from phatgoose.routers import Single

# What PEFT says of patterns that match nothing, and of rsLoRA with patterns.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "RuntimeWarning")]


def trained(base, folder, init, targets=None, **settings):
    """PEFT's model after a few steps' worth of change, saved as it was before and after."""
    family = "gpt2" if "GPT2" in type(base.model).__name__ else "llama"
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets or TARGETS[family], fan_in_fan_out=family == "gpt2",
        init_lora_weights=init, **settings
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base.model), config).eval()
    model.save_pretrained(folder.with_name("initial"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(torch.randn(value.shape, generator=generator) * 0.02)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model, seed=1):
    ids = torch.randint(2, 320, (2, 9), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids).logits


def close(found, expected):
    return float((found - expected).norm() / expected.norm())


def checked(base, expert, model, folder):
    """What the expert computes, as routed and in plain PEFT, is what the trained model computes."""
    expected = logits(model)
    saved = expert.save(folder)
    assert close(logits(route(base, Pool([Expert.load(saved)]), Single(0))), expected) < 1e-5
    unroute(base)
    assert close(logits(PeftModel.from_pretrained(copy.deepcopy(base.model), saved)), expected) < 1e-5
    assert close(logits(base.model), expected) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "c_attn": 3}, "alpha_pattern": {"up_proj": 9, "c_fc": 9}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2, "c_attn": 3}},
    ],
    ids=["plain", "rslora", "patterns", "rslora with patterns, which PEFT doesn't convert"],
)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_initialisation_is_run_again(init, settings, family, make_base, tmp_path):
    if init == "olora" and family == "gpt2":
        pytest.skip("PEFT's OLoRA takes no Conv1D")
    base = make_base(family)
    model = trained(base, tmp_path / "adapter", init, **settings)
    with pytest.raises(ExpertError, match=f"init_lora_weights = '{init}'.*`phatgoose convert ADAPTER --base"):
        Expert.from_peft(tmp_path / "adapter")
    expert, far = convert_to_lora(tmp_path / "adapter", copy.deepcopy(base.model), "base")
    assert 0 < far < 1
    checked(base, expert, model, tmp_path / "converted")
    with pytest.raises(BaseModelError):
        route(make_base(family, seed=1), Pool([expert]), Single(0))


@pytest.mark.parametrize("init", ["corda", "lora_ga", "pissa_niter_4"])
def test_the_initial_adapter_where_that_hangs_on_data_or_chance(init, make_base, tmp_path):
    base, folder = make_base("llama"), tmp_path / "adapter"
    model = trained(base, folder, "pissa_niter_4")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": init}))
    with pytest.raises(ExpertError, match=r"depends on data or chance.*--initial"):
        convert_to_lora(folder, copy.deepcopy(base.model), "base")
    expert, _ = convert_to_lora(folder, copy.deepcopy(base.model), "base", initial=tmp_path / "initial")
    checked(base, expert, model, tmp_path / "converted")
    trained(base, tmp_path / "other" / "adapter", "pissa", targets=["q_proj"])
    with pytest.raises(ExpertError, match=r"isn't what .* began as: only one of them adapts"):
        convert_to_lora(folder, copy.deepcopy(base.model), "base", initial=tmp_path / "other" / "initial")


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_the_changed_base_itself(init, make_base, tmp_path):
    """On it the adapter is a plain LoRA, and only on it: the record says so."""
    base, folder = make_base("llama"), tmp_path / "adapter"
    model = trained(base, folder, "pissa")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": init}))
    if init == "loftq":
        with pytest.raises(ExpertError, match=r"LoftQ's quantised base.*--residual"):
            convert_to_lora(folder, copy.deepcopy(base.model), "base", initial=tmp_path / "initial")
    copy.deepcopy(model).unload().save_pretrained(tmp_path / "changed")
    make_tokenizer().save_pretrained(tmp_path / "changed")
    changed = load_base(tmp_path / "changed")
    expert, far = convert_to_lora(folder, changed.model, "changed", residual=True)
    assert far is None
    assert close(logits(route(changed, Pool([expert]), Single(0))), logits(model)) < 1e-5
    with pytest.raises(BaseModelError, match="not the same"):
        route(base, Pool([expert]), Single(0))


def test_refusals(make_base, make_expert, tmp_path):
    base = make_base("llama")
    with pytest.raises(ExpertError, match="needs no conversion: it is 'LORA' with init_lora_weights = True"):
        convert_to_lora(make_expert(base).folder, base.model, "base")
    trained(base, tmp_path / "dora" / "adapter", "pissa", use_dora=True)
    with pytest.raises(ExpertError, match="is pissa with more than A and B"):
        convert_to_lora(tmp_path / "dora" / "adapter", copy.deepcopy(base.model), "base")
    trained(base, tmp_path / "adapter", "pissa")
    with pytest.raises(ExpertError, match=r"PEFT can't initialise|of another base"):
        convert_to_lora(tmp_path / "adapter", copy.deepcopy(make_base("gpt2").model), "base")
