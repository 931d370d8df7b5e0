"""Which optimizer holds which parameter, at which rate, and the matrices that Muon sees."""

import pytest
import torch

from glm5.train.optim import AdamW, Muon
from glm5.train.parameters import indexer_names, make_optimizers, muon_splits
from glm5.train.run import build_model
from glm5.train.stages import stage_of
from tests.train.test_run import STAGES, small_recipe


@pytest.fixture(scope="module")
def model():
    return build_model(small_recipe("model.overrides.num_hidden_layers=3", "model.overrides.first_k_dense_replace=1"))


def stacks(model, name):
    """Shapes of the stacks that the parameter called `name` falls into."""
    p = model.get_parameter(name)
    return [tuple(s.shape) for s in muon_splits(model).get(name, lambda t: [t.unsqueeze(0)])(p.data)]


def test_up_projections_fall_into_heads_and_experts_into_matrices(model):
    c, attention, experts = model.config, "model.layers.1.self_attn.", "model.layers.1.mlp.experts."
    heads, width = c.num_attention_heads, c.moe_intermediate_size
    assert stacks(model, attention + "q_b_proj.weight") == [(heads, c.qk_head_dim, c.q_lora_rank)]
    assert stacks(model, attention + "kv_b_proj.weight") == [
        (heads, c.qk_nope_head_dim, c.kv_lora_rank),
        (heads, c.v_head_dim, c.kv_lora_rank),
    ]
    assert stacks(model, experts + "gate_up_proj") == [(c.n_routed_experts, width, c.hidden_size)] * 2
    assert stacks(model, experts + "down_proj") == [(c.n_routed_experts, c.hidden_size, width)]
    assert stacks(model, attention + "o_proj.weight") == [(1, c.hidden_size, heads * c.v_head_dim)]


def test_a_head_is_the_rows_that_attention_reads_as_one(model):
    """Key rows first in each head of kv_b, as ``MLA`` expands them."""
    c, name = model.config, "model.layers.1.self_attn.kv_b_proj.weight"
    weight = torch.arange(model.get_parameter(name).numel()).view_as(model.get_parameter(name))
    keys, values = muon_splits(model)[name](weight)
    per_head = c.qk_nope_head_dim + c.v_head_dim
    for head in range(c.num_attention_heads):
        rows = weight[head * per_head : (head + 1) * per_head]
        assert torch.equal(keys[head], rows[: c.qk_nope_head_dim]) and torch.equal(values[head], rows[c.qk_nope_head_dim :])


def test_every_split_covers_its_parameter_once(model):
    for name, split in muon_splits(model).items():
        parameter = model.get_parameter(name)
        counts = torch.zeros(parameter.shape)
        for stack in split(counts):
            stack += 1
        assert (counts == 1).all(), name


def test_muon_takes_the_matrices_and_adamw_the_edges(model):
    recipe = small_recipe()
    optimizers = make_optimizers(model, stage_of(recipe, "pretrain"))
    muon, adamw = optimizers["muon"][0], optimizers["adamw"][0]
    assert isinstance(muon, Muon) and isinstance(adamw, AdamW)
    edges = {"model.embed_tokens.weight", "lm_head.weight"} | {n for n in adamw.parameters if n.endswith("mlp.gate.weight")}
    assert edges <= set(adamw.parameters) and sum(n.endswith("mlp.gate.weight") for n in edges) == len(model.moe_layers())
    assert all(p.dim() == 1 for n, p in adamw.parameters.items() if n not in edges)
    assert all(p.dim() >= 2 for p in muon.parameters.values())


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_holds_what_it_trains_at_its_own_rates_and_freezes_the_rest(model, name):
    chosen = ("muon_lr=0.1", "adamw_lr=0.2", "indexer_lr=0.3")
    stage = stage_of(small_recipe(*(f"stages.{name}.{rate}" for rate in chosen)), name)
    optimizers = make_optimizers(model, stage)
    indexer, rates = indexer_names(model), {"muon": 0.1, "adamw": 0.2, "indexer": 0.3}
    wanted = {"pretrain": ["muon", "adamw"], "dsa-warmup": ["indexer"], "dsa-sparse": ["muon", "adamw", "indexer"]}
    wanted = wanted[stage.recipe.kind]
    assert {name: lr for name, (_, lr) in optimizers.items()} == {name: rates[name] for name in wanted}
    for name, (optimizer, _) in optimizers.items():
        assert optimizer.weight_decay == stage.recipe.weight_decay
        assert set(optimizer.parameters) <= indexer if name == "indexer" else not set(optimizer.parameters) & indexer
    held = set().union(*(optimizer.parameters for optimizer, _ in optimizers.values()))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == held
