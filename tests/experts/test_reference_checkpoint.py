"""The authors' checkpoints: the formula's outputs, and everything unexpected refused by name with nothing written."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import zipfile

import pytest
import torch

from phatgoose import PHATGOOSE, Expert, Pool, route, unroute
from phatgoose.errors import PhatgooseError
from phatgoose.experts import reference_checkpoint
from phatgoose.experts.packed.pack import pack, unpack
from phatgoose.experts.reference_checkpoint import BaseShape, import_reference
from phatgoose.models.attach.attach import routing_of
from phatgoose.models.base.layers import linear_shape, same_weights

EXPERTS = 5
Q = "decoder.block.1.layer.1.EncDecAttention.q"


def shape_of(base, weights=True):
    modules = dict(base.model.named_modules(remove_duplicate=False))
    linears = {path: s for path, m in modules.items() if (s := linear_shape(m)) is not None}
    parameters = {n: tuple(p.shape) for n, p in base.model.named_parameters(remove_duplicate=False)}
    shape = BaseShape(base.spec, linears, parameters, True)
    if not weights:
        return shape

    def is_own(name, tensor):
        return same_weights(modules[name.rpartition(".")[0]], "weight", tensor)

    return dataclasses.replace(shape, fingerprint=base.fingerprint, is_own=is_own)


def made(base, experts=EXPERTS, dtype=torch.float32, seed=0):
    """A checkpoint of random values at every linear layer of the blocks, as the authors' scripts write them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    found = {
        "encoder.embed_tokens.weight": base.model.encoder.embed_tokens.weight.detach().to(torch.bfloat16),
        "decoder.embed_tokens.weight": base.model.decoder.embed_tokens.weight.detach().float(),
    }
    for i in range(experts):
        for path, module in base.model.named_modules():
            if isinstance(module, torch.nn.Linear) and "block" in path:
                d_in, d_out = module.in_features, module.out_features
                # layer1 is a transposed view there: the authors turn their experts' matrices when they number them
                found[f"{path}._addons.expert_lora.layer1__{i}"] = (draw(16, d_in) * 0.5).T
                found[f"{path}._addons.router.expert_embeddings__{i}"] = draw(d_in)
                found[f"{path}._addons.expert_lora.layer2__{i}"] = draw(16, d_out) * 0.5
    return found


@pytest.fixture
def t5(make_base):
    base = make_base("t5")
    base.model.double()
    return base


def formula(base, checkpoint, inputs, top_k=2):
    """The model's logits with Σ w_e (u L1_e L2_e)/16 added at every module, written from the paper, in float64."""
    handles = []

    def hook(path):
        rows = [
            tuple(
                checkpoint[f"{path}._addons.{part}__{e}"].double()
                for part in ("expert_lora.layer1", "expert_lora.layer2", "router.expert_embeddings")
            )
            for e in range(EXPERTS)
        ]

        def norm(x):
            return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

        def add(module, args, output):
            u = args[0]
            scores = torch.stack([(norm(u) * norm(v)).sum(-1) for _, _, v in rows], -1) / u.shape[-1] ** 0.5
            weights = scores.softmax(-1)  # over all, then the best two, then made to sum to one
            best = weights.topk(top_k, dim=-1)
            kept = torch.zeros_like(weights).scatter(-1, best.indices, best.values)
            kept = kept / kept.sum(-1, keepdim=True)
            return output + sum(kept[..., e, None] * (u @ l1 @ l2) / 16 for e, (l1, l2, _) in enumerate(rows))

        return add

    try:
        for path, module in base.model.named_modules():
            if f"{path}._addons.expert_lora.layer1__0" in checkpoint:
                handles.append(module.register_forward_hook(hook(path)))
        with torch.no_grad():
            return base.model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()


def batch():
    ids = torch.randint(2, 300, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :5]}


@torch.no_grad()
def logits(model):
    return model(**batch()).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_formulas_outputs(t5, tmp_path, dtype):
    checkpoint = made(t5, dtype=dtype)
    torch.save(checkpoint, tmp_path / "best.pt")
    expected = formula(t5, checkpoint, batch())
    contents = import_reference(
        tmp_path / "best.pt", shape_of(t5), tmp_path / "pool", [f"task{i}" for i in range(5)]
    )
    assert (contents.experts, len(contents.modules)) == (5, 2 * (4 + 3) + 2 * (8 + 3))
    assert set(contents.copies.values()) == {"the base's own"}
    pool = Pool.load(tmp_path / "pool")
    assert pool.names == ("task0", "task1", "task2", "task3", "task4")
    found = logits(route(t5, pool, PHATGOOSE(2)))
    plain = logits(unroute(t5))
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    assert float((plain - expected).norm() / expected.norm()) > 1e-2
    before = {p: p.read_bytes() for p in (tmp_path / "pool").rglob("*.*") if p.is_file()}
    pack(tmp_path / "pool")
    packed = logits(route(t5, Pool.load(tmp_path / "pool"), PHATGOOSE(2)))
    assert float((packed - expected).norm() / expected.norm()) < 1e-6
    assert "is packed in" in routing_of(t5).copied[Q]
    unpack(tmp_path / "pool")
    assert {p: p.read_bytes() for p in before} == before


