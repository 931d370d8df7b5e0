"""The model a second time, from its published description alone: eager float64 PyTorch over one sequence, no glm5 code.

Follows Transformers 5.23's ``modeling_glm_moe_dsa.py`` in its choices: keys and values expanded per head, a dense mask of
the selected keys, rotary pairs taken interleaved and put out half by half. MTP follows DeepSeek-V3 (2412.19437, 2.2).
"""

import torch
from torch.nn import functional as F


class Oracle:
    """logits of ``Glm5ForCausalLM`` with the given config and state dict; ``sparse`` masks what the indexer leaves out."""

    def __init__(self, config, state: dict[str, torch.Tensor], sparse: bool):
        self.c, self.sparse = config, sparse
        self.w = {name: t.double() for name, t in state.items()}

    def logits(self, ids: torch.Tensor, mtp_depth: int) -> list[torch.Tensor]:
        """ids [T] -> logits [T, V] of the main head, then of each MTP depth (rows whose input tokens exist)."""
        c, time = self.c, len(ids)
        frequencies = c.rope_theta ** (-torch.arange(0, c.qk_rope_head_dim, 2).double() / c.qk_rope_head_dim)
        angles = torch.arange(time).double()[:, None] * frequencies
        self.cos, self.sin = angles.cos(), angles.sin()
        x = self.w["model.embed_tokens.weight"][ids]
        for i in range(c.num_hidden_layers):
            x = self.block(x, i)
        x = self.rms(x, "model.norm.weight", c.rms_norm_eps)
        head = self.w["lm_head.weight"]
        out = [x @ head.T]
        p = f"model.layers.{c.num_hidden_layers}."
        for d in range(1, mtp_depth + 1):
            x = x[: time - d]
            e = self.rms(self.w["model.embed_tokens.weight"][ids[d:]], p + "enorm.weight", c.rms_norm_eps)
            h = self.rms(x, p + "hnorm.weight", c.rms_norm_eps)
            x = self.block(torch.cat([e, h], -1) @ self.w[p + "eh_proj.weight"].T, c.num_hidden_layers)
            out.append(self.rms(x, p + "shared_head.norm.weight", c.rms_norm_eps) @ head.T)
        return out

    def rms(self, x, name, eps):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.w[name]

    def rotate(self, x):
        """x [T, ..., rope]: interleaved in, half-split out."""
        shape = (len(x),) + (1,) * (x.dim() - 2) + (-1,)
        cos, sin = self.cos[: len(x)].view(shape), self.sin[: len(x)].view(shape)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1)

    def block(self, x, i):
        c, p = self.c, f"model.layers.{i}."
        x = x + self.attention(self.rms(x, p + "input_layernorm.weight", c.rms_norm_eps), i)
        h = self.rms(x, p + "post_attention_layernorm.weight", c.rms_norm_eps)
        return x + (self.swiglu(h, p + "mlp.") if i < c.first_k_dense_replace else self.moe(h, p + "mlp."))

    def swiglu(self, x, p):
        gate, up = x @ self.w[p + "gate_proj.weight"].T, x @ self.w[p + "up_proj.weight"].T
        return (F.silu(gate) * up) @ self.w[p + "down_proj.weight"].T

    def moe(self, x, p):
        c = self.c
        scores = torch.sigmoid(x @ self.w[p + "gate.weight"].T)
        chosen = (scores + self.w[p + "gate.e_score_correction_bias"]).topk(c.num_experts_per_tok).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        rows = []
        for t in range(len(x)):
            row = 0
            for e, weight in zip(chosen[t].tolist(), weights[t], strict=True):
                gate, up = (self.w[p + "experts.gate_up_proj"][e] @ x[t]).chunk(2)
                row = row + weight * (self.w[p + "experts.down_proj"][e] @ (F.silu(gate) * up))
            rows.append(row)
        return torch.stack(rows) + self.swiglu(x, p + "shared_experts.")

    def attention(self, x, i):
        c, p, time = self.c, f"model.layers.{i}.self_attn.", len(x)
        heads, nope, rope = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
        q_latent = self.rms(x @ self.w[p + "q_a_proj.weight"].T, p + "q_a_layernorm.weight", 1e-6)
        q = (q_latent @ self.w[p + "q_b_proj.weight"].T).view(time, heads, nope + rope)
        q = torch.cat([q[..., :nope], self.rotate(q[..., nope:])], -1)
        kv = x @ self.w[p + "kv_a_proj_with_mqa.weight"].T
        k_rope = self.rotate(kv[:, c.kv_lora_rank :])[:, None].expand(time, heads, rope)
        latent = self.rms(kv[:, : c.kv_lora_rank], p + "kv_a_layernorm.weight", 1e-6)
        kv = (latent @ self.w[p + "kv_b_proj.weight"].T).view(time, heads, nope + c.v_head_dim)
        k, v = torch.cat([kv[..., :nope], k_rope], -1), kv[..., nope:]
        scores = torch.einsum("qhd,khd->hqk", q, k) / (nope + rope) ** 0.5
        mask = torch.ones(time, time, dtype=torch.bool).tril()
        if self.sparse:
            mask &= self.selected(x, q_latent, p + "indexer.")
        scores = scores.masked_fill(~mask, float("-inf"))
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        return out.reshape(time, -1) @ self.w[p + "o_proj.weight"].T

    def selected(self, x, q_latent, p):
        """bool [T, T]: the index_topk best-scored visible keys of each row."""
        c, time, rope = self.c, len(x), self.c.qk_rope_head_dim
        q = (q_latent @ self.w[p + "wq_b.weight"].T).view(time, c.index_n_heads, c.index_head_dim)
        q = torch.cat([self.rotate(q[..., :rope]), q[..., rope:]], -1)
        k = F.layer_norm(
            x @ self.w[p + "wk.weight"].T, (c.index_head_dim,), self.w[p + "k_norm.weight"], self.w[p + "k_norm.bias"], 1e-6
        )
        k = torch.cat([self.rotate(k[:, :rope]), k[:, rope:]], -1)
        weights = x @ self.w[p + "weights_proj.weight"].T * c.index_n_heads**-0.5
        scores = torch.einsum("qhk,qh->qk", F.relu(torch.einsum("qhd,kd->qhk", q, k) * c.index_head_dim**-0.5), weights)
        visible = torch.ones(time, time, dtype=torch.bool).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, : c.index_topk]  # ties are common: ReLU
        return torch.zeros_like(visible).scatter(1, best, True) & visible
