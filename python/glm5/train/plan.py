"""What a recipe would take: parameters, operations, tokens, and memory a rank for a layout. Arithmetic alone, no torch.

glm5 itself trains in one process, the layout of ones. Other layouts say what a cluster would hold, by these rules:

* pp: consecutive layers a stage, as even as can be, the first stages after the embedding's taking what is left; the head
  stands on the last stage and the MTP block, with a copy of the embedding, on the one before it (GLM-5 report, section 2.4).
* tp: attention by heads, MLPs and shared experts by width, embedding and head by vocabulary, activations by position; latent
  projections, indexers, routers and norms on every rank.
* ep: routed experts over the dp * cp * tp ranks of a pipeline stage; each expert is on dp * cp * tp / ep of them.
* cp: the positions of a pack over so many ranks.
* Optimizer states (masters, Muon's momentum, AdamW's moments) are divided among the ranks that hold the same weights, and so
  are gradients (the report's pipeline ZeRO-2), beside which there are two buffers of one layer's whole gradient.
"""

import difflib
from dataclasses import dataclass, fields

from glm5.model.config import Glm5Config
from glm5.recipes import Recipe, RecipeError
from glm5.train.counts import OPTIMIZER, active_parameters, added, layer_parameters, parameters, stage_token_flops
from glm5.train.stages import stage_of

# Of tensors that are divided over tp, and over ep.
_TP = ("embedding", "head", "attention heads", "dense MLPs", "shared experts", "MTP projection")
_EP = ("routed experts",)
_BYTES = {"float32": 4, "bfloat16": 2}
_LARGE = 10**10  # parameters, from which on the layout of ones is not what one asks about


@dataclass(frozen=True)
class Layout:
    """Ranks in every direction: data, tensor, pipeline, expert, context. ep lies within dp * cp * tp."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    cp: int = 1

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """From ``dp=16,tp=2``; what is not named is 1.

        Raises:
            RecipeError: an unknown or repeated name, or something else than an integer above 0.
        """
        known, found = [f.name for f in fields(cls)], {}
        for part in filter(None, text.split(",")):
            name, separator, value = (piece.strip() for piece in part.partition("="))
            if name not in known or name in found or not separator:
                raise RecipeError(f"--layout {text}: {part!r} is none of {'=, '.join(known)}=, each at most once")
            if not (value.isascii() and value.isdigit()) or int(value) < 1:
                raise RecipeError(f"--layout {text}: {name} is {value!r}, want an integer >= 1")
            found[name] = int(value)
        return cls(**found)

    @classmethod
    def default(cls, config: Glm5Config) -> "Layout":
        """One rank, which is what glm5 trains on; for a model that no machine holds, 2048 (our choice)."""
        if sum(parameters(config).values()) < _LARGE:
            return cls()
        return cls(dp=16, tp=4, pp=8, ep=64, cp=4)

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp * self.tp * self.cp

    def check(self, config: Glm5Config) -> None:
        """Raises RecipeError where the model cannot be divided so."""
        c = config
        widths = {
            "num_attention_heads": c.num_attention_heads,
            "intermediate_size": c.intermediate_size,
            "moe_intermediate_size": c.moe_intermediate_size,
            "hidden_size": c.hidden_size,
            "vocab_size": c.vocab_size,
        }
        for name, width in widths.items():
            if width % self.tp:
                raise RecipeError(f"--layout: tp={self.tp} does not divide {name}, {width}")
        if c.n_routed_experts % self.ep:
            raise RecipeError(f"--layout: ep={self.ep} does not divide n_routed_experts, {c.n_routed_experts}")
        if self.stage_ranks % self.ep:
            raise RecipeError(
                f"--layout: ep={self.ep} does not divide dp * tp * cp, {self.stage_ranks}: experts lie within these ranks"
            )
        if self.pp > c.num_hidden_layers:
            raise RecipeError(f"--layout: pp={self.pp} is more than num_hidden_layers, {c.num_hidden_layers}")

    def warnings(self, config: Glm5Config, recipe: Recipe) -> list[str]:
        """What works but leaves ranks idle or uneven."""
        found = []
        if config.num_hidden_layers % self.pp:
            found.append(f"pp={self.pp} does not divide {config.num_hidden_layers} layers: stages differ by one")
        for name, stage in recipe.stages.items():
            if stage.packs_per_step % self.dp:
                idle = -stage.packs_per_step % self.dp
                found.append(
                    f"{name}: dp={self.dp} does not divide {stage.packs_per_step} packs a step: {idle} ranks idle at its end"
                )
            if stage.sequence_length % (self.cp * self.tp):
                found.append(f"{name}: cp * tp = {self.cp * self.tp} does not divide length {stage.sequence_length}")
        return found

    def layers(self, config: Glm5Config) -> list[range]:
        """The decoder layers of each pipeline stage."""
        least, more = divmod(config.num_hidden_layers, self.pp)
        stages, first = [], 0
        for stage in range(self.pp):
            count = least + (1 <= stage <= more)
            stages.append(range(first, first + count))
            first += count
        return stages

    def mtp_stage(self) -> int:
        return max(self.pp - 2, 0)

    def __str__(self):
        return ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


def stage_parameters(config: Glm5Config, layout: Layout) -> list[dict[str, int]]:
    """Parameters of each pipeline stage by kind, before they are divided over tp and ep."""
    stages = []
    for stage, layers in enumerate(layout.layers(config)):
        counts = [layer_parameters(config, i) for i in layers]
        has_mtp = config.num_nextn_predict_layers and stage == layout.mtp_stage()
        if has_mtp:
            counts.append(layer_parameters(config, config.num_hidden_layers))
        edge = config.vocab_size * config.hidden_size
        if stage == 0 or has_mtp:
            counts.append({"embedding": edge})
        if stage == layout.pp - 1:
            counts.append({"norms and biases": config.hidden_size})
            if not config.tie_word_embeddings:
                counts.append({"head": edge})
            elif layout.pp > 1 and not has_mtp:  # a copy of the embedding
                counts.append({"embedding": edge})
        stages.append(added(counts))
    return stages


def held(kinds: dict[str, int], layout: Layout) -> dict[str, float]:
    """Parameters that one rank holds of a pipeline stage's."""
    divisor = dict.fromkeys(_TP, layout.tp) | dict.fromkeys(_EP, layout.ep)
    return {kind: count / divisor.get(kind, 1) for kind, count in kinds.items()}


