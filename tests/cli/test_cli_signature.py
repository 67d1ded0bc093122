"""`phatgoose signature`, and the routers that need it, by command."""

from __future__ import annotations

import shutil

import pytest

from encoder_fixtures import make_encoder
from phatgoose.experts.expert import Expert

pytest_plugins = ["cli_fixtures"]
SMALL = ["--steps", 2, "--rows-per-step", 4, "--rows-per-batch", 2, "--max-length", 64, "--validate-every", 0]


@pytest.fixture(scope="module")
def signed(ready, run, task, tmp_path_factory):
    """A folder with two signed experts, their pool, and the encoder."""
    folder, made = tmp_path_factory.mktemp("signed"), ready[0]
    encoder, out = make_encoder(folder / "encoder", max_tokens=60), {}
    for name, source in (("one", "one"), ("two", "two-gated")):
        out[name] = run(
            "signature",
            made / source,
            "--task",
            task,
            "--out",
            folder / name,
            "--encoder",
            encoder,
            "--rows",
            6,
        )
    out["pool"] = run("pool", "create", folder / "pool", folder / "one", folder / "two")
    for name, result in out.items():
        assert result.code == 0, (name, result.err)
    return folder, out


def test_a_signature_goes_beside_the_expert(signed, ready):
    folder, out = signed
    expert = Expert.load(folder / "one")
    assert len(expert.signature.texts) == 8
    assert expert.signature.encoder == "encoder"
    assert expert.hash == Expert.load(ready[0] / "one").hash
    assert Expert.load(ready[0] / "one").signature is None
    assert "mean activations of 6 rows and their prompts, 8 texts embedded by encoder" in out["one"].out
    assert not (folder / "one.work").exists()


@pytest.mark.parametrize(
    "router", ["average-activation:top_k=1", "retrieval", "centroid", "soft-centroid:every=0"]
)
def test_routers_that_need_it_answer(signed, run, base, router):
    folder, _ = signed
    text = "".join(
        [
            router,
            "" if "average" in router else ("," if ":" in router else ":") + f"encoder={folder / 'encoder'}",
        ]
    )
    result = run(
        "generate",
        "--pool",
        folder / "pool",
        "--base",
        base,
        "--router",
        text,
        "--max-new-tokens",
        3,
        "hello",
    )
    assert result.code == 0, result.err


def test_a_pool_without_signatures_is_refused_with_what_to_do(ready, signed, run, base):
    result = run("generate", "--pool", ready[0] / "pool", "--base", base, "--router", "retrieval", "hello")
    assert result.code == 1
    assert "phatgoose signature" in result.err
    result = run("generate", "--pool", signed[0] / "pool", "--base", base, "--router", "retrieval", "hello")
    assert result.code == 1
    assert "encoder=FOLDER" in " ".join(result.err.split())


def test_again_it_is_found_and_another_is_refused(signed, run, task, tmp_path):
    folder, _ = signed
    one = shutil.copytree(folder / "one", tmp_path / "one")
    before = (one / "expert.json").stat().st_mtime_ns
    again = run("signature", one, "--task", task, "--encoder", folder / "encoder", "--rows", 6)
    assert again.code == 0, again.err
    assert "finished before" in again.out
    assert (one / "expert.json").stat().st_mtime_ns == before
    other = run("signature", one, "--task", task, "--encoder", folder / "encoder", "--rows", 5)
    assert other.code == 1
    assert "--overwrite" in other.err
    other = run("signature", one, "--task", task, "--texts", 0, "--rows", 5, "--overwrite")
    assert other.code == 0, other.err
    assert Expert.load(one).signature.texts is None


def test_gates_and_a_signature_may_come_in_either_order(ready, run, task, base, tmp_path):
    two = tmp_path / "two"
    first = run("signature", ready[0] / "two", "--task", task, "--out", two, "--texts", 0, "--rows", 3)
    assert first.code == 0, first.err
    gated = run("gate", two, "--task", task, "--base", base, *SMALL)
    assert gated.code == 0, gated.err
    expert = Expert.load(two)
    assert expert.gates is not None
    assert expert.signature is not None
