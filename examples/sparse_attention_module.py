"""One op at a time: glm5.ops.sparse_mla in a plain nn.Module, compiled and trained.

Each query attends to the keys that a lightning indexer chose for it; one latent row serves every head as key and value.
"""

import torch
from torch import nn

from glm5 import ops


class SparseAttention(nn.Module):
    """x [tokens, dim] -> [tokens, dim], causal, over at most ``topk`` keys a query."""

    def __init__(self, dim: int = 64, heads: int = 4, latent: int = 32, topk: int = 16):
        super().__init__()
        self.heads, self.latent, self.topk = heads, latent, topk
        self.query = nn.Linear(dim, heads * latent, bias=False)
        self.key_value = nn.Linear(dim, latent, bias=False)
        self.out = nn.Linear(heads * latent, dim, bias=False)
        self.index_query = nn.Linear(dim, heads * latent, bias=False)
        self.index_key = nn.Linear(dim, latent, bias=False)
        self.index_weight = nn.Linear(dim, heads, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        first = torch.zeros(tokens, dtype=torch.int32)
        end = torch.arange(1, tokens + 1, dtype=torch.int32)
        indices, _ = ops.lightning_indexer_topk(
            self.index_query(x).view(tokens, self.heads, self.latent),
            self.index_key(x),
            None,
            self.index_weight(x).float(),
            first,
            end,
            self.topk,
        )
        q = self.query(x).view(tokens, self.heads, self.latent)
        attended, _ = ops.sparse_mla(q, self.key_value(x), indices, self.latent**-0.5, self.latent)
        return self.out(attended.flatten(1))


torch.manual_seed(0)
module = SparseAttention()
compiled = torch.compile(module, fullgraph=True, dynamic=True)
for tokens in (50, 77):
    x = torch.randn(tokens, 64)
    print(f"{tokens} tokens: compiled and plain differ by {(compiled(x) - module(x)).abs().max():.1e}")

x, target = torch.randn(100, 64), torch.randn(100, 64)
optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
for step in range(60):
    loss = (compiled(x) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
print(f"at the end: loss {loss.item():.3f}")
