"""Transformers' GlmMoeDsa beside ours on the same weights, which pass through a checkpoint directory; and what it chose."""

from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from glm5 import Glm5ForCausalLM
from tests.model import shapes

SMALL = shapes.SMALL | dict(
    v_head_dim=28,
    index_n_heads=8,
    index_head_dim=40,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
    pad_token_id=None,
    eos_token_id=None,
)

# Every choice that Transformers' configuration gives, one or two at a time.
CONFIGS = {
    "plain": {},
    "index_share": {"indexer_types": ["full", "shared", "full"]},
    "index_pattern": {"index_topk_pattern": "FSS"},
    "index_freq": {"index_topk_freq": 2, "index_skip_topk_offset": 1},
    "groups": {"n_group": 3, "topk_group": 2},
    "groups_not_normed": {"n_group": 2, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "all_experts": {"num_experts_per_tok": 6},
    "no_shared_expert": {"n_shared_experts": 0},
    "two_shared_experts": {"n_shared_experts": 2},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "all_dense": {"first_k_dense_replace": 9},
    "all_sparse": {"first_k_dense_replace": 0},
    "sparse_first": {"mlp_layer_types": ["sparse", "dense", "sparse"]},
    "eps": {"rms_norm_eps": 1e-2},
    "theta": {"rope_parameters": {"rope_theta": 8e6, "rope_type": "default"}},
    "keys_that_default_rope_does_not_read": {
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5, "factor": 2.0}
    },
    "linear_rope": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}},
    "yarn": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8,
        }
    },
    "yarn_mscale": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
            "truncate": False,
        }
    },
    "one_head": {"num_attention_heads": 1, "num_key_value_heads": 1, "index_n_heads": 1},
    "topk_1": {"index_topk": 1},
    "topk_all": {"index_topk": 500},
    "one_layer": {"num_hidden_layers": 1},
    "rope_is_all_of_the_indexer": {"index_head_dim": 16},
}


def theirs(seed: int = 0, attention: str = "eager", **changes) -> GlmMoeDsaForCausalLM:
    """A model of Transformers in which every parameter is random, norm weights and router biases too."""
    config = GlmMoeDsaConfig(**SMALL | changes, attn_implementation=attention)
    model = GlmMoeDsaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            tensor.copy_(1 + 0.2 * noise)
        elif "bias" in name:
            tensor.copy_(0.1 * noise)
        else:
            tensor.copy_(0.2 * noise)
    return model


def ours(model: GlmMoeDsaForCausalLM, folder: Path) -> Glm5ForCausalLM:
    """The same weights as a Glm5ForCausalLM."""
    model.save_pretrained(folder)
    return Glm5ForCausalLM.from_pretrained(folder)


@contextmanager
def recorded(model: GlmMoeDsaForCausalLM):
    """Collects, for every layer that has one, what the indexer scored and chose, and what the router did."""
    record = {"scores": {}, "indices": {}, "router": {}}
    hooks = []
    original = torch.Tensor.topk

    for number, layer in enumerate(model.model.layers):
        indexer, gate = layer.self_attn.indexer, getattr(layer.mlp, "gate", None)
        if indexer is not None:

            def call(*args, number=number, real=indexer.forward, **kwargs):
                def topk(scores, *rest, **options):
                    record["scores"].setdefault(number, []).append(scores)
                    return original(scores, *rest, **options)

                torch.Tensor.topk = topk
                try:
                    chosen = real(*args, **kwargs)
                finally:
                    torch.Tensor.topk = original
                record["indices"].setdefault(number, []).append(chosen)
                return chosen

            indexer.forward = call
            hooks.append(lambda indexer=indexer: delattr(indexer, "forward"))
        if gate is not None:
            handle = gate.register_forward_hook(
                lambda module, args, out, number=number: record["router"].setdefault(number, []).append(out)
            )
            hooks.append(handle.remove)
    try:
        yield record
    finally:
        for undo in hooks:
            undo()


CLEAR = 1e-5  # a boundary between the last score chosen and the best one left out


class TheirChoice:
    """Gives our layers the index sets that Transformers' chose, after comparing them with our own."""

    def __init__(self, record, batch: int, time: int, real: torch.Tensor):
        self.record, self.batch, self.time, self.real = record, batch, time, real
        self.compared = 0

    def __call__(self, selection):
        scores, chosen = (
            torch.cat([torch.nn.functional.pad(part, (0, self.time - part.shape[-1]), value=fill) for part in parts], 1)
            for parts, fill in (
                (self.record["scores"][selection.layer], float("-inf")),
                (self.record["indices"][selection.layer], 2**30),
            )
        )
        start = torch.arange(self.batch)[:, None, None] * self.time
        chosen = (chosen.long() + start).reshape(self.batch * self.time, -1)
        want = visible_indices(chosen, selection.ks, selection.ke, selection.indices.shape[1])
        want = want[:, : selection.indices.shape[1]]
        ranked = scores.reshape(self.batch * self.time, -1).sort(1, descending=True).values
        k = min(selection.topk, self.time)
        seen = selection.ke - selection.ks
        margin = ranked[:, k - 1] - ranked[:, min(k, self.time - 1)]
        clear = self.real & ((seen <= k) | (margin > CLEAR))
        assert torch.equal(selection.indices[clear], want[clear])
        self.compared += int((clear & (seen > k)).sum())
        return torch.where(self.real[:, None], want, selection.indices)


def visible_indices(chosen: torch.Tensor, ks: torch.Tensor, ke: torch.Tensor, width: int) -> torch.Tensor:
    """Transformers' indices [T, k] as ours: only those in [ks, ke), ascending, -1 padded to ``width``."""
    seen = (chosen >= ks[:, None]) & (chosen < ke[:, None])
    sorted_ones = torch.where(seen, chosen, 2**31 - 1).sort(1).values
    padded = torch.nn.functional.pad(sorted_ones, (0, max(width - chosen.shape[1], 0)), value=2**31 - 1)
    return torch.where(padded == 2**31 - 1, -1, padded).int()
