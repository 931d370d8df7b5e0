"""How many numbers a model has, which optimizer takes them, and how many operations a training step is. Needs no torch.

Two ways of counting would disagree some day: the plan of a run (``plan.py``) asks here, and whoever reports a share of the
peak may. Operations are those of the matrix products, 2 a multiply-add. Norms, rotations, softmax, the choice of experts and
the optimizers are left out (little at the shape of GLM-5, more in a tiny model).
"""

from dataclasses import dataclass

from glm5.model.config import Glm5Config
from glm5.recipes import StageRecipe

# What parameters are, and who updates them: Muon takes matrices inside the network, AdamW the rest; indexers have their own
# AdamW. Correction biases of routers are nobody's: a rule moves them.
OPTIMIZER = {
    "embedding": "adamw",
    "head": "adamw",
    "attention latents": "muon",  # q_a, kv_a: one for all heads
    "attention heads": "muon",  # q_b, kv_b, o
    "indexers": "indexer",
    "dense MLPs": "muon",
    "shared experts": "muon",
    "routed experts": "muon",
    "routers": "adamw",
    "router biases": None,
    "MTP projection": "muon",
    "norms and biases": "adamw",
}


def layer_parameters(config: Glm5Config, layer: int) -> dict[str, int]:
    """Parameters of a decoder layer by kind; the layer after the last is the MTP layer with all that is its own."""
    c, mtp = config, layer == config.num_hidden_layers
    h, heads, width = c.hidden_size, c.num_attention_heads, c.moe_intermediate_size
    biases = c.q_lora_rank + c.latent_dim + h if c.attention_bias else 0
    found = {
        "attention latents": h * (c.q_lora_rank + c.latent_dim),
        "attention heads": heads
        * (c.q_lora_rank * c.qk_head_dim + c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim) + c.v_head_dim * h),
        "norms and biases": 2 * h + c.q_lora_rank + c.kv_lora_rank + biases + (3 * h if mtp else 0),
    }
    if mtp or c.layer_indexers[layer] == "full":
        found["indexers"] = (
            c.index_n_heads * (c.q_lora_rank * c.index_head_dim + h) + h * c.index_head_dim + 2 * c.index_head_dim
        )
    if mtp or c.layer_mlps[layer] == "sparse":
        expert = 3 * h * width
        found["routed experts"] = c.n_routed_experts * expert
        if c.n_shared_experts:
            found["shared experts"] = c.n_shared_experts * expert
        found |= {"routers": c.n_routed_experts * h, "router biases": c.n_routed_experts}
    else:
        found["dense MLPs"] = 3 * h * c.intermediate_size
    if mtp:
        found["MTP projection"] = 2 * h * h
    return found


def parameters(config: Glm5Config, include_mtp: bool = True) -> dict[str, int]:
    """All parameters by kind, those of ``OPTIMIZER`` that the model has; the sum is ``model.num_parameters()``."""
    c = config
    edges = {"embedding": c.vocab_size * c.hidden_size, "norms and biases": c.hidden_size}
    if not c.tie_word_embeddings:
        edges["head"] = c.vocab_size * c.hidden_size
    layers = range(c.num_hidden_layers + (c.num_nextn_predict_layers if include_mtp else 0))
    return added([edges, *(layer_parameters(c, i) for i in layers)])


def active_parameters(config: Glm5Config) -> int:
    """What one token meets on its way through the layers: no embedding, head or MTP; the experts that it is routed to."""
    c = config
    active = [_active(c, layer_parameters(c, i)) for i in range(c.num_hidden_layers)]
    return sum(sum(kinds.values()) for kinds in active) + c.hidden_size


def added(counts: list[dict]) -> dict:
    """The sum of counts by kind, in the order of ``OPTIMIZER`` where the kinds are its."""
    names = [*OPTIMIZER, *(name for count in counts for name in count if name not in OPTIMIZER)]
    there = dict.fromkeys(name for name in names if any(name in count for count in counts))
    return {name: sum(count.get(name, 0) for count in counts) for name in there}


