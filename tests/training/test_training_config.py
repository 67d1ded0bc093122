import dataclasses
import inspect

import pytest

from phatgoose.errors import TrainingError
from phatgoose.training.config import ExpertConfig, GateConfig, LoopConfig


def test_defaults_are_the_papers():
    expert, gate = ExpertConfig(), GateConfig()
    for config in (expert, gate):
        assert (config.rows_per_step, config.max_length) == (1024, 512)
        assert (config.learning_rate, config.weight_decay, config.warmup_share) == (5e-3, 0.0, 0.06)
        assert config.validate_every == 100
        assert config.max_grad_norm is None
    assert (expert.steps, gate.steps) == (1000, 100)
    assert (expert.warmup_steps, gate.warmup_steps) == (60, 6)
    assert (expert.rank, expert.alpha / expert.rank, expert.init_std) == (16, 1 / 16, 0.01)
    assert (expert.kind, expert.target_modules, expert.dropout) == ("lora", "all-linear", 0.0)
    assert (expert.rslora, expert.dora, expert.lora_bias) == (False, False, False)


def test_defaults_of_the_other_kinds():
    scales, narrow = ExpertConfig(kind="ia3"), ExpertConfig(kind="bottleneck")
    assert (scales.learning_rate, scales.target_modules) == (3e-3, "auto")
    assert (narrow.learning_rate, narrow.placement, narrow.reduction, narrow.activation) == (
        1e-3,
        "pfeiffer",
        16,
        "relu",
    )
    assert ExpertConfig(kind="ia3", learning_rate=5e-3).learning_rate == 5e-3
    for config in (ExpertConfig(), scales, narrow):
        assert ExpertConfig(**config.to_json()) == config


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 0), ("rows_per_step", 0), ("rows_per_batch", 7), ("rows_per_batch", 2048),
        ("max_length", 2), ("learning_rate", 0.0), ("learning_rate", float("nan")), ("warmup_share", 1.0),
        ("weight_decay", -1.0), ("max_grad_norm", 0.0), ("validate_every", -1), ("save_every", -1),
        ("seed", -1), ("precision", "float16"), ("validation_rows", 0), ("rank", 0), ("alpha", 0.0),
        ("init_std", 0.0), ("dropout", 1.0), ("target_modules", ()), ("target_modules", ("q_proj", "")),
        ("kind", "prefix"), ("kind", "LORA"), ("placement", "adapterplus"), ("activation", "prelu"),
        ("reduction", 0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(setting, value):
    with pytest.raises(TrainingError, match=setting):
        ExpertConfig(**{setting: value})


def test_choices_are_listed():
    with pytest.raises(TrainingError, match='expected "auto", "float32" or "bfloat16"'):
        ExpertConfig(precision="float16")


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("ia3", "rank", 8), ("ia3", "alpha", 2.0), ("ia3", "dora", True), ("ia3", "dropout", 0.1),
        ("ia3", "init_std", 0.1), ("ia3", "reduction", 4), ("lora", "placement", "houlsby"),
        ("lora", "activation", "tanh"), ("bottleneck", "lora_bias", True), ("bottleneck", "rslora", True),
        ("bottleneck", "target_modules", ("o_proj",)), ("bottleneck", "target_modules", "all-linear"),
    ],
)  # fmt: skip
def test_settings_of_another_kind_are_refused(kind, setting, value):
    with pytest.raises(TrainingError, match=f"{setting} = .*no effect with kind='{kind}'"):
        ExpertConfig(kind=kind, **{setting: value})


def test_a_bias_and_dora_exclude_each_other():
    with pytest.raises(TrainingError, match="lora_bias = True"):
        ExpertConfig(dora=True, lora_bias=True)


def test_target_modules_may_be_a_list():
    assert ExpertConfig(target_modules=["q_proj"]).target_modules == ("q_proj",)


def test_what_cannot_change_the_result_is_not_in_the_key():
    assert ExpertConfig(save_every=7).key() == ExpertConfig().key()
    assert ExpertConfig(seed=7).key() != ExpertConfig().key()


@pytest.mark.parametrize("kind", [LoopConfig, ExpertConfig, GateConfig])
def test_every_field_has_a_docstring(kind):
    source = inspect.getsource(kind)
    own = [f.name for f in dataclasses.fields(kind) if f"\n    {f.name}:" in source]
    for name in own:
        assert f"\n    {name}:" in source
        after = source.split(f"\n    {name}:", 1)[1].split("\n", 1)[1]
        assert after.lstrip().startswith('"""'), name
