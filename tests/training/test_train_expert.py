import copy
import json

import pytest
import torch
from peft import PeftModel
from test_student import plain_loss
from torch.func import functional_call
from training_helpers import LORA, SMALL, make_task, state_of

import phatgoose
from conftest import FAMILIES, make_model
from phatgoose.errors import BaseModelError, TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.training.config import ExpertConfig
from phatgoose.training.expert import add_adapter, train_expert
from phatgoose.training.modules import target_paths
from phatgoose.training.student import Student
from phatgoose.training.trainer.progress import silent
from phatgoose.training.trainer.rows import training_rows

CONFIG = ExpertConfig(**SMALL, **LORA, learning_rate=2e-3)


@pytest.fixture
def task():
    return make_task()


def equal(one: Expert, other: Expert) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors
    )


def test_first_values_are_the_papers(make_base):
    base = make_base("llama")
    config = ExpertConfig()
    model = add_adapter(base, target_paths(base.model, "all-linear"), config)
    a = [p for n, p in model.named_parameters() if ".lora_A." in n]
    b = [p for n, p in model.named_parameters() if ".lora_B." in n]
    flat = torch.cat([p.detach().flatten() for p in a])
    assert abs(flat.std() - 0.01) < 2e-4
    assert abs(flat.mean()) < 2e-4
    assert not any(p.any() for p in b)
    assert not torch.equal(a[0], a[1])
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {1 / 16}


def test_first_values_depend_on_the_name_and_the_seed_alone(make_base):
    def first(targets, seed):
        base = make_base("llama")
        config = ExpertConfig(target_modules=targets, seed=seed)
        model = add_adapter(base, target_paths(base.model, targets), config)
        return {n: p.detach() for n, p in model.named_parameters() if ".lora_A." in n}

    everything, few, other = first("all-linear", 0), first(("v_proj",), 0), first(("v_proj",), 1)
    assert len(few) == 2
    for name in few:
        assert torch.equal(few[name], everything[name])
        assert not torch.equal(few[name], other[name])