def copies(kind: str, layout: Layout) -> int:
    """Ranks of a pipeline stage that hold the same weights of a kind, and divide gradients and states among them."""
    if kind in _EP:
        return layout.stage_ranks // layout.ep
    return layout.dp * layout.cp * (1 if kind in _TP else layout.tp)


def learning(kind: str, attention: str, indexer: str) -> bool:
    """Whether a stage with this attention and this KL of the indexers trains parameters of a kind."""
    if indexer == "warmup":
        return kind == "indexers"
    return OPTIMIZER[kind] is not None and (kind != "indexers" or indexer == "sparse")


def memory(config: Glm5Config, layout: Layout, dtype: str, attention: str, indexer: str) -> dict[str, float]:
    """Bytes on the rank that holds most, without activations: weights, gradients, masters, momentum, moments."""
    ranks = [_states(config, stage, layout, dtype, attention, indexer) for stage in range(layout.pp)]
    return max(ranks, key=lambda rank: sum(rank.values()))


def _states(config, stage: int, layout: Layout, dtype: str, attention: str, indexer: str) -> dict[str, float]:
    kinds = held(stage_parameters(config, layout)[stage], layout)
    size = _BYTES[dtype]
    found = dict.fromkeys(("weights", "gradients", "masters", "momentum", "moments"), 0.0)
    for kind, count in kinds.items():
        found["weights"] += count * (4 if kind == "router biases" else size)
        if not learning(kind, attention, indexer):
            continue
        share = count / copies(kind, layout)
        muon = OPTIMIZER[kind] == "muon"
        # one process keeps gradients as the weights are; a sum over many micro-batches and ranks is float32
        found["gradients"] += share * (size if layout.ranks == 1 else 4)
        found["masters"] += share * (4 if muon or size < 4 else 0)  # a float32 parameter is AdamW's master itself
        found["momentum" if muon else "moments"] += share * (4 if muon else 8)
    if layout.ranks > 1:
        largest = max(
            sum(n for kind, n in held(layer_parameters(config, i), layout).items() if learning(kind, attention, indexer))
            for i in layout.layers(config)[stage]
        )
        found["gradients"] += 2 * 4 * largest
    return found


