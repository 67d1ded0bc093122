"""What is said of experts at modules that the model doesn't run, and that nothing is said of others."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import hooked
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import route, unroute
from phatgoose.models.attach.idle_modules import IdleModuleCheck
from phatgoose.models.batched.attach import MultiRouter
from phatgoose.models.batched.version import PoolVersion
from phatgoose.routers import Single

IDS = torch.randint(2, 300, (2, 5), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_embedding_that_t5_never_calls_is_named_once(make_base, make_expert):
    base = make_base("t5")
    route(base, Pool([make_expert(base, targets=["shared", "q"], gates=False)]), Single(0))
    with pytest.warns(
        UserWarning, match=r"^experts adapt shared, which didn't run in the model's first pass"
    ):
        run(base.model)
    watched = [
        m for m in base.model.modules() if m._forward_pre_hooks and isinstance(m, nn.Linear | nn.Embedding)
    ]
    assert [m for m in watched if m is not base.model.lm_head] == []  # from now on it costs nothing
    run(base.model)
    assert hooked(unroute(base)) == []


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_it_is_said_where_several_versions_go_different_ways(make_base, make_expert):
    base = make_base("t5")
    multi_router = MultiRouter(base.model)
    version = PoolVersion(base, Pool([make_expert(base, targets=["shared", "q"], gates=False)]))
    multi_router.attach(version)
    with pytest.warns(UserWarning, match="experts adapt shared, which didn't run"):
        run(base.model)
    run(base.model)
    multi_router.close()
    assert hooked(base.model) == []


def test_the_encoder_isnt_missed_where_only_the_decoder_runs(make_base, make_expert):
    base = make_base("t5")
    with torch.no_grad():
        encoded = base.model.get_encoder()(input_ids=IDS)
    route(base, Pool([make_expert(base)]))
    with torch.no_grad():
        base.model(encoder_outputs=encoded, decoder_input_ids=IDS)
    unroute(base)
    with torch.no_grad():
        first = base.model(encoder_outputs=encoded, decoder_input_ids=IDS, use_cache=True)
        route(base, Pool([make_expert(base)]))
        base.model(
            encoder_outputs=encoded, decoder_input_ids=IDS[:, :1], past_key_values=first.past_key_values
        )
    base.model.generate(IDS, max_new_tokens=3)


def test_nothing_is_said_of_compiled_layers(make_base, make_expert):
    base = make_base("llama", layers=1)
    base.model.model.layers[0].compile(backend="eager")
    route(base, Pool([make_expert(base, targets=["up_proj"])]))
    run(base.model)
    run(base.model)
    torch._dynamo.reset()


class Mixture(nn.Module):
    """A mixture of experts in two layers, of which the second one's is never asked;
    and a layer beside them that isn't called."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(4)) for _ in range(2))
        self.beside = nn.Linear(2, 2)

    def forward(self, x):
        return self.layers[0][1](x)


def test_one_of_a_mixtures_experts_that_no_token_reaches_isnt_missed():
    model = Mixture()
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    streams = SimpleNamespace(stacks={}, prefixes={})
    IdleModuleCheck(model, [(path, model.get_submodule(path)) for path in paths], streams)
    with pytest.warns(
        UserWarning, match=r"adapt layers\.1\.0, layers\.1\.1, layers\.1\.2, layers\.1\.3, beside, which"
    ):
        model(torch.zeros(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(1, 2))
