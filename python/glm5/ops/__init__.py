"""The ops: one public function each, on the compiled kernels of the ``glm5`` torch library.

Each has a dense specification of the same name and signature in ``glm5.reference``. Inputs are read in any layout; outputs
are contiguous. Wrong shapes, dtypes and values raise ValueError that names the op and the argument, in eager and, as far as
no values are needed to see it, where a model is traced. Gradients exist once: a second derivative raises RuntimeError.
MemoryError names the op whose working memory could not be had.
"""

from glm5.ops import _decoder  # noqa: F401  (registers fake kernels)
from glm5.ops.cache import indexer_cache_write, latent_cache_read, latent_cache_write
from glm5.ops.fp8_gemm import fp8_gemm, fp8_grouped_gemm
from glm5.ops.hadamard import rotate_hadamard
from glm5.ops.indexer_kl import indexer_kl_loss, lightning_indexer_kl
from glm5.ops.lightning_indexer import lightning_indexer_logits, lightning_indexer_topk, lightning_indexer_topk_paged
from glm5.ops.lightning_indexer_int8 import lightning_indexer_logits_int8, lightning_indexer_topk_int8
from glm5.ops.linear import batched_linear, grouped_linear, linear
from glm5.ops.mla_attention import mla_attention, mla_attention_paged, mla_attn_target
from glm5.ops.moe import moe_dispatch_layout, moe_permute, moe_router, moe_unpermute
from glm5.ops.norm import layer_norm, rms_norm
from glm5.ops.quantize import (
    dequantize_fp8,
    dequantize_int4,
    fake_quantize_int4,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
)
from glm5.ops.rope import rope
from glm5.ops.silu_mul import silu_mul, silu_mul_quantize
from glm5.ops.sparse_mla import sparse_mla, sparse_mla_attn_target, sparse_mla_paged
from glm5.ops.token_logprobs import token_logprobs
from glm5.ops.topk_indices import topk_indices
from glm5.ops.w4a8_gemm import w4a8_gemm, w4a8_grouped_gemm, w4a8_prepack, w4a8_unpack

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
