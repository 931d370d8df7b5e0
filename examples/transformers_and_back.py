"""From a Transformers model to glm5 and back: the same numbers, training here, the weights returned, and the drop-in.

Run it whole (python examples/transformers_and_back.py) or cell by cell in an editor that knows "# %%".
Needs: pip install transformers
"""

# %% A model of Transformers. Yours would be GlmMoeDsaForCausalLM.from_pretrained("directory"); this one is small and random.
import tempfile
from pathlib import Path

import torch
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from glm5 import Glm5ForCausalLM

torch.manual_seed(0)
config = GlmMoeDsaConfig(
    vocab_size=320, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=3,
    first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, index_n_heads=8, index_head_dim=32, index_topk=256,
    n_routed_experts=8, num_experts_per_tok=2, initializer_range=0.05, eos_token_id=None,
)  # fmt: skip
theirs = GlmMoeDsaForCausalLM(config).eval()
folder = Path(tempfile.mkdtemp())
theirs.save_pretrained(folder / "theirs")

# %% The same weights here, and the same numbers. Attention is sparse, as Transformers' is.
ours = Glm5ForCausalLM.from_pretrained(folder / "theirs")
ids = torch.randint(0, 256, (2, 200))
with torch.no_grad():
    want, got = theirs(ids).logits, ours(ids).logits
print(f"largest |logit| {want.abs().max():.3f}, largest difference {(got - want).abs().max():.1e}")

# %% Training here. `losses` has MTP and the indexer's loss as well; `forward` takes Transformers' arguments.
optimizer = torch.optim.AdamW(ours.backbone_parameters(), lr=1e-3)
text = torch.tensor(list(Path(__file__).read_bytes())[:1600]).view(8, 200)
for step in range(20):
    loss = ours(text, labels=text).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 4:
        print(f"step {step + 1}: {loss.item():.3f} nats a byte")

# %% The weights go back, and Transformers computes what ours computes. (These texts are shorter than index_topk. In longer
# ones two keys with equal or nearly equal scores may change places at the edge of the top-k, and some rows differ visibly.)
ours.save_pretrained(folder / "ours")
returned = GlmMoeDsaForCausalLM.from_pretrained(folder / "ours").eval()
with torch.no_grad():
    want, got = returned(text).logits, ours(text).logits
print(f"after training: largest difference {(got - want).abs().max():.1e} of {want.abs().max():.3f}")

# %% Or stay in Transformers and swap the attention and the experts: same model, same cache, same generate.
from glm5.integrations import transformers as glm5_in_transformers  # noqa: E402

prompt = text[:1, :100]
before = returned.generate(prompt, max_new_tokens=30, do_sample=False)
glm5_in_transformers.enable(returned)
after = returned.generate(prompt, max_new_tokens=30, do_sample=False)
print(f"generated the same {after.shape[1] - 100} tokens: {torch.equal(before, after)}")
glm5_in_transformers.disable(returned)
