"""Training with glm5 against a plain PyTorch loop over Transformers' GlmMoeDsa of the same size, in one run.

Both start from random weights of the preset, without an MTP layer, and leave the indexer as it is (top-k is the length, so
that attention is dense in both; Transformers computes its indexer all the same). Ours is ``train_stage``, whole: batches,
Muon and AdamW on float32 masters, norms, audit, metrics. Theirs is what one writes first: ``model(ids, labels=ids).loss``,
``backward``, ``torch.optim.AdamW``. Memory is that of one step over one document, optimizer states included.
"""

import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import peers
from benchmarks.harness import Case, MemoryCase
from glm5 import Glm5Config, Glm5ForCausalLM
from glm5.data import Batch
from glm5.recipes import StageRecipe
from glm5.train.loop import StageState, train_stage
from glm5.train.metrics import MetricsLog
from glm5.train.run import prepare
from glm5.train.stages import KINDS, ModelForm

STEPS = 10  # in a call, so that what is done once a stage counts for little
# What both configurations have, under the same name.
_SAME = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers first_k_dense_replace "
    "num_attention_heads num_key_value_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "index_n_heads index_head_dim n_routed_experts num_experts_per_tok n_shared_experts max_position_embeddings "
    "rope_parameters initializer_range eos_token_id"
).split()


class Rectangles:
    """A dataset of random tokens, every pack one document."""

    def __init__(self, vocabulary: int, length: int):
        self.vocabulary, self.length = vocabulary, length

    def ids(self, step: int, packs: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        return torch.randint(0, self.vocabulary, (packs, self.length), generator=generator)

    def batch(self, step: int, packs_per_step: int, first_pack: int = 0) -> Batch:
        ids = self.ids(step, packs_per_step)
        targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        positions = torch.arange(self.length, dtype=torch.int32).expand(packs_per_step, -1)
        ke = torch.arange(1, ids.numel() + 1, dtype=torch.int32)
        return Batch(ids.view(-1), targets.reshape(-1), positions.reshape(-1), ke - 1 - positions.reshape(-1), ke)


def ours(preset: str, dtype: str, length: int, packs: int, steps: int = STEPS, **keys):
    """A call that trains `steps` steps with our trainer; the model is built now."""
    config = Glm5Config.preset(preset, num_nextn_predict_layers=0, index_topk=length)
    model = Glm5ForCausalLM(config, dtype=getattr(torch, dtype))
    recipe = StageRecipe(
        kind="pretrain",
        steps=steps,
        sequence_length=length,
        packs_per_step=packs,
        mtp_depth=0,
        checkpoint_every=steps,
        **keys,
    )
    stage, dataset = KINDS["pretrain"](recipe, ModelForm()), Rectangles(config.vocab_size, length)

    def run():
        with tempfile.TemporaryDirectory() as folder:
            log = MetricsLog(Path(folder) / "metrics.jsonl")
            quiet, sys.stderr = sys.stderr, SimpleNamespace(write=len, flush=int, isatty=bool)
            try:
                train_stage(model, "bench", stage, dataset, 0, StageState(), log, lambda state: None)
            finally:
                sys.stderr = quiet
                log.close()

    return run


def theirs(preset: str, dtype: str, length: int, packs: int, steps: int = STEPS, attention: str = "sdpa"):
    """The same with Transformers' model in a plain loop."""
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    config = Glm5Config.preset(preset)
    same = {name: getattr(config, name) for name in _SAME}
    torch.manual_seed(0)
    model = GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**same, index_topk=length, attn_implementation=attention))
    model = model.to(getattr(torch, dtype)).train()
    dataset = Rectangles(config.vocab_size, length)

    def run():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(steps):
            ids = dataset.ids(step, packs)
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def cases(quick: bool):
    if not peers.library("transformers"):
        return
    prepare(SimpleNamespace(threads=torch.get_num_threads()))  # as a run does; the peer has the same memory settings
    for dtype in ("bfloat16", "float32"):
        for length, packs in ((256, 4), (1024, 2)):
            call = dict(preset="tiny", dtype=dtype, length=length, packs=packs, steps=2 if quick else STEPS)
            mine, peer = cache(lambda call=call: ours(**call)), cache(lambda call=call: theirs(**call))
            tokens = length * packs * call["steps"]
            yield Case(
                f"trainer: tiny, {dtype}, steps of {packs} x {length} tokens",
                lambda mine=mine: mine()(),
                lambda peer=peer: peer()(),
                peer_name="Transformers sdpa",
                library="transformers",
                goal_ratio=None if quick else 1.5,
                note=f"{tokens} tokens a call",
            )


def prepare_step(which: str, **arguments):
    """For the memory benchmark: one step of "ours" or "theirs"."""
    return (ours if which == "ours" else theirs)(packs=1, steps=1, **arguments)


def memory_cases(quick: bool):
    if not peers.library("transformers"):
        return
    target = "benchmarks.train.bench_trainer:prepare_step"
    again = {"checkpointing": "layers"}
    # Theirs grows with the square of the length: 4096 is what fits everywhere, 16384 would be about 70 GB.
    for length, share in ((1024, None),) if quick else ((2048, None), (4096, 1 / 4)):
        common = {"preset": "small", "dtype": "bfloat16", "length": length}
        for name, keys, limit in (("all kept", {}, None), ("layers computed again", again, share)):
            yield MemoryCase(
                f"trainer: memory of a step of small, one document of {length}, bfloat16, {name}",
                target,
                {"which": "ours", **common, **keys},
                peer={"which": "theirs", **common},
                library="transformers",
                share=limit,
            )
    if not quick:
        yield MemoryCase(
            "trainer: memory of a step of small, one document of 16384, bfloat16, layers computed again",
            target,
            {"which": "ours", "preset": "small", "dtype": "bfloat16", "length": 16384, **again},
            limit=1.6e9,
        )