def layer_activations(config: Glm5Config, layer: int, attention: str, size: int) -> float:
    """Bytes a token that a layer's backward needs of its forward when nothing is computed again. An estimate: what the ops
    here save, without the odd index and statistic."""
    c, heads = config, config.num_attention_heads
    kinds = layer_parameters(c, layer)
    latents = 2 * (c.q_lora_rank + c.latent_dim)
    if attention == "dense":  # q, k and v per head, the output
        wide = heads * (2 * c.qk_head_dim + 2 * c.v_head_dim)
    else:  # queries before and on the latent, the output on the latent and per head
        wide = heads * (c.qk_nope_head_dim + c.latent_dim + c.kv_lora_rank + c.v_head_dim)
    elements = 4 * c.hidden_size + latents + wide
    if "routed experts" in kinds:
        routed, shared = c.num_experts_per_tok, c.n_shared_experts
        elements += routed * (2 * c.hidden_size + 3 * c.moe_intermediate_size) + shared * 3 * c.moe_intermediate_size
    else:
        elements += 3 * c.intermediate_size
    if "MTP projection" in kinds:
        elements += 4 * c.hidden_size
    if attention == "sparse" and "indexers" in kinds:
        elements += c.index_n_heads * c.index_head_dim + c.index_head_dim
    return size * elements + (4 * c.index_topk if attention == "sparse" else 0)


