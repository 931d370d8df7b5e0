"""Which parameter is trained by which optimizer in which stage, and how Muon sees it as matrices."""

from contextlib import contextmanager

import torch

from glm5.train.optim import AdamW, Muon, Split
from glm5.train.stages import Stage


def indexer_names(model) -> set[str]:
    """Names of the parameters that ``model.indexer_parameters()`` yields."""
    ids = {id(p) for p in model.indexer_parameters()}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def muon_splits(model) -> dict[str, Split]:
    """Muon Split: query and key-value up-projections per head, gate and up of every expert as matrices of their own."""
    c = model.config
    splits: dict[str, Split] = {}
    for name, _ in model.named_parameters():
        if name.endswith("q_b_proj.weight"):
            splits[name] = lambda t: [t.view(c.num_attention_heads, -1, t.shape[-1])]
        elif name.endswith("kv_b_proj.weight"):
            splits[name] = lambda t: list(
                t.view(c.num_attention_heads, -1, t.shape[-1]).split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
            )
        elif name.endswith("experts.gate_up_proj"):
            splits[name] = lambda t: list(t.chunk(2, dim=-2))
        elif name.endswith("experts.down_proj"):
            splits[name] = lambda t: [t]
    return splits


def is_muon(name: str, parameter: torch.Tensor) -> bool:
    """Muon takes the matrices inside the network; embeddings, output head, router, norms and biases are AdamW's."""
    on_the_edge = any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate."))
    return parameter.dim() >= 2 and not on_the_edge


def make_optimizers(model, stage: Stage) -> dict[str, tuple[Muon | AdamW, float]]:
    """Optimizers of a stage with their peak learning rates; everything they do not hold is frozen."""
    indexer, recipe = indexer_names(model), stage.recipe
    held = {n: p for n, p in model.named_parameters() if stage.learns(n in indexer)}
    for name, p in model.named_parameters():
        p.requires_grad_(name in held)
        p.grad = None

    decay, ema = recipe.weight_decay, recipe.ema
    body = {n: p for n, p in held.items() if n not in indexer}
    muon = {n: p for n, p in body.items() if is_muon(n, p)}
    optimizers: dict[str, tuple[Muon | AdamW, float]] = {
        "muon": (Muon(muon, muon_splits(model), decay, ema=ema), recipe.muon_lr),
        "adamw": (AdamW({n: p for n, p in body.items() if n not in muon}, decay, ema=ema), recipe.adamw_lr),
        "indexer": (AdamW({n: p for n, p in held.items() if n in indexer}, decay, ema=ema), recipe.indexer_lr),
    }
    return {name: (o, lr) for name, (o, lr) in optimizers.items() if o.parameters}


@contextmanager
def averaged(model, optimizers: dict[str, tuple[Muon | AdamW, float]]):
    """Within the block the model's trained parameters have the values of their running means (``ema``)."""
    parameters = dict(model.named_parameters())
    means = {n: mean for optimizer, _ in optimizers.values() for n, mean in optimizer.averages().items()}
    own = {n: parameters[n].detach().clone() for n in means}
    try:
        put(parameters, means)
        yield
    finally:
        put(parameters, own)


@torch.no_grad()
def put(parameters: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    """Copies `values` into the parameters of the same names."""
    for name, value in values.items():
        parameters[name].copy_(value)
