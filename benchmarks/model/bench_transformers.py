"""The whole model, and glm5 inside Transformers, against Transformers' GlmMoeDsa on the same weights.

Two layers, one dense and one of 8 experts (top 2): hidden 1024, 8 heads of 192 + 64, latent 512 + 64, 8 indexer heads of
128, top-k 2048. Decode steps run on caches of random rows.
"""

import copy
import gc
import tempfile
from functools import cache

import torch

from benchmarks import peers
from benchmarks.harness import Case, MemoryCase
from glm5 import Glm5ForCausalLM
from glm5.model.cache import LatentCache

SHAPE = dict(
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=4096,
    moe_intermediate_size=512,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    q_lora_rank=512,
    index_n_heads=8,
    index_topk=2048,
    n_routed_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=65536,
    rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
    eos_token_id=None,
)


def pair(dtype: torch.dtype):
    """(Transformers' model, ours) on the same random weights."""
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    torch.manual_seed(0)
    theirs = GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**SHAPE, attn_implementation="sdpa")).to(dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, Glm5ForCausalLM.from_pretrained(folder)


def drop_in(theirs):
    """The same weights in a second model of Transformers, with glm5's kernels."""
    from glm5.integrations import transformers as integration

    twin = copy.deepcopy(theirs)
    integration.enable(twin)
    return twin


def tokens(count: int) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], (1, count), generator=torch.Generator().manual_seed(1))


def prefill(model, count: int):
    """One forward over ``count`` tokens, logits of the last alone, no cache."""
    ids = tokens(count)
    if isinstance(model, Glm5ForCausalLM):
        position = torch.arange(count)

        @torch.no_grad()
        def ours():
            hidden = model.hidden_states(ids[0], position, torch.zeros_like(position), position + 1)
            return model.logits(hidden[-1:])

        return ours
    return torch.no_grad()(lambda: model(ids, use_cache=False, logits_to_keep=1).logits)


def decode(model, context: int):
    """One token after ``context`` others, from a cache of random rows."""
    ids, generator = tokens(1), torch.Generator().manual_seed(2)
    dtype = model.lm_head.weight.dtype

    def rows(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    if isinstance(model, Glm5ForCausalLM):
        config = model.config
        cache = LatentCache(config, 1, context + 1, dtype, ids.device)
        cache.place(torch.arange(context), context)
        for layer in range(config.num_hidden_layers):
            cache.append_latent(layer, rows(context, config.latent_dim))
            cache.append_indexer_key(layer, rows(context, config.index_head_dim))
        slot = torch.tensor([context])
        position, first_key, end = (torch.tensor([n], dtype=torch.int32) for n in (context, 0, context + 1))

        @torch.no_grad()
        def ours():
            cache.place(slot, context + 1)
            return model.logits(model.hidden_states(ids[0], position, first_key, end, cache=cache))

        return ours

    from transformers import DynamicCache

    config = model.config
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(rows(1, 1, context, config.kv_lora_rank), rows(1, 1, context, config.qk_rope_head_dim), layer)
        cache.update_indexer(rows(1, context, config.index_head_dim), layer)

    @torch.no_grad()
    def theirs():
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return theirs


def training(model, count: int):
    """Forward and backward of the language-model loss over ``count`` tokens."""
    ids = tokens(count)
    options = {} if isinstance(model, Glm5ForCausalLM) else {"use_cache": False}

    def run():
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, **options).loss.backward()

    return run


# Of ours that are timed together: a step is so short that the one after a step of Transformers would be timed in the caches
# which that leaves behind.
STEPS = 64


class Models:
    """Ours, Transformers' ("theirs") and the "drop-in" of one dtype, built when a case first asks for them."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.built = dtype, {}

    def __getitem__(self, which: str):
        if not self.built:
            self.built["theirs"], self.built["ours"] = pair(self.dtype)
        if which not in self.built:
            self.built[which] = drop_in(self.built["theirs"])
        return self.built[which]

    def call(self, make, which: str, size: int, repeats: int = 1):
        """``make(model, size)``, built at its first call, as a function that calls it ``repeats`` times."""
        built = cache(lambda: make(self[which], size))

        def run():
            for _ in range(repeats):
                built()()

        return run


def cases(quick: bool):
    if not peers.library("transformers"):
        return
    context = 2048 if quick else 8192
    for dtype, goal in ((torch.float32, 2.5), (torch.bfloat16, 4.0)):
        models, name, full = Models(dtype), str(dtype).removeprefix("torch."), dtype == torch.float32
        work = [
            (f"prefill of {context} tokens", prefill, context, goal),
            (f"decode at {context}", decode, context, 50.0 if full else None),
        ]
        if full:
            work += [] if quick else [("decode at 32768", decode, 32768, 100.0)]
            work += [(f"forward + backward of {context // 2} tokens", training, context // 2, 3.0)]
        for what, make, size, goal_ratio in work:
            steps = STEPS if make is decode else 1
            peer = models.call(make, "theirs", size)
            for label, which, share in (("the model", "ours", 1.0), ("inside Transformers", "drop-in", 0.5)):
                yield Case(
                    f"transformers: {what}, {name}, {label}",
                    models.call(make, which, size, steps),
                    peer,
                    scale=1 / steps,
                    peer_name="Transformers sdpa",
                    library="transformers",
                    peer_key=f"{what}, {name}",
                    goal_ratio=None if quick or goal_ratio is None else goal_ratio * share,
                    note=f"ours: mean of {steps} steps in a row" if steps > 1 else "",
                )
            del peer
        del models
        gc.collect()


def prepare(which: str, dtype: str, count: int):
    """For the memory benchmark: a prefill by "ours", "theirs" or the "drop-in"."""
    theirs, ours = pair(getattr(torch, dtype))
    if which == "ours":
        del theirs
        return prefill(ours, count)
    del ours
    return prefill(theirs if which == "theirs" else drop_in(theirs), count)


def memory_cases(quick: bool):
    if not peers.library("transformers"):
        return
    target = "benchmarks.model.bench_transformers:prepare"
    context = 2048 if quick else 8192
    for dtype in ("float32", "bfloat16"):
        for which, share in (("ours", 1 / 5), ("drop-in", 2 / 5)):
            yield MemoryCase(
                f"transformers: memory of a prefill of {context} tokens, {dtype}, {which}",
                target,
                {"which": which, "dtype": dtype, "count": context},
                peer={"which": "theirs", "dtype": dtype, "count": context},
                library="transformers",
                share=None if quick else share,
            )
    for count in () if quick else (16384, 32768):
        yield MemoryCase(
            f"transformers: memory of a prefill of {count} tokens, float32, ours",
            target,
            {"which": "ours", "dtype": "float32", "count": count},
            limit=2.5e9,
        )