@pytest.mark.parametrize("batch", [6, 2])
def test_training_is_adamw_on_the_mean_over_all_targets_of_a_step(make_base, task, batch):
    """Against a loop of one's own: the formula in the weights' place, torch's AdamW, right-padded full logits."""
    config = ExpertConfig(
        steps=5,
        rows_per_step=6,
        rows_per_batch=batch,
        validate_every=0,
        warmup_share=0.4,
        learning_rate=2e-3,
        **LORA,
    )
    expert = train_expert(make_base("llama"), task, config, report=silent)

    base = make_base("llama")
    reference, rows = copy.deepcopy(base.model), training_rows(base, task, config)
    paths = target_paths(base.model, "all-linear")
    model = add_adapter(base, paths, config)
    start = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if "lora_" in n}
    optimizer = torch.optim.AdamW(start.values(), lr=2e-3, weight_decay=0.0)

    def half(path, which):
        return start[f"base_model.model.{path}.lora_{which}.default.weight"]

    for step in range(5):
        weights = {
            f"{p}.weight": reference.get_submodule(p).weight + 2.0 * half(p, "B") @ half(p, "A")
            for p in paths
        }
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, step / 2)
        encoded = [rows.train[i] for i in range(6 * step, 6 * step + 6)]
        plain_loss(
            lambda w=weights, **inputs: functional_call(reference, w, kwargs=inputs), base, encoded
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.zero_grad()
    for path in paths:
        assert expert.updates[path].scale == 2.0
        torch.testing.assert_close(expert.updates[path].A, half(path, "A").detach(), rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(expert.updates[path].B, half(path, "B").detach(), rtol=1e-3, atol=2e-5)
        assert expert.updates[path].B.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_untouched_and_plain_peft_loads_the_expert(make_base, family, task, tmp_path, capsys):
    base = make_base(family)
    before, fresh = state_of(base.model), copy.deepcopy(base.model)
    expert = train_expert(base, task, CONFIG, work_folder=tmp_path, report=silent)
    assert state_of(base.model) == before
    assert capsys.readouterr() == ("", "")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert sorted(expert.updates) == target_paths(base.model, "all-linear")
    model = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    rows = training_rows(base, task, CONFIG)
    found = [plain_loss(model, base, [row]).item() * len(row.target_ids) for row in rows.validation]
    mean = sum(found) / sum(len(row.target_ids) for row in rows.validation)
    losses = dict(expert.provenance["validation_losses"])
    assert mean == pytest.approx(losses[expert.provenance["best_step"]], rel=1e-4)
    untrained = plain_loss(make_base(family).model, base, rows.validation).item()
    assert mean < untrained


def test_the_record_says_how_it_was_made(make_base, task):
    base = make_base("llama")
    expert = train_expert(base, task, CONFIG, name="my-plus", report=silent)
    record = expert.provenance
    assert (expert.name, expert.folder, expert.gates) == ("my-plus", None, None)
    assert (record["kind"], record["base"]) == ("expert", base.fingerprint.to_json())
    assert (record["task"]["name"], record["task"]["source"]) == ("plus", {"spec": "test:plus"})
    assert record["task"]["hash"] == task.hash
    assert record["task"]["rows"] == {
        "train": 21, "validation": 5, "test": 9, "used": 21, "used_for_validation": 5, "truncated": 0,
    }  # fmt: skip
    assert ExpertConfig(**record["config"]) == CONFIG
    assert record["versions"].keys() == {"phatgoose", "torch", "transformers", "peft", "accelerate", "python"}
    assert [step for step, _ in record["validation_losses"]] == [5, 10, 12]
    assert record["best_step"] == min(record["validation_losses"], key=lambda pair: pair[1])[0]
    assert [step for step, _ in record["losses"]] == list(range(1, 13))
    rows = training_rows(base, task, CONFIG)
    assert (record["tokens"], record["target_tokens"]) == (rows.tokens, rows.target_tokens)
    assert (record["seed"], record["device"], record["precision"], record["processes"]) == (
        0,
        "cpu",
        "float32",
        1,
    )
    assert record["seconds"] > 0
    assert json.loads(json.dumps(record)) == record
    assert expert.base == base.fingerprint


def test_the_best_checkpoint_is_kept_not_the_last(make_base, task):
    # A step size that wrecks it after a while.
    config = ExpertConfig(
        steps=9,
        rows_per_step=6,
        rows_per_batch=6,
        validate_every=1,
        warmup_share=0.9,
        learning_rate=0.3,
        **LORA,
    )
    base = make_base("llama")
    expert = train_expert(base, task, config, report=silent)
    losses = dict(expert.provenance["validation_losses"])
    best = expert.provenance["best_step"]
    assert losses[best] == min(losses.values())
    assert best < 9
    model = add_adapter(base, target_paths(base.model, "all-linear"), config)
    student = Student(model, base.model, config).eval()
    with torch.no_grad():
        for name, parameter in student.trained().items():
            key = name.removeprefix("model.").replace(".default", "")
            parameter.copy_(expert.tensors[key])
        rows = training_rows(base, task, config).validation
        found = sum(float(plain_loss(model, base, [r])) * len(r.target_ids) for r in rows)
    assert found / sum(len(r.target_ids) for r in rows) == pytest.approx(losses[best], rel=1e-4)


def test_seeds(make_base, task):
    def trained(seed):
        config = ExpertConfig(**{**CONFIG.to_json(), "seed": seed, "steps": 3, "validate_every": 0})
        return train_expert(make_base("llama"), task, config, report=silent)

    assert equal(trained(0), trained(0))
    assert not equal(trained(0), trained(1))


def test_random_numbers_of_the_caller_go_on(make_base, task):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    base = make_base("llama")  # seeds with 0
    torch.manual_seed(3)
    train_expert(base, task, CONFIG, report=silent)
    assert torch.equal(torch.rand(3), expected)


def test_bfloat16_trains_float32_adapters(make_base, task):
    base = make_base("llama", dtype=torch.bfloat16)
    before = state_of(base.model)
    expert = train_expert(base, task, CONFIG, report=silent)
    assert state_of(base.model) == before
    assert {t.dtype for t in expert.tensors.values()} == {torch.float32}
    assert expert.provenance["precision"] == "bfloat16"
    single = train_expert(make_base("llama"), task, CONFIG, report=silent)
    assert expert.provenance["losses"][-1][1] == pytest.approx(single.provenance["losses"][-1][1], rel=0.05)


def test_a_loss_that_is_not_finite_stops_at_once(make_base, task, tmp_path):
    base = make_base("llama")
    before = state_of(base.model)
    config = ExpertConfig(**{**CONFIG.to_json(), "learning_rate": 1e30, "save_every": 1})
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+: lower learning_rate"):
        train_expert(base, task, config, work_folder=tmp_path, report=silent)
    assert state_of(base.model) == before
    assert not (tmp_path / "adapter").exists()


def test_what_cannot_be_trained_on(make_base, task):
    base = make_base("llama")
    before = state_of(base.model)
    with pytest.raises(TrainingError, match="unknown module 'q_pro'"):
        train_expert(base, task, ExpertConfig(**SMALL, target_modules=("q_pro",)), report=silent)
    with pytest.raises(TrainingError, match="no training rows"):
        train_expert(base, make_task(0), CONFIG, report=silent)
    with pytest.raises(TrainingError, match="validate_every=0"):
        train_expert(base, make_task(9, 0), CONFIG, report=silent)
    with pytest.raises(TrainingError, match="max_length"):
        train_expert(base, task, ExpertConfig(**SMALL, max_length=3), report=silent)
    with pytest.raises(BaseModelError, match="Base"):
        train_expert(make_model("llama"), task, CONFIG, report=silent)
    assert state_of(base.model) == before
    base.model.__dict__["_phatgoose_routing"] = object()
    with pytest.raises(TrainingError, match="unroute"):
        train_expert(base, task, CONFIG, report=silent)


def test_precision_is_not_taken_from_the_launcher(make_base, task, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(TrainingError, match="--mixed_precision no"):
        train_expert(make_base("llama"), task, CONFIG, report=silent)


def test_the_bare_model_of_a_base_will_do(make_base, task):
    base = make_base("llama")
    config = ExpertConfig(
        steps=1, rows_per_step=2, rows_per_batch=2, validate_every=0, target_modules=("q_proj",)
    )
    assert len(train_expert(base.model, task, config, report=silent).updates) == 2


def test_public_names():
    assert phatgoose.train_expert is train_expert
    assert phatgoose.ExpertConfig is ExpertConfig
