"""What holds for experts of every kind: the base stays, others can load them, a kill changes nothing, gates train."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from peft import PeftModel
from test_resume import Steps, same_record
from test_student import batch_of, plain_loss
from test_train_expert import equal
from training_helpers import SMALL, make_task, state_of

from conftest import make_model
from phatgoose.errors import TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.base.base import Base
from phatgoose.routers import Single
from phatgoose.training.config import ExpertConfig, GateConfig
from phatgoose.training.expert import adapted_paths, train_expert
from phatgoose.training.gate import GatedStudent, train_gate
from phatgoose.training.trainer.progress import silent
from phatgoose.training.trainer.rows import training_rows

KINDS = {
    "rslora": {"rank": 3, "alpha": 2.0, "rslora": True},
    "dora": {"rank": 3, "alpha": 6.0, "dora": True},
    "lora_bias": {"rank": 3, "alpha": 6.0, "lora_bias": True},
    "ia3": {"kind": "ia3"},
    "ia3 everywhere": {"kind": "ia3", "target_modules": "all-linear"},
    "pfeiffer": {"kind": "bottleneck", "reduction": 8},
    "houlsby": {"kind": "bottleneck", "reduction": 5, "placement": "houlsby", "activation": "swish"},
    "parallel": {"kind": "bottleneck", "reduction": 8, "placement": "parallel", "activation": "gelu"},
}
PEFT_KINDS = [kind for kind, settings in KINDS.items() if settings.get("kind") != "bottleneck"]
PAIRS = [(kind, "llama") for kind in KINDS] + [
    ("dora", "gpt2"), ("lora_bias", "t5"), ("ia3", "t5"), ("ia3", "qwen"), ("ia3 everywhere", "gpt2"),
    ("pfeiffer", "gpt2"), ("houlsby", "t5"),
]  # fmt: skip


def config_of(kind, **settings):
    return ExpertConfig(**{**SMALL, "learning_rate": 5e-3, **KINDS[kind], **settings})


@pytest.fixture
def task():
    return make_task()


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """trained(kind, family) → the base, its state before, the expert, and the work folder; each is trained once."""

    @functools.cache
    def train(kind, family="llama"):
        base = Base(make_model(family), tokenizer, spec=f"tiny-{family}-0")
        before, folder = state_of(base.model), tmp_path_factory.mktemp("work")
        expert = train_expert(base, make_task(), config_of(kind), work_folder=folder, report=silent)
        return base, before, expert, folder

    return train


def losses(base, expert, task, rows=21):
    """Mean loss on the first rows of training, without and with the expert, by transformers' own loss."""
    drawn = training_rows(base, task, GateConfig(**SMALL)).train
    encoded = [drawn[i] for i in range(rows)]
    with torch.no_grad():
        plain = plain_loss(base.model, base, encoded).item()
        routed = plain_loss(route(base, Pool([expert]), Single(0)), base, encoded).item()
    unroute(base)
    return plain, routed


@pytest.mark.slow(8)
@pytest.mark.parametrize(("kind", "family"), PAIRS)
def test_it_learns_and_the_base_is_untouched(trained, kind, family, task, tmp_path, capsys):
    base, before, expert, _ = trained(kind, family)
    assert state_of(base.model) == before
    assert capsys.readouterr() == ("", "")
    plain, routed = losses(base, expert, task)
    assert routed < plain - 0.01
    assert expert.provenance["validation_losses"][-1][1] == min(
        x for _, x in expert.provenance["validation_losses"]
    )
    assert (
        expert.provenance["parameters"]
        == expert.parameters
        == sum(t.numel() for t in expert.tensors.values())
    )
    assert Expert.load(expert.save(tmp_path / "saved")).hash == expert.hash


@pytest.mark.parametrize(("kind", "family"), [pair for pair in PAIRS if pair[0] in PEFT_KINDS])
def test_plain_peft_computes_the_same(trained, kind, family):
    base, _, expert, folder = trained(kind, family)
    assert sorted(expert.updates) == adapted_paths(base, config_of(kind))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".lora_bias=True. was passed but", UserWarning)
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), folder / "adapter")
    model.eval()
    encoded, _ = batch_of(base)
    with torch.no_grad():
        wanted = plain_loss(model, base, encoded)
        found = plain_loss(route(base, Pool([expert]), Single(0)), base, encoded)
    unroute(base)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_ia3_scales_what_the_paper_scales(trained):
    for family, inputs, outputs in (
        ("llama", ("down_proj",), ("k_proj", "v_proj")), ("t5", ("wo",), ("k", "v")),
        ("qwen", ("down_proj",), ("q_proj", "v_proj")),
    ):  # fmt: skip
        expert = trained("ia3", family)[2]
        for path, update in expert.updates.items():
            assert path.endswith(inputs if update.input_scale is not None else outputs)
            assert (update.input_scale is None) != (update.output_scale is None)


