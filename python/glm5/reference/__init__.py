"""The specification: every op of ``glm5.ops`` in plain, dense PyTorch, of the same name and signature.

Slow on purpose and free of tricks; any float dtype, float64 included. Kernel authors test against these.
"""

from glm5.reference.cache import indexer_cache_write, latent_cache_read, latent_cache_write
from glm5.reference.fp8_gemm import fp8_gemm, fp8_grouped_gemm
from glm5.reference.hadamard import rotate_hadamard
from glm5.reference.indexer_kl import indexer_kl_loss, lightning_indexer_kl
from glm5.reference.lightning_indexer import lightning_indexer_logits, lightning_indexer_topk, lightning_indexer_topk_paged
from glm5.reference.lightning_indexer_int8 import lightning_indexer_logits_int8, lightning_indexer_topk_int8
from glm5.reference.linear import batched_linear, grouped_linear, linear
from glm5.reference.mla_attention import mla_attention, mla_attention_paged, mla_attn_target
from glm5.reference.moe import moe_dispatch_layout, moe_permute, moe_router, moe_unpermute
from glm5.reference.norm import layer_norm, rms_norm
from glm5.reference.quantize import (
    dequantize_fp8,
    dequantize_int4,
    fake_quantize_int4,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from glm5.reference.rope import rope
from glm5.reference.silu_mul import silu_mul, silu_mul_quantize
from glm5.reference.sparse_mla import sparse_mla, sparse_mla_attn_target, sparse_mla_paged
from glm5.reference.token_logprobs import token_logprobs
from glm5.reference.topk_indices import topk_indices
from glm5.reference.w4a8_gemm import w4a8_gemm, w4a8_grouped_gemm, w4a8_prepack, w4a8_unpack

__all__ = [
    "batched_linear",
    "dequantize_fp8",
    "dequantize_int4",
    "fake_quantize_int4",
    "fp8_gemm",
    "fp8_grouped_gemm",
    "grouped_linear",
    "indexer_cache_write",
    "indexer_kl_loss",
    "latent_cache_read",
    "latent_cache_write",
    "layer_norm",
    "lightning_indexer_kl",
    "lightning_indexer_logits",
    "lightning_indexer_logits_int8",
    "lightning_indexer_topk",
    "lightning_indexer_topk_int8",
    "lightning_indexer_topk_paged",
    "linear",
    "mla_attention",
    "mla_attention_paged",
    "mla_attn_target",
    "moe_dispatch_layout",
    "moe_permute",
    "moe_router",
    "moe_unpermute",
    "quantize_fp8",
    "quantize_int4",
    "quantize_int8",
    "rms_norm",
    "rope",
    "rotate_hadamard",
    "silu_mul",
    "silu_mul_quantize",
    "sparse_mla",
    "sparse_mla_attn_target",
    "sparse_mla_paged",
    "token_logprobs",
    "topk_indices",
    "w4a8_gemm",
    "w4a8_grouped_gemm",
    "w4a8_prepack",
    "w4a8_unpack",
]
