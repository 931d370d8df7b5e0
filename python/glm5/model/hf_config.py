"""config.json of a Hugging Face ``glm_moe_dsa`` directory <-> ``Glm5Config``, in the forms of GLM-5, 5.1 and 5.2."""

from dataclasses import fields

from glm5.model.config import Glm5Config

# What a key that is absent means there, where it differs from Glm5Config's own default (Transformers 5.23, GlmMoeDsaConfig).
_ABSENT = {"num_nextn_predict_layers": 0, "bos_token_id": 0, "eos_token_id": 1}

# Keys that choose a computation of which the model has just one: key -> what it must be.
_FIXED = {
    "model_type": "glm_moe_dsa",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "indexer_rope_interleave": True,
    "attention_dropout": 0.0,
}

# Derived from others or read in another form: not passed on, and written anew.
_DERIVED = (
    "head_dim",
    "qk_head_dim",
    "num_experts",
    "num_local_experts",
    "index_topk_pattern",
    "rope_theta",
    "rope_scaling",
)


def config_from_hf(values: dict) -> tuple[Glm5Config, dict]:
    """(the config, the keys that say nothing about the model's shape: they are written back as they are).

    Raises ValueError naming the key whose value this model cannot follow.
    """
    for key, wanted in _FIXED.items():
        if key in values and values[key] != wanted:
            raise ValueError(f"config.json: {key} is {values[key]!r}, want {wanted!r}")
    known = {f.name for f in fields(Glm5Config)}
    taken = _ABSENT | {key: value for key, value in values.items() if key in known}
    extra = {key: value for key, value in values.items() if key not in known and key not in _DERIVED}

    taken["rope_parameters"] = _rope_parameters(values)
    for alias in ("num_local_experts", "num_experts"):
        taken["n_routed_experts"] = values.get(alias, taken.get("n_routed_experts", Glm5Config.n_routed_experts))
    if taken.get("indexer_types") is None and (pattern := values.get("index_topk_pattern")) is not None:
        taken["indexer_types"] = _indexer_types(pattern)
    taken["index_topk_freq"] = max(taken.get("index_topk_freq") or 1, 1)
    layers = taken.get("num_hidden_layers", Glm5Config.num_hidden_layers)
    if isinstance(dense := taken.get("first_k_dense_replace", Glm5Config.first_k_dense_replace), int):
        taken["first_k_dense_replace"] = min(dense, layers)
    return Glm5Config(**taken), extra


def config_to_hf(config: Glm5Config, extra: dict) -> dict:
    """The reverse. Everything that Transformers would otherwise derive or take from its defaults is written out."""
    return (
        {"architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa"}
        | extra
        | config.to_dict()
        | {
            "indexer_types": list(config.layer_indexers),
            "mlp_layer_types": list(config.layer_mlps),
            "head_dim": config.qk_rope_head_dim,
            "qk_head_dim": config.qk_head_dim,
        }
    )


def _indexer_types(pattern: str | list[str]) -> list[str]:
    names = {"F": "full", "S": "shared"}
    if isinstance(pattern, str) and set(pattern) <= set(names):
        return [names[letter] for letter in pattern]
    if isinstance(pattern, list):
        return pattern
    raise ValueError(f"config.json: index_topk_pattern is {pattern!r}, want F and S or a list of 'full' and 'shared'")


def _rope_parameters(values: dict) -> dict:
    """``rope_parameters`` as they are now, or the older top-level ``rope_theta`` and ``rope_scaling``."""
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
    rope.setdefault("rope_theta", values.get("rope_theta", 10000.0))
    if rope["rope_type"] == "yarn":
        limit = values.get("max_position_embeddings", Glm5Config.max_position_embeddings)
        rope.setdefault("original_max_position_embeddings", values.get("original_max_position_embeddings", limit))
    if rope["rope_type"] == "default":  # the other keys mean nothing to it, there as here
        rope = {key: rope[key] for key in ("rope_theta", "rope_type")}
    return {key: value for key, value in rope.items() if value is not None}