def test_a_gpt2_scaled_everywhere_keeps_its_two_c_proj_apart(trained):
    expert = trained("ia3 everywhere", "gpt2")[2]
    by_input = {path for path, update in expert.updates.items() if update.input_scale is not None}
    assert by_input == {f"transformer.h.{i}.mlp.c_proj" for i in range(2)}
    assert "transformer.h.0.attn.c_proj" in expert.updates


def test_first_values_change_nothing(make_base, task):
    for kind in ("dora", "ia3", "parallel"):
        base = make_base("llama", layers=1)
        config = config_of(kind, steps=1, learning_rate=1e-12, warmup_share=0.0, validate_every=0)
        plain, routed = losses(base, train_expert(base, task, config, report=silent), task)
        assert routed == pytest.approx(plain, abs=1e-5), kind


@pytest.mark.slow(3)
@pytest.mark.parametrize("kind", ["ia3", "pfeiffer"])
def test_interrupted_it_ends_in_the_same_bits(make_base, kind, task, tmp_path):
    config = config_of(kind, **({} if kind == "ia3" else {"dropout": 0.2}))
    whole = train_expert(make_base("llama"), task, config, report=silent)
    with pytest.raises(KeyboardInterrupt):
        train_expert(make_base("llama"), task, config, work_folder=tmp_path, report=Steps(8))
    steps = Steps()
    resumed = train_expert(make_base("llama"), task, config, work_folder=tmp_path, report=steps)
    assert steps[0] == 6
    assert equal(resumed, whole)
    assert same_record(resumed.provenance, whole.provenance)
    read = train_expert(make_base("llama"), task, config, work_folder=tmp_path, report=steps)
    assert equal(read, whole)
    with pytest.raises(TrainingError, match="training of another config"):
        train_expert(make_base("llama"), task, config_of("rslora"), work_folder=tmp_path, report=silent)


@pytest.mark.slow(12)
@pytest.mark.parametrize("kind", KINDS)
def test_its_gates_train_and_nothing_else_moves(make_base, kind, task):
    base = make_base("llama")
    expert = train_expert(base, task, config_of(kind), report=silent)
    before, tensors = state_of(base.model), {k: t.clone() for k, t in expert.tensors.items()}
    config = GateConfig(
        **{**SMALL, "steps": 40, "rows_per_step": 21, "rows_per_batch": 21}, learning_rate=2e-2
    )
    gated = train_gate(base, expert, task, config, report=silent)
    assert state_of(base.model) == before
    assert all(torch.equal(t, tensors[k]) for k, t in expert.tensors.items())
    assert gated.gates.keys() == expert.updates.keys()
    assert all(v.any() for v in gated.gates.values())
    curve = gated.provenance["gate"]["losses"]
    assert curve[-1][1] < curve[0][1]


@pytest.mark.slow(6)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_that_is_open_is_the_expert_itself(trained, kind):
    base, _, expert, _ = trained(kind)
    base = copy.deepcopy(base)  # a student's hooks stay
    encoded, batch = batch_of(base)
    with torch.no_grad():
        wanted = plain_loss(route(base, Pool([expert]), Single(0)), base, encoded)
        unroute(base)
        student = GatedStudent(base.model, expert.updates, GateConfig(**SMALL))
        for gate in student.gates.values():
            gate.forward = lambda u: torch.ones(*u.shape[:-1], 1)
        found = student(**batch) / (batch["labels"] != -100).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["dora", "ia3", "pfeiffer"])
def test_on_a_bfloat16_base_it_is_trained_in_float32(make_base, kind, task):
    base = make_base("llama", dtype=torch.bfloat16)
    expert = train_expert(base, task, config_of(kind), report=silent)
    assert {t.dtype for t in expert.tensors.values()} == {torch.float32}
    assert expert.provenance["precision"] == "bfloat16"
    plain, routed = losses(base, expert, task)
    assert routed < plain


@pytest.mark.parametrize("kind", ["dora", "parallel"])
def test_recomputing_activations_changes_nothing(make_base, kind, task):
    experts = [
        train_expert(
            make_base("llama"), task, config_of(kind, steps=2, gradient_checkpointing=again), report=silent
        )
        for again in (False, True)
    ]
    for key, tensor in experts[0].tensors.items():
        torch.testing.assert_close(experts[1].tensors[key], tensor, rtol=1e-4, atol=1e-6)


def test_bases_that_a_kind_is_not_known_for(make_base, task):
    base = make_base("llama")
    base.model.config.model_type = "bamba"
    for kind, message in (
        ("ia3", "PEFT doesn't say which layers of a bamba"),
        ("pfeiffer", "where adapters go in a bamba"),
    ):
        with pytest.raises(TrainingError, match=message):
            train_expert(base, task, config_of(kind), report=silent)
    base.model.config.model_type = "llama"
