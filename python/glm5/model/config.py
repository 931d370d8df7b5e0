"""The model's shape: field names of Hugging Face's ``glm_moe_dsa``, presets, and checks that speak in those names."""

from dataclasses import asdict, dataclass, field, fields, replace
from math import log


@dataclass(frozen=True)
class Glm5Config:
    """Everything that decides which parameters exist and what the forward computes. The defaults are GLM-5's.

    ``indexer_types`` is one of "full" or "shared" a layer; None derives it from ``index_topk_freq`` (f) and
    ``index_skip_topk_offset`` (o): layer i is full iff max(i - o + 1, 0) % f == 0. A shared layer has no indexer and reuses
    the indices of the nearest earlier full layer.

    ``mlp_layer_types`` is one of "dense" or "sparse" (a mixture of experts) a layer; None makes the first
    ``first_k_dense_replace`` dense. The MTP layer is always sparse.

    ``rope_parameters`` has ``rope_theta`` and ``rope_type``: "default", "linear" (with ``factor``) or "yarn" (2309.00071,
    DeepSeek's mscale; with ``factor`` and ``original_max_position_embeddings``, and where wanted ``attention_factor``,
    ``beta_fast``, ``beta_slow``, ``mscale``, ``mscale_all_dim``, ``truncate``).

    Raises ValueError naming the field when a value is impossible.
    """

    vocab_size: int = 154880
    hidden_size: int = 6144
    intermediate_size: int = 12288
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 78
    num_nextn_predict_layers: int = 1
    num_attention_heads: int = 64
    num_key_value_heads: int = 64
    q_lora_rank: int = 2048
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 192
    qk_rope_head_dim: int = 64
    v_head_dim: int = 256
    attention_bias: bool = False
    index_n_heads: int = 32
    index_head_dim: int = 128
    index_topk: int = 2048
    index_topk_freq: int = 1
    index_skip_topk_offset: int = 2
    indexer_types: tuple[str, ...] | None = None
    index_share_for_mtp_iteration: bool = False
    first_k_dense_replace: int = 3
    mlp_layer_types: tuple[str, ...] | None = None
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    max_position_embeddings: int = 202752
    rope_parameters: dict = field(default_factory=lambda: {"rope_theta": 1e6, "rope_type": "default"})
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = (154820, 154827, 154829)

    def __post_init__(self):
        for name in ("indexer_types", "mlp_layer_types", "eos_token_id"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in _POSITIVE + _NOT_NEGATIVE:
            value, least = getattr(self, name), 1 if name in _POSITIVE else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Glm5Config: {name} is {value!r}, want an integer >= {least}")
        for f in fields(self):
            kind, wanted = _KINDS.get(f.type, (object, ""))
            self._want(isinstance(getattr(self, f.name), kind), f.name, wanted)
        self._want(self.num_key_value_heads == self.num_attention_heads, "num_key_value_heads", "num_attention_heads")
        self._want(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "an even number")
        self._want(
            self.index_head_dim >= self.qk_rope_head_dim,
            "index_head_dim",
            f"at least qk_rope_head_dim ({self.qk_rope_head_dim}): the rotated dimensions come first in it",
        )
        self._want(self.first_k_dense_replace <= self.num_hidden_layers, "first_k_dense_replace", "<= num_hidden_layers")
        self._want(self.num_nextn_predict_layers <= 1, "num_nextn_predict_layers", "0 or 1 (one layer, unrolled)")
        self._want(self.num_experts_per_tok <= self.n_routed_experts, "num_experts_per_tok", "<= n_routed_experts")
        self._want(self.n_routed_experts % self.n_group == 0, "n_group", "a divisor of n_routed_experts")
        self._want(self.topk_group <= self.n_group, "topk_group", "<= n_group")
        self._want(
            self.num_experts_per_tok <= self.topk_group * (self.n_routed_experts // self.n_group),
            "num_experts_per_tok",
            "<= the experts in topk_group groups",
        )
        self._want(self.hidden_act == "silu", "hidden_act", "'silu'")
        self._want(self.rms_norm_eps > 0, "rms_norm_eps", "> 0")
        self._want(self.initializer_range > 0, "initializer_range", "> 0")
        self._check_rope()
        if self.indexer_types is not None:
            self._want(
                len(self.indexer_types) == self.num_hidden_layers and set(self.indexer_types) <= {"full", "shared"},
                "indexer_types",
                "'full' or 'shared' for each of num_hidden_layers layers",
            )
        if self.mlp_layer_types is not None:
            self._want(
                len(self.mlp_layer_types) == self.num_hidden_layers and set(self.mlp_layer_types) <= {"dense", "sparse"},
                "mlp_layer_types",
                "'dense' or 'sparse' for each of num_hidden_layers layers",
            )
        self._want(self.layer_indexers[0] == "full", "indexer_types", "a first layer that is 'full'")

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        kind = rope.get("rope_type", "default")
        self._want(kind in _ROPE_KEYS, "rope_parameters", f"a rope_type of {', '.join(_ROPE_KEYS)}")
        needed, optional = _ROPE_KEYS[kind]
        missing = [k for k in ("rope_theta", *needed) if not isinstance(rope.get(k), int | float) or rope[k] <= 0]
        self._want(not missing, "rope_parameters", f"a number > 0 for {', '.join(missing)} with rope_type {kind!r}")
        unknown = sorted(set(rope) - {"rope_type", "rope_theta", *needed, *optional})
        self._want(not unknown, "rope_parameters", f"no {', '.join(unknown)} with rope_type {kind!r}")

    def _want(self, holds: bool, name: str, wanted: str) -> None:
        if not holds:
            raise ValueError(f"Glm5Config: {name} is {getattr(self, name)!r}, want {wanted}")

    @property
    def layer_indexers(self) -> tuple[str, ...]:
        """ "full" or "shared" for each layer; the MTP layer is always full."""
        if self.indexer_types is not None:
            return self.indexer_types
        freq, offset = self.index_topk_freq, self.index_skip_topk_offset
        return tuple("shared" if max(i - offset + 1, 0) % freq else "full" for i in range(self.num_hidden_layers))

    @property
    def layer_mlps(self) -> tuple[str, ...]:
        """ "dense" or "sparse" for each layer."""
        if self.mlp_layer_types is not None:
            return self.mlp_layer_types
        return tuple("dense" if i < self.first_k_dense_replace else "sparse" for i in range(self.num_hidden_layers))

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head: qk_nope_head_dim + qk_rope_head_dim."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of a cached latent row: kv_lora_rank + qk_rope_head_dim."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return float(self.rope_parameters["rope_theta"])

    @property
    def softmax_scale(self) -> float:
        """Factor on attention scores: qk_head_dim**-0.5, times mscale squared under yarn with mscale_all_dim."""
        rope = self.rope_parameters
        all_dim = rope.get("mscale_all_dim") if rope.get("rope_type", "default") != "default" else None
        return self.qk_head_dim**-0.5 * (yarn_mscale(rope["factor"], all_dim) ** 2 if all_dim else 1.0)

    def to_dict(self) -> dict:
        """The fields as JSON can hold them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "Glm5Config":
        """The reverse of ``to_dict``. Raises ValueError naming a key that is no field."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"Glm5Config: unknown field {unknown[0]!r}; the fields are {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **changes) -> "Glm5Config":
        """A named shape ("tiny", "small", "glm-5", "glm-5.2") with some fields changed.

        Raises ValueError naming the presets when there is none of that name.
        """
        if name not in _PRESETS:
            raise ValueError(f"Glm5Config.preset: no preset {name!r}, want one of {', '.join(_PRESETS)}")
        return replace(cls(**_PRESETS[name]), **changes)


# What a value of a field's type must be an instance of, and how to ask for it.
_KINDS = {float: ((float, int), "a number"), bool: (bool, "true or false"), str: (str, "a string"), dict: (dict, "a table")}


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """By how much yarn sharpens attention when it stretches the positions by ``factor``: 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


# rope_type -> (the keys it needs, the keys it may have), beside rope_theta.
_ROPE_KEYS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}

_POSITIVE = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim index_n_heads index_head_dim "
    "index_topk index_topk_freq n_routed_experts num_experts_per_tok n_group topk_group max_position_embeddings"
).split()
_NOT_NEGATIVE = "num_nextn_predict_layers first_k_dense_replace n_shared_experts index_skip_topk_offset".split()

# Bytes 0..255, then GLM's special tokens, rounded up to a multiple of 64.
_TINY = dict(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=384,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    # Few and slow rotary dimensions: with 16 at theta 1e4 attention stays so local that the last top-k keys hold half
    # of what it weighs most, and there is little for an indexer to find.
    qk_rope_head_dim=8,
    v_head_dim=32,
    index_n_heads=8,
    index_head_dim=32,
    index_topk=128,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=8192,
    rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    initializer_range=0.05,
    eos_token_id=None,
)

_PRESETS = {
    "tiny": _TINY,
    "small": _TINY
    | dict(
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=128,
        kv_lora_rank=128,
        n_routed_experts=16,
        max_position_embeddings=32768,
        initializer_range=0.04,
    ),
    "glm-5": {},
    "glm-5.2": dict(
        index_topk_freq=4,
        index_skip_topk_offset=3,
        index_share_for_mtp_iteration=True,
        max_position_embeddings=1048576,
        rope_parameters={"rope_theta": 8e6, "rope_type": "default"},
    ),
}