def _active(config: Glm5Config, kinds: dict[str, int]) -> dict[str, int]:
    if "routed experts" not in kinds:
        return kinds
    return kinds | {"routed experts": kinds["routed experts"] // config.n_routed_experts * config.num_experts_per_tok}


# ---- operations


@dataclass(frozen=True)
class Keys:
    """Mean keys of a query in a batch: all that it may see, and those that attention reads when the indexer selects."""

    visible: float
    selected: float

    @classmethod
    def of_one_document(cls, length: int, topk: int) -> "Keys":
        """Row t of a document has t + 1 keys: the most that a pack of `length` can hold. Packed documents have fewer."""
        k = min(topk, length)
        return cls((length + 1) / 2, (k * (k + 1) / 2 + (length - k) * k) / length)


def token_flops(
    config: Glm5Config,
    keys: Keys,
    *,
    attention: str = "dense",
    indexer: str = "none",
    mtp_depth: int = 1,
) -> dict[str, float]:
    """Operations that training on one token takes, by part: forward, and twice that backward for what learns.

    ========================  =====================================================================================
    projections, experts      2 a parameter that the token meets; the MTP layer's once for each depth
    head                      2 vocab hidden, once and once for each MTP depth
    dense attention           2 heads (qk + v) a visible key, queries and keys expanded per head
    sparse attention          2 heads (latent + kv_lora) a selected key: on latent rows, as it runs here
    indexer                   its projections; 2 (heads dim + heads) a visible key; and what its KL takes: the target,
                              2 heads qk a key (latent instead of qk where sparse), and its gradient, twice the
                              indexer's own, on the keys that it is taught (all of them in warm-up)
    ========================  =====================================================================================

    Args:
        attention: "dense" or "sparse".
        indexer: "none"; "warmup", in which nothing else learns and the head is not computed; "sparse".
        mtp_depth: how often the MTP layer is unrolled.
    """
    c, learns = config, indexer != "warmup"
    factor = 3 if learns else 1
    names = ("projections", "experts", "head", "dense attention", "sparse attention", "indexer")
    total = dict.fromkeys(names, 0.0)
    layers = [*range(c.num_hidden_layers), *[c.num_hidden_layers] * (mtp_depth if c.num_nextn_predict_layers else 0)]
    pairs = c.index_n_heads * (c.index_head_dim + 1)
    for layer in layers:
        kinds = _active(c, layer_parameters(c, layer))
        experts = kinds.get("routed experts", 0) + kinds.get("shared experts", 0)
        ours = ("attention latents", "attention heads", "dense MLPs", "routers", "MTP projection")
        total["experts"] += factor * 2 * experts
        total["projections"] += factor * 2 * sum(kinds.get(name, 0) for name in ours)
        if attention == "dense":
            total["dense attention"] += factor * 2 * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * keys.visible
        else:
            width = c.latent_dim + c.kv_lora_rank
            total["sparse attention"] += factor * 2 * c.num_attention_heads * width * keys.selected
        full = "indexers" in kinds
        if full and (attention == "sparse" or indexer != "none"):
            scored = keys.visible
            total["indexer"] += 2 * pairs * scored + 2 * kinds["indexers"]
        if indexer != "none":
            taught, width = (keys.visible, c.qk_head_dim) if indexer == "warmup" else (keys.selected, c.latent_dim)
            total["indexer"] += 2 * c.num_attention_heads * width * taught + 2 * 2 * pairs * taught
            total["indexer"] += 2 * 2 * kinds["indexers"] if full else 0
    if learns:
        depths = mtp_depth if c.num_nextn_predict_layers else 0
        total["head"] = factor * 2 * c.vocab_size * c.hidden_size * (1 + depths)
    return {name: flops for name, flops in total.items() if flops}


def stage_token_flops(config: Glm5Config, recipe: StageRecipe, attention: str, indexer: str) -> dict[str, float]:
    """``token_flops`` of a stage whose form has `attention` and that asks for the KL `indexer`, packs of one document."""
    keys = Keys.of_one_document(recipe.sequence_length, config.index_topk)
    return token_flops(config, keys, attention=attention, indexer=indexer, mtp_depth=recipe.mtp_depth)
