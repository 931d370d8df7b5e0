"""The model against Transformers' GlmMoeDsa on the same weights. Skipped where Transformers (>= 5.23) is not installed."""

import pytest
import torch

from tests.model import shapes

glm_moe_dsa = pytest.importorskip("transformers.models.glm_moe_dsa.modeling_glm_moe_dsa")


def theirs(config):
    """Transformers' model of the same shape."""
    names = set(glm_moe_dsa.GlmMoeDsaConfig().to_dict()) & set(config.to_dict())
    fields = {name: value for name, value in config.to_dict().items() if name in names and value is not None}
    hf = glm_moe_dsa.GlmMoeDsaConfig(
        **fields | {"indexer_types": list(config.layer_indexers), "attn_implementation": "eager"}
    )
    return glm_moe_dsa.GlmMoeDsaForCausalLM(hf).eval()


@pytest.mark.parametrize("types", [("full", "full", "full"), ("full", "shared", "full")], ids=["full", "index_share"])
@torch.no_grad()
def test_logits_are_those_of_transformers(types):
    # Eight indexer heads and a matching seed: with few, ReLU leaves ties at the boundary, which torch.topk breaks at will.
    ours = shapes.model("sparse", num_nextn_predict_layers=0, indexer_types=types, index_n_heads=8, index_head_dim=40)
    for name, tensor in ours.state_dict().items():
        if "norm" in name or "bias" in name:
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    other = theirs(ours.config)
    missing, unexpected = other.load_state_dict(ours.state_dict(), strict=False)
    assert not missing and not unexpected
    ids = shapes.random_tokens(2, 60)
    got, want = ours(ids).logits, other(ids).logits
    assert (got - want).norm() / want.norm() < 1e-5
