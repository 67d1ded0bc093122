"""What is asked of every architecture, each against an oracle that shares no code with what it judges."""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from architectures import make
from conftest import make_tokenizer, relative, save_adapter, with_random_adapter
from phatgoose import (
    Expert,
    ExpertConfig,
    GateConfig,
    Pool,
    Random,
    Single,
    Task,
    evaluate,
    route,
    trace,
    train_expert,
    train_gate,
    unroute,
)
from phatgoose.evaluation.config import EvaluationConfig
from phatgoose.evaluation.rows import encode
from phatgoose.models.base.base import Base
from phatgoose.records import Example
from phatgoose.training.expert import adapted_paths

EXPERTS = 3


@dataclass
class Case:
    """An architecture's base, three random LoRA experts of all its linear layers, and the first one in plain PEFT."""

    base: Base
    paths: list[str]
    experts: list[Expert]
    peft: PeftModel

    @property
    def model(self):
        return self.base.model

    def inputs(self, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(rows * 100 + length)
        ids = torch.randint(
            3, self.model.config.get_text_config().vocab_size, (rows, length), generator=generator
        )
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return found | ({"decoder_input_ids": ids[:, :5]} if self.base.is_encoder_decoder else {})


@functools.lru_cache(maxsize=1)  # the checks of one architecture come one after the other
def case(name: str) -> Case:
    base = Base(make(name), make_tokenizer(), spec=f"tiny-{name}")
    paths = adapted_paths(base, ExpertConfig())
    folders = [Path(tempfile.mkdtemp()) / f"e{i}" for i in range(EXPERTS)]
    for seed, folder in enumerate(folders):
        _peft_adapter(base.model, paths, seed, folder)
    experts = [
        _gated(Expert.from_peft(folder, name=folder.name), seed) for seed, folder in enumerate(folders)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(copy.deepcopy(base.model), folders[0]).eval()
    return Case(base, paths, experts, peft)


def _peft_adapter(model: nn.Module, paths: list[str], seed: int, folder: Path) -> None:
    conv1d = isinstance(model.get_submodule(paths[0]), Conv1D)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=paths, fan_in_fan_out=conv1d)
    made = with_random_adapter(model, config, torch.Generator().manual_seed(seed), 0.15)
    save_adapter(made, folder, save_embedding_layers=False)


def _gated(expert: Expert, seed: int) -> Expert:
    generator = torch.Generator().manual_seed(1000 + seed)
    gates = {path: torch.randn(u.d_in, generator=generator) for path, u in expert.updates.items()}
    return expert.with_gates(gates, {"kind": "random"})


def close(found: Tensor, expected: Tensor, most: float = 1e-4) -> None:
    assert (error := relative(found, expected)) < most, f"relative error {error:.2g}"


@torch.no_grad()
def logits(model, **inputs) -> Tensor:
    return model(**inputs).logits


@torch.no_grad()
def oracle(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """The paper's formula, in float64, written into hooks of its own: top 2 of LN(v)ᵀLN(u)/√d, softmax, Σ w s B A u."""

    def hook(path: str):
        updates = [e.updates[path] for e in case.experts]
        gates = torch.stack([(e.gates or {})[path] for e in case.experts]).double()

        def add(module, args, kwargs, output):
            u = (args[0] if args else kwargs.get("hidden_states", kwargs.get("input"))).double()
            norm = functools.partial(nn.functional.layer_norm, normalized_shape=(u.shape[-1],), eps=1e-5)
            top = (norm(u) @ norm(gates).T / u.shape[-1] ** 0.5).topk(2, -1)
            weights = torch.zeros(*u.shape[:-1], len(updates), dtype=torch.float64)
            weights.scatter_(-1, top.indices, top.values.softmax(-1))
            all_of_them = torch.stack([(u @ x.A.double().T) @ x.B.double().T * x.scale for x in updates], -1)
            return (output.double() + (all_of_them * weights.unsqueeze(-2)).sum(-1)).to(output.dtype)

        return add

    handles = [
        case.model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True)
        for path in case.paths
    ]
    try:
        return logits(case.model, **inputs)
    finally:
        for handle in handles:
            handle.remove()


# --- The checks: each returns if all is well, and raises an AssertionError or anything else if it isn't.


def check_single(c: Case) -> None:
    """A pool of one equals plain PEFT, and unroute gives the base back bit for bit."""
    inputs = c.inputs()
    before = logits(c.model, **inputs)
    route(c.base, Pool(c.experts[:1]), Single(0))
    found = logits(c.model, **inputs)
    unroute(c.base)
    wanted = logits(c.peft, **inputs)
    assert relative(before, wanted) > 1e-3, "the adapter does nothing"
    close(found, wanted)
    assert torch.equal(logits(c.model, **inputs), before), "unroute left something behind"


def check_formula(c: Case) -> None:
    """PHATGOOSE among three experts equals the formula in float64."""
    inputs = c.inputs(3, 11)
    wanted = oracle(c, inputs)
    route(c.base, Pool(c.experts))
    close(logits(c.model, **inputs), wanted)


class BaseFails(Exception):
    """The plain model, without any routing, can't do what is asked."""


def _plainly(call, *args):
    """What transformers' or PEFT's own model says, as the oracle; BaseFails if it can't."""
    try:
        return call(*args)
    except Exception as error:
        raise BaseFails(
            f"the plain model fails too: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _generated(model, inputs: dict[str, Tensor], use_cache: bool, beams: int = 1):
    with torch.no_grad():
        return model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=4, min_new_tokens=4,
            do_sample=False, num_beams=beams, use_cache=use_cache, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip


def _cache_error(model, inputs: dict[str, Tensor]) -> float:
    with_cache, without = (_generated(model, inputs, use_cache) for use_cache in (True, False))
    return relative(torch.stack(with_cache.logits), torch.stack(without.logits))


def check_cache(c: Case) -> None:
    """Token by token with a cache the routed model computes what it computes without one, as far as the base does."""
    base_error = _plainly(_cache_error, c.model, c.inputs())
    route(c.base, Pool(c.experts))
    error = _cache_error(c.model, c.inputs())
    assert error < max(1e-4, 20 * base_error), f"{error:.2g}; the base's own is {base_error:.2g}"


def check_beams(c: Case) -> None:
    """Beam search over a pool of one finds what it finds over plain PEFT."""
    wanted = _plainly(_generated, c.peft, c.inputs(), True, 3).sequences
    route(c.base, Pool(c.experts[:1]), Single(0))
    assert torch.equal(_generated(c.model, c.inputs(), True, beams=3).sequences, wanted)


def _padded(c: Case, inputs: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """The same rows behind (encoder-decoders: before) `by` masked tokens."""
    pad = torch.zeros(len(inputs["input_ids"]), by, dtype=torch.long)
    right = c.base.is_encoder_decoder
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return {**inputs, "input_ids": torch.cat([ids, pad] if right else [pad, ids], 1),
            "attention_mask": torch.cat([mask, pad] if right else [pad, mask], 1)}  # fmt: skip


def check_padding(c: Case) -> None:
    """Padding changes the routed model as little as it changes the base."""
    inputs = c.inputs()
    padded = _padded(c, inputs, 3)
    length = logits(c.model, **inputs).shape[1]
    base_error = relative(logits(c.model, **padded)[:, -length:], logits(c.model, **inputs))
    route(c.base, Pool(c.experts))
    error = relative(logits(c.model, **padded)[:, -length:], logits(c.model, **inputs))
    assert error < max(1e-4, 20 * base_error), f"{error:.2g}; the base's own is {base_error:.2g}"


def _traced(c: Case, inputs: dict[str, Tensor]) -> dict[tuple[str, int, int], tuple[int, list[int]]]:
    """(module, row, position) → (token, its experts)."""
    with torch.no_grad(), trace(c.model) as found:
        c.model(**inputs)
    return {
        (choices.path, int(row), int(position)): (int(token), experts.tolist())
        for choices in found.choices
        for row, position, token, experts in zip(
            choices.rows, choices.positions, choices.ids, choices.experts, strict=True
        )
    }


def _that_run(c: Case, inputs: dict[str, Tensor]) -> set[str]:
    """The adapted modules that are called: Mamba reads the weight of its dt_proj, and a mixture's expert may
    get no token."""
    ran: set[str] = set()
    hooks = [
        c.model.get_submodule(path).register_forward_hook(lambda *_, path=path: ran.add(path))
        for path in c.paths
    ]
    try:
        logits(c.model, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def check_trace(c: Case) -> None:
    """A trace of a batch says of every token what a trace of its row alone says, and names that token;
    of all modules that run."""
    inputs = c.inputs(3, 7)
    route(c.base, Pool(c.experts))
    whole = _traced(c, inputs)
    assert {path for path, _, _ in whole} == _that_run(c, inputs), "modules are missing"
    for row in range(3):
        alone = _traced(c, {name: x[row : row + 1] for name, x in inputs.items()})
        for (path, _, position), said in alone.items():
            assert whole[path, row, position] == said, f"{path}, row {row}, position {position}"
            ids = inputs.get("decoder_input_ids", inputs["input_ids"])[row].tolist()
            assert said[0] in (inputs["input_ids"][row, position], (ids + [-9] * 9)[position]), (
                f"{path}: another token"
            )
        assert len(alone) == sum(key[1] == row for key in whole)


def check_random(c: Case) -> None:
    """Random draws alike for a row alone and in a batch, with a cache and without."""
    inputs = c.inputs(3, 7)
    route(c.base, Pool(c.experts), Random(seed=1))
    whole = logits(c.model, **inputs)
    for row in range(3):
        close(logits(c.model, **{name: x[row : row + 1] for name, x in inputs.items()}), whole[row : row + 1])
    unroute(c.base)
    base_error = _plainly(_cache_error, c.model, inputs)
    route(c.base, Pool(c.experts), Random(seed=1))
    error = _cache_error(c.model, inputs)
    assert error < max(1e-4, 20 * base_error), f"cache: {error:.2g}; the base's own is {base_error:.2g}"


def _task() -> Task:
    answers = ["yes", "no maybe", "true", "plus one two", "false"]
    rows = tuple(
        Example(f"{'the quick brown fox ' * (i % 3)}{i} plus {i} equals? Answer:", (answers[i % 5],))
        for i in range(6)
    )
    return Task("task", train=rows, validation=rows[:3], test=rows)


@torch.no_grad()
def _log_likelihoods(c: Case, prompt: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """log p of each target token, from one plain forward of one row, without padding and cache."""
    if not c.base.is_encoder_decoder:
        found = c.model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    else:
        start = c.model.generation_config.decoder_start_token_id
        start = c.model.config.decoder_start_token_id if start is None else start
        decoder = torch.tensor([(start, *target[:-1])])
        # FSMT's decoder looks ahead where it is to keep a cache.
        found = c.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder, use_cache=False).logits[
            0
        ]
    return found.float().log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0]


def _rows(c: Case, examples):
    rows = [encode(c.base, example, i, EvaluationConfig()) for i, example in enumerate(examples)]
    return [(row.prompt, row.answers) for row in rows]


def check_evaluate(c: Case) -> None:
    """Scores of choices are those of one plain forward a row and choice; a generation is that of the row alone."""
    examples = [Example(e.input, e.targets, choices=("yes", "no maybe", "true plus")) for e in _task().test]
    examples = [Example(e.input, (e.choices[0],), choices=e.choices) for e in examples]
    route(c.base, Pool(c.experts))
    task = Task("task", train=(), validation=(), test=tuple(examples))
    scores = evaluate(c.base, task).tasks[0].predictions
    for (prompt, targets), prediction in zip(_rows(c, examples), scores, strict=True):
        for target, found in zip(targets, prediction.choice_scores, strict=True):
            wanted = float(_log_likelihoods(c, prompt, target).mean())
            assert abs(found - wanted) < 1e-3, f"{found:.4f}, alone {wanted:.4f}"
    free = tuple(_task().test)
    texts = [
        p.text
        for p in evaluate(c.base, Task("free", train=(), validation=(), test=free)).tasks[0].predictions
    ]
    alone = [
        evaluate(c.base, Task("free", train=(), validation=(), test=(row,))).tasks[0].predictions[0].text
        for row in free
    ]
    assert texts == alone, "a row writes something else in a batch"


def check_training(c: Case) -> None:
    """The losses that training reports are those of plain forwards of one row; a gate trains; the base comes back."""
    task, inputs = _task(), c.inputs()
    before = logits(c.model, **inputs)
    few = {"steps": 1, "rows_per_step": 3, "rows_per_batch": 3, "validate_every": 1, "base_dropout": False}
    expert = train_expert(c.base, task, ExpertConfig(learning_rate=1e-2, **few), report=lambda progress: None)
    recorded = expert.provenance["validation_losses"][-1][1]
    route(c.base, Pool([expert]), Single(0), any_base=True)
    pairs = [(prompt, targets[0]) for prompt, targets in _rows(c, task.validation)]
    losses = torch.cat([-_log_likelihoods(c, prompt, target) for prompt, target in pairs])
    unroute(c.base)
    assert abs(recorded - float(losses.mean())) < 1e-3, f"says {recorded:.4f}, is {float(losses.mean()):.4f}"
    gated = train_gate(c.base, expert, task, GateConfig(**few), report=lambda progress: None)
    assert any(v.any() for v in (gated.gates or {}).values()), "no gate moved"
    assert torch.equal(logits(c.model, **inputs), before), "training left something behind"


CHECKS: dict[str, Callable[[Case], None]] = {
    "pool of one": check_single,
    "PHATGOOSE": check_formula,
    "cache": check_cache,
    "beams": check_beams,
    "padding": check_padding,
    "trace": check_trace,
    "Random": check_random,
    "evaluate": check_evaluate,
    "training": check_training,
}
