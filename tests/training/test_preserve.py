import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_helpers import state_of

from conftest import FAMILIES
from phatgoose.training.trainer.preserve import preserved, preserved_random_state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_borrowed_model_comes_back(make_base, family, error):
    model = make_base(family).model
    first = next(model.parameters())
    first.requires_grad_(False)
    first.grad = torch.ones_like(first)
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: None)
    before = state_of(model)

    def spoil():
        with preserved(model):
            get_peft_model(model, LoraConfig(target_modules="all-linear"))
            model.train()
            model.config.use_cache = not model.config.use_cache
            model.generation_config.max_length = 3
            new = getattr(model, "activation_checkpointing_enable", None)  # as in training/student.py
            (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
            model.get_input_embeddings().register_forward_hook(lambda *_: None)
            model.new_attribute = 1
            model.requires_grad_(True)
            first.grad = None
            assert state_of(model) != before
            if error:
                raise error("in the midst")

    if error:
        with pytest.raises(error):
            spoil()
    else:
        spoil()
    assert state_of(model) == before
    hook.remove()


def test_random_numbers_go_on():
    def numbers():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed():
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    seed()
    expected = numbers()
    seed()
    with preserved_random_state():
        torch.manual_seed(0)
        numbers()
    assert numbers() == expected