def activations(config: Glm5Config, layout: Layout, stage, dtype: str) -> tuple[float, float]:
    """(everything kept, every layer computed again from its input): bytes on the rank that holds most.

    A rank works on one pack at a time where there is a pipeline, and stage s of it has pp - s packs under way; without one,
    on its share of a micro-batch. The head is computed in parts and keeps its inputs alone.
    """
    recipe, form, size = stage.recipe, stage.form, _BYTES[dtype]
    per_rank = -(-recipe.packs_per_step // layout.dp)
    at_once = 1 if layout.pp > 1 else -(-per_rank // getattr(recipe, "micro_batches", 1))
    tokens = at_once * recipe.sequence_length / (layout.cp * layout.tp)
    indexers_alone, depth = stage.indexer == "warmup", recipe.mtp_depth if config.num_nextn_predict_layers else 0
    most = (0.0, 0.0)
    for s, layers in enumerate(layout.layers(config)):
        unrolled = [config.num_hidden_layers] * depth if s == layout.mtp_stage() else []
        under_way = min(layout.pp - s, per_rank)
        each = [layer_activations(config, i, form.attention, size) for i in [*layers, *unrolled]]
        inputs = size * config.hidden_size * len(each)
        if indexers_alone:  # frozen layers keep nothing; an indexer what its own backward needs
            width = config.hidden_size + config.q_lora_rank + 2 * config.index_n_heads * config.index_head_dim
            whole = again = tokens * under_way * size * width * len(each)
        else:
            heads = size * config.hidden_size * (1 + depth) if s == layout.pp - 1 else 0
            whole = tokens * under_way * (sum(each) + heads)
            again = tokens * (under_way * (inputs + heads) + max(each))
        most = max(most[0], whole), max(most[1], again)
    return most


def resident_bytes(recipe: Recipe) -> float:
    """Least memory in which one process could train the recipe: weights and states, no activations."""
    config = config_of(recipe)
    forms = [stage_of(recipe, name) for name in recipe.stages]
    return max(sum(memory(config, Layout(), recipe.model.dtype, s.form.attention, s.indexer).values()) for s in forms)


def config_of(recipe: Recipe) -> Glm5Config:
    """The recipe's model configuration.

    Raises:
        RecipeError: the recipe overrides a field that there is not.
        ValueError: no such preset, or a field has an impossible value.
    """
    config = Glm5Config.preset(recipe.model.preset)
    for key in recipe.model.overrides:
        if key not in vars(config):
            near = difflib.get_close_matches(key, vars(config), n=1, cutoff=0)[0]
            raise RecipeError(f"unknown key model.overrides.{key}; did you mean model.overrides.{near}?")
    return Glm5Config.preset(recipe.model.preset, **recipe.model.overrides)


# ---- the plan as text


def plan(recipe: Recipe, layout: Layout | None = None) -> str:
    """What the recipe would take, as lines of text.

    Raises:
        RecipeError: the layout does not fit the model, or the recipe has a field that the model does not.
    """
    config = config_of(recipe)
    layout = layout or Layout.default(config)
    layout.check(config)
    parts = [_parameters_text(config), _stages_text(config, recipe), _memory_text(config, recipe, layout)]
    warnings = layout.warnings(config, recipe)
    parts += ["\n".join(f"warning: {text}" for text in warnings)] if warnings else []
    return "\n\n".join(parts) + "\n"


def _parameters_text(config: Glm5Config) -> str:
    counts = parameters(config)
    lines = [f"{'parameters':<20}{sum(counts.values()):>20,}"]
    if config.num_nextn_predict_layers:
        lines.append(f"{'  without MTP':<20}{sum(parameters(config, include_mtp=False).values()):>20,}")
    lines.append(f"{'  active a token':<20}{active_parameters(config):>20,}  (without embedding, head and MTP)")
    lines += [f"  {kind:<18}{count:>20,}" for kind, count in counts.items()]
    full = config.layer_indexers.count("full")
    latent, keys = config.num_hidden_layers * config.latent_dim * 2, full * config.index_head_dim * 2
    lines.append(f"cache a token, bf16: {latent:,} B of latent rows, {keys:,} B of indexer keys")
    return "\n".join(lines)


_PARTS = ("projections", "experts", "head", "dense attention", "sparse attention", "indexer")
_HEADS = ("projections", "experts", "head", "dense attn", "sparse attn", "indexer")


def _stages_text(config: Glm5Config, recipe: Recipe) -> str:
    heads = "".join(f"{name:>13}" for name in _HEADS)
    lines = [
        "floating-point operations of training, a token by part (forward and backward, each pack one document):",
        f"{'stage':<16}{'steps':>9}{'length':>8}{'tokens':>10}{heads}{'in all':>11}{'of the stage':>14}",
    ]
    tokens = operations = 0
    for name, recipe_stage in recipe.stages.items():
        stage = stage_of(recipe, name)
        flops = stage_token_flops(config, recipe_stage, stage.form.attention, stage.indexer)
        count, each = recipe_stage.steps * recipe_stage.tokens_per_step, sum(flops.values())
        tokens, operations = tokens + count, operations + count * each
        parts = "".join(f"{_short(flops.get(part, 0)):>13}" for part in _PARTS)
        lines.append(
            f"{name:<16}{recipe_stage.steps:>9,}{recipe_stage.sequence_length:>8}{_short(count):>10}{parts}"
            f"{_short(each):>11}{count * each:>14.3g}"
        )
    lines.append(f"{'in all':<33}{_short(tokens):>10}{operations:>{6 * 13 + 25}.3g}")
    return "\n".join(lines)


def _memory_text(config: Glm5Config, recipe: Recipe, layout: Layout) -> str:
    lines = [
        f"memory of the rank that holds most, layout {layout}: {layout.ranks:,} rank{'s' * (layout.ranks > 1)}",
        f"{'stage':<16}{'weights':>10}{'gradients':>10}{'masters':>10}{'momentum':>10}{'moments':>10}{'states':>10}"
        f"{'+ all activations':>19}{'+ inputs of layers':>20}",
    ]
    for name in recipe.stages:
        stage = stage_of(recipe, name)
        parts = memory(config, layout, recipe.model.dtype, stage.form.attention, stage.indexer)
        whole, again = activations(config, layout, stage, recipe.model.dtype)
        states = sum(parts.values())
        shown = "".join(f"{_short(part) + 'B':>10}" for part in [*parts.values(), states])
        lines.append(f"{name:<16}{shown}{_short(states + whole) + 'B':>19}{_short(states + again) + 'B':>20}")
    return "\n".join(lines)


def _short(number: float) -> str:
    """Four digits and a decimal prefix."""
    if not number:
        return "0 "
    for exponent, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**exponent:
            return f"{number / 10**exponent:.4g} {prefix}"
    return f"{number:.4g} "
