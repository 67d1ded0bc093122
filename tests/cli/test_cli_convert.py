"""`phatgoose convert`, from an adapter as PEFT saved it to an answer."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from phatgoose.experts.expert import Expert

pytest_plugins = ["cli_fixtures"]


@pytest.fixture
def pissa(base, tmp_path):
    """A trained PiSSA adapter of the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_A" in name:
                    value.mul_(1.1)
        model.save_pretrained(tmp_path / "pissa")
    return tmp_path / "pissa"


def test_from_the_refusal_to_an_answer(run, base, pissa, tmp_path):
    refused = run("pool", "create", tmp_path / "pool", pissa)
    assert refused.code == 1
    assert "`phatgoose convert ADAPTER --base BASE --out FOLDER`" in refused.err
    done = run("convert", pissa, "--base", base, "--out", tmp_path / "plain")
    assert done.code == 0, done.err
    assert "plain: LoRA of rank 4, 2 modules" in done.out
    assert "warning" not in done.err
    assert Expert.load(tmp_path / "plain").provenance["by"] == "PEFT's initialisation, run again"
    assert run("pool", "create", tmp_path / "pool", tmp_path / "plain").code == 0
    answered = run("generate", "red", "--pool", tmp_path / "pool", "--base", base, "--router", "single:0")
    assert answered.code == 0, answered.err
    there = run("convert", pissa, "--base", base, "--out", tmp_path / "plain")
    assert (there.code, "holds an expert already" in there.err) == (1, True)
    again = run("convert", tmp_path / "plain", "--base", base, "--out", tmp_path / "twice")
    assert (again.code, "needs no conversion" in again.err) == (1, True)


def test_another_base_is_doubted_and_options_that_exclude_each_other_are_refused(
    run, save_base, pissa, tmp_path
):
    other = save_base("llama", seed=1)
    done = run("convert", pissa, "--base", other, "--out", tmp_path / "plain")
    assert done.code == 0, done.err
    assert "the base that it was trained on?" in done.err
    both = run("convert", pissa, "--base", other, "--out", tmp_path / "x", "--initial", pissa, "--residual")
    assert both.code == 2
