"""Small models and flat batches for the model's tests."""

import torch

from glm5 import Glm5Config, Glm5ForCausalLM

FORMS = ("dense", "sparse")


# One dense and two MoE layers, odd enough to hit kernel tails; selects 16 keys.
SMALL = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=3,
    q_lora_rank=32,
    kv_lora_rank=40,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=24,
    index_n_heads=3,
    index_head_dim=32,
    index_topk=16,
    n_routed_experts=6,
    max_position_embeddings=2048,
)


def config(**changes) -> Glm5Config:
    return Glm5Config.preset("tiny", **(SMALL | {"initializer_range": 0.15} | changes))


def model(form: str = "dense", dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Glm5ForCausalLM:
    built = Glm5ForCausalLM(config(**changes), dtype=dtype, seed=seed)
    built.attention = form
    return built


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(seed))


def pack(*documents: torch.Tensor) -> dict[str, torch.Tensor]:
    """A flat batch of whole documents, one after the other."""
    lengths = [len(d) for d in documents]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    targets = [torch.cat([d[1:], torch.tensor([-100])]) for d in documents]
    return {
        "tokens": torch.cat(documents),
        "targets": torch.cat(targets),
        "positions": torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        "ks": torch.cat([torch.full((n,), s, dtype=torch.int32) for n, s in zip(lengths, starts, strict=True)]),
        "ke": torch.arange(1, sum(lengths) + 1, dtype=torch.int32),
    }
