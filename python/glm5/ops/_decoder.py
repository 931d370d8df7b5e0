"""What a decoder layer computes around its attention, in three calls instead of thirty. Not public: for ``glm5.model``.

A decode step's calls are so small that what lies between them is a good part of it. The bits are those of the public ops
called one after the other; there are no gradients, and no float64.
"""

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._register import compiled, fake, not_differentiable

# x -> (latent queries [T, heads, kv + rope], latent rows [T, kv + rope], the indexer's q, k and weights): norms,
# projections, rotations and the absorption of the keys' up-projection. Without an indexer its weights are None and its
# results empty.
decoder_inputs = compiled("decoder_inputs")
# attended [T, heads, kv] -> [T, H]: the values' up-projection and the output projection.
decoder_output = compiled("decoder_output")
# x -> down(silu(gate(x)) * up(x)).
decoder_mlp = compiled("decoder_mlp")


@fake("decoder_inputs", x="bfloat16/float32 [T, H]", q_norm="x [q]", kv_norm="x [kv]", cos="float32 [P, half]")
def _(
    x, q_a, q_a_bias, q_norm, q_b, kv_a, kv_a_bias, kv_norm, kv_b, heads, nope, eps, cos, sin, positions,
    index_q, index_k, index_norm, index_norm_bias, index_weights, index_scale,
):  # fmt: skip
    tokens, wide = x.shape[0], kv_norm.shape[0] + 2 * cos.shape[1]
    index_heads, index_dim = (0, 0) if index_q is None else (index_weights.shape[0], index_norm.shape[0])
    return (
        x.new_empty(tokens, heads, wide),
        x.new_empty(tokens, wide),
        x.new_empty(tokens, index_heads, index_dim),
        x.new_empty(tokens, index_dim),
        cos.new_empty(tokens, index_heads),
    )


@fake("decoder_output", attended="bfloat16/float32 [T, heads, kv]", o="attended [H, V]")
def _(attended, kv_b, nope, o, o_bias):
    return attended.new_empty(attended.shape[0], o.shape[0])


@fake("decoder_mlp", x="bfloat16/float32 [T, H]", down="x [O, I]")
def _(x, gate, up, down):
    return x.new_empty(x.shape[0], down.shape[0])


not_differentiable("decoder_inputs", "decoder_output", "decoder_mlp")