def test_every_expert_is_an_ordinary_adapter(make_base, tmp_path):
    """Plain PEFT loads each folder and computes W u + (u L1 L2)/16."""
    import copy
    import warnings

    from peft import PeftModel

    base = make_base("t5")
    checkpoint = made(base)
    torch.save(checkpoint, tmp_path / "best.pt")
    import_reference(tmp_path / "best.pt", shape_of(base), tmp_path / "pool")
    place = tmp_path / "pool/experts/expert-3"
    expert = Expert.load(place)
    assert expert.adapter_config["target_modules"] == ["k", "o", "q", "v", "wi_0", "wi_1", "wo"]
    assert expert.provenance["source"]["expert"] == 3
    assert expert.base == base.fingerprint
    update = expert.updates[Q]
    assert (update.scale, update.rank) == (1 / 16, 16)
    assert torch.equal(update.A, checkpoint[f"{Q}._addons.expert_lora.layer1__3"].T)
    assert torch.equal(update.B, checkpoint[f"{Q}._addons.expert_lora.layer2__3"].T)
    assert torch.equal(expert.gates[Q], checkpoint[f"{Q}._addons.router.expert_embeddings__3"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), place).eval()
    plain, adapted = dict(base.model.named_modules())[Q], dict(model.base_model.model.named_modules())[Q]
    u = torch.randn(3, 32)
    down, up = (checkpoint[f"{Q}._addons.expert_lora.layer{n}__3"] for n in (1, 2))
    assert torch.allclose(adapted(u), plain(u) + u @ down @ up / 16, atol=1e-5)


def test_some_modules_and_many_mappings(make_base, tmp_path, monkeypatch):
    base = make_base("t5")
    checkpoint = {k: v for k, v in made(base, experts=12).items() if ".q._addons" in k or ".wo._addons" in k}
    torch.save(checkpoint, tmp_path / "best.pt")
    monkeypatch.setattr(reference_checkpoint, "AT_ONCE_BYTES", 50_000)
    seen = []
    shape = shape_of(base, weights=False)
    contents = import_reference(
        tmp_path / "best.pt", shape, tmp_path / "pool", progress=lambda i, n: seen.append((i, n))
    )
    assert seen == [(i + 1, 12) for i in range(12)]
    assert contents.copies == {}
    pool = Pool.load(tmp_path / "pool")
    assert pool.base is None
    assert pool.names == tuple(f"expert-{i}" for i in range(12))
    for i, expert in enumerate(pool.experts):
        assert torch.equal(expert.gates[Q], checkpoint[f"{Q}._addons.router.expert_embeddings__{i}"])
    assert pool.experts[0].adapter_config["target_modules"] == ["q", "wo"]
    one = {k: v for k, v in checkpoint.items() if k.startswith(Q)}
    torch.save(one, tmp_path / "one.pt")
    import_reference(tmp_path / "one.pt", shape, tmp_path / "one")
    assert Pool.load(tmp_path / "one").experts[0].adapter_config["target_modules"] == [Q]


def test_embeddings_that_are_not_the_bases(make_base, tmp_path):
    base = make_base("t5")
    checkpoint = made(base)
    checkpoint["encoder.embed_tokens.weight"] = checkpoint["encoder.embed_tokens.weight"] * 1.1
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(PhatgooseError, match=r"encoder.embed_tokens.weight is not that of the base"):
        import_reference(tmp_path / "best.pt", shape_of(base), tmp_path / "pool")
    contents = import_reference(tmp_path / "best.pt", shape_of(base, weights=False), tmp_path / "pool")
    assert set(contents.copies.values()) == {"not compared"}
    record = Pool.load(tmp_path / "pool").experts[0].provenance
    assert record["source"]["base_copies"]["encoder.embed_tokens.weight"] == "not compared"


L1, L2, GATE = (
    f"{Q}._addons.{p}__1" for p in ("expert_lora.layer1", "expert_lora.layer2", "router.expert_embeddings")
)


def put(key, value):
    return lambda c: c.update({key: value})


def spoil(key, value):
    def change(c):
        c[key] = c[key].clone()
        c[key].view(-1)[3] = value

    return change


