"""`phatgoose explain` and what `phatgoose chat --trace` shows."""

from __future__ import annotations

import json

pytest_plugins = ["cli_fixtures"]


def test_explain_in_words_and_as_json(run, ready, base):
    folder, _ = ready
    common = ["explain", "what is the colour of red number 1?", "--pool", folder / "pool", "--base", base]
    common += ["--max-new-tokens", "3"]
    said = run(*common)
    assert said.code == 0, said.err
    assert "the experts make this answer" in said.out
    assert "(base alone)" in said.out
    told = run(*common, "--json", "--most", "1")
    data = json.loads(told.out)
    assert data["format"] == "phatgoose-explanation/1"
    assert [e["expert"] for e in data["effects"]] in (["one"], ["two"])
    assert data["left_out"] == 1
    assert data["effects"][0]["change"] == data["effects"][0]["without"] - data["log_likelihood"]


def test_explain_refuses(run, ready, base):
    folder, _ = ready
    pool = ["--pool", folder / "pool", "--base", base]
    for router, words in (
        ("base", "no experts to leave out"),
        ("merged", "no experts to leave out"),
        ("random", "can't be switched off"),
    ):
        result = run("explain", "x", *pool, "--router", router)
        assert result.code == 1
        assert words in result.err
    assert run("explain", " ", *pool).code == 2


def test_chat_shows_who_led(run, ready, base):
    folder, _ = ready
    common = ["chat", "--pool", folder / "pool", "--base", base, "--raw", "--max-new-tokens", "4"]
    plain = run(*common, input="yes no\n")
    shown = run(*common, "--trace", input="yes no\n/router base\nyes\n/quit\n")
    assert shown.code == 0, shown.err
    assert " %" in shown.err
    assert shown.out.startswith(plain.out.rstrip("\n"))
    assert shown.err.count("router: base") == 1
    switched = run(*common, input="/trace\nyes no\n/trace\nyes no\n")
    assert "experts are shown" in switched.err
    assert "experts are hidden" in switched.err
    assert " %" in switched.err


def test_explain_says_what_spoke_for_whom_under_gander(run, ready, base):
    folder, _ = ready
    common = ["explain", "what is the colour of red number 1?", "--pool", folder / "pool", "--base", base]
    common += ["--max-new-tokens", "3", "--router", "gander:half_life=8"]
    said = run(*common)
    assert said.code == 0, said.err
    evidence, tokens = said.out.split("\n\n")[-2:]
    assert evidence.split()[:4] == ["expert", "evidence", "layer", "0"]
    assert [line.split()[0] for line in evidence.splitlines()[1:]] in (["one", "two"], ["two", "one"])
    assert tokens.split()[:2] == ["place", "token"]
    assert len(tokens.splitlines()) == 11
    data = json.loads(run(*common, "--json").out)
    seen = data["evidence"]
    for total, modules, of_tokens in zip(seen["sums"], seen["by_module"], seen["by_token"], strict=True):
        assert abs(sum(modules) - total) < 1e-6
        assert abs(sum(of_tokens) - total) < 1e-6
    assert len(seen["tokens"]) == len(seen["by_token"][0])
    assert json.loads(run(*common[:-1], "phatgoose", "--json").out)["evidence"] is None


def test_gander_chats_over_several_turns_as_one_reading_of_all_of_them(run, ready, save_base):
    """Each turn reads the whole conversation, so what the model then writes is what a fresh model writes after it."""
    import torch

    import phatgoose
    from phatgoose.models.text.generate import greedy_answer

    template = "{% for m in messages %}</s>{{ m.role }}:\n{{ m.content }}{% endfor %}</s>assistant:\n"
    base, folder = save_base("llama", chat_template=template), ready[0]
    router, turns = "gander:half_life=4", ["walk red", "blue two"]
    said = run(
        "chat", "--pool", folder / "pool", "--base", base, "--chat", "--router", router,
        "--max-new-tokens", "4", input="\n".join(turns) + "\n",
    )  # fmt: skip
    assert said.code == 0, said.err
    model, messages, wanted = phatgoose.load_base(base), [], ""
    phatgoose.route(model, phatgoose.Pool.load(folder / "pool"), phatgoose.parse_router(router))
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = torch.tensor([model.tokenizer.apply_chat_template(messages)["input_ids"]])
        out = greedy_answer(model, ids, 4)[0, ids.shape[1] :]
        answer = model.tokenizer.decode(out, skip_special_tokens=True)
        wanted += answer + "\n"
        messages.append({"role": "assistant", "content": answer})
    assert said.out == wanted


def test_gander_is_a_router_for_generate_and_eval(run, ready, base, task):
    folder, _ = ready
    common = ["--pool", folder / "pool", "--base", base]
    made = run("generate", "red number", *common, "--router", "gander", "--max-new-tokens", "3")
    assert made.code == 0, made.err
    scored = run("eval", *common, "--router", "gander", "--router", "gander:layers=1", "--task", task)
    assert scored.code == 0, scored.err
    assert "gander:layers=1" in scored.out
    refused = run("generate", "red", *common, "--router", "gander:layers=2")
    assert refused.code == 1
    assert "set layers lower" in refused.err
    shown = run("routers", "gander")
    assert "half_life" in shown.out