REFUSED = {
    "unknown key": (put("lm_head.weight", torch.zeros(2)), "unknown key 'lm_head.weight'"),
    "output gates": (put(f"{Q}._addons.expert_lora.expert_output_gate", torch.zeros(32)), "unknown key"),
    "leading zero": (lambda c: c.update({L1.replace("__1", "__01"): c.pop(L1)}), "unknown key .*layer1__01'"),
    "not a number": (lambda c: c.update({L1.replace("__1", "__x"): c.pop(L1)}), "unknown key"),
    "a prefix": (lambda c: c.update({f"model.{L1}": c.pop(L1)}), "no linear layer of that name"),
    "another module": (
        put("encoder._addons.router.expert_embeddings__0", torch.zeros(32)),
        "no linear layer of that name",
    ),
    "missing layer1": (lambda c: c.pop(L1), r"q._addons.expert_lora.layer1__1 is missing; other parts go from 0 to 4"),
    "missing layer2": (lambda c: c.pop(L2), "layer2__1 is missing"),
    "missing gate": (lambda c: c.pop(GATE), "expert_embeddings__1 is missing"),
    "a gap": (lambda c: [c.pop(k) for k in list(c) if k.endswith("__2")], "__2 is missing"),
    "one too many": (put(L1.replace("__1", "__5"), torch.zeros(32, 16)), "__5 is missing"),
    "shape of layer1": (put(L1, torch.zeros(16, 32)), r"shape \[16, 32\], expected \[32, 16\]"),
    "another bottleneck": (put(L2, torch.zeros(8, 32)), r"shape \[8, 32\], expected \[16, 32\]"),
    "shape of the gate": (put(GATE, torch.zeros(1, 32)), r"shape \[1, 32\], expected \[32\]"),
    "shape of embeddings": (put("encoder.embed_tokens.weight", torch.zeros(2, 32)), "has shape"),
    "float64": (put(L1, torch.zeros(32, 16, dtype=torch.float64)), "is torch.float64"),
    "integers": (put(GATE, torch.zeros(32, dtype=torch.int64)), "is torch.int64"),
    "sparse": (put(L1, torch.zeros(32, 16).to_sparse()), "is torch.float32, torch.sparse_coo"),
    "NaN": (spoil(GATE, torch.nan), "expert_embeddings__1 has 1 of 32 values that are NaN"),
    "infinity": (spoil(L2, -torch.inf), "layer2__1 has 1 of 512 values that are NaN or infinite"),
    "not a tensor": (put("step", 3), "'step' is int, expected a tensor"),
    "nested": (lambda c: c.update(state={"a": torch.zeros(1)}), "'state' is dict, expected a tensor"),
    "no text": (lambda c: c.update({3: torch.zeros(1)}), "3 can't name a tensor"),
    "nothing": (lambda c: c.clear(), "expected a dictionary of tensors by name"),
    "no expert": (lambda c: [c.pop(k) for k in list(c) if "_addons" in k], "there is no expert in it"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_with_nothing_written(make_base, tmp_path, case):
    base = make_base("t5")
    change, message = REFUSED[case]
    checkpoint = made(base)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(PhatgooseError, match=message):
        import_reference(tmp_path / "best.pt", shape_of(base), tmp_path / "pool")
    assert os.listdir(tmp_path) == ["best.pt"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/phatgoose-should-not-exist",)


def test_files_that_are_no_torch_files_of_tensors(make_base, tmp_path):
    base = make_base("t5")
    whole = io.BytesIO()
    torch.save(made(base), whole)
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(whole.getvalue())) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    evil, old = io.BytesIO(), io.BytesIO()
    torch.save({L1: Evil()}, evil)
    torch.save(made(base), old, _use_new_zipfile_serialization=False)
    for data, message in (
        (b"", "not a torch file"),
        (b"hello", "not a torch file"),
        (pickle.dumps(Evil()), "not a torch file"),
        (old.getvalue(), "not a torch file of today's format"),
        (whole.getvalue()[:-30], "not a torch file"),
        (packed.getvalue(), "is compressed"),
        (evil.getvalue(), "can't be read as a torch file of tensors alone"),
    ):
        (tmp_path / "best.pt").write_bytes(data)
        with pytest.raises(PhatgooseError, match=message):
            import_reference(tmp_path / "best.pt", shape_of(base), tmp_path / "pool")
    with pytest.raises(PhatgooseError, match="does not exist"):
        import_reference(tmp_path / "nowhere.pt", shape_of(base), tmp_path / "pool")
    assert not os.path.exists("/tmp/phatgoose-should-not-exist")
    assert os.listdir(tmp_path) == ["best.pt"]


def test_names_and_folders(make_base, tmp_path):
    base = make_base("t5")
    torch.save(made(base), tmp_path / "best.pt")
    for names, message in (
        (["a"] * 4, "there are 4 names and 5 experts"),
        (["a", "b", "c", "d", "a"], "the name 'a' is given to experts 0 and 4"),
        (["a", "b", "c", "d", ""], "can't name an expert"),
        (["a", "b", "c", "d", "../e"], "can't name an expert"),
    ):
        with pytest.raises(PhatgooseError, match=message):
            import_reference(tmp_path / "best.pt", shape_of(base), tmp_path / "pool", names)
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/letter.txt").write_text("dear")
    with pytest.raises(PhatgooseError, match="exists and isn't empty"):
        import_reference(tmp_path / "best.pt", shape_of(base), tmp_path / "pool")
    assert os.listdir(tmp_path / "pool") == ["letter.txt"]
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "pool"]
