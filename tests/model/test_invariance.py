"""A token's logits are a function of the token and of what it may see: equal bits however the batch is cut."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glm5 import Glm5Config, Glm5ForCausalLM
from glm5.model.cache import LatentCache
from tests.model import shapes
from tests.ops.properties import same_bits, threads

FORMS = pytest.mark.parametrize("form", shapes.FORMS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])


def hidden(model, batch):
    return model.hidden_states(batch["tokens"], batch["positions"], batch["ks"], batch["ke"])


@FORMS
@DTYPES
@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(form, dtype):
    model, ids = shapes.model(form, dtype), shapes.random_tokens(2, 70)
    whole = model(ids, mtp_depth=3)
    for t in (0, 37, 68):
        changed = ids.clone()
        changed[0, t + 1] = (changed[0, t + 1] + 1) % 96
        other = model(changed, mtp_depth=3)
        # Logits at or before t; at depth d those of rows that read tokens up to t.
        for d, (a, b) in enumerate(zip((whole.logits, *whole.mtp_logits), (other.logits, *other.mtp_logits), strict=True)):
            assert same_bits(a[1], b[1])
            if t - d >= 0:
                assert same_bits(a[0, : t - d + 1], b[0, : t - d + 1]), f"depth {d}"
            assert not torch.equal(a[0, t - d + 1 :], b[0, t - d + 1 :])


@FORMS
@DTYPES
@torch.no_grad()
def test_a_sequence_does_not_feel_its_batch(form, dtype):
    model, ids = shapes.model(form, dtype), shapes.random_tokens(5, 45)
    whole = model(ids).logits
    for rows in ([0], [4, 1], [3, 3, 3]):
        assert same_bits(model(ids[rows]).logits, whole[rows])
    assert same_bits(model(ids[:, :31]).logits, whole[:, :31])


@FORMS
@DTYPES
@torch.no_grad()
def test_a_document_does_not_feel_its_pack(form, dtype):
    model = shapes.model(form, dtype)
    documents = [shapes.random_tokens(n, seed=n) for n in (129, 1, 64, 200)]
    packed = hidden(model, shapes.pack(*documents))
    at = 0
    for document in documents:
        alone = hidden(model, shapes.pack(document))
        assert same_bits(packed[at : at + len(document)], alone)
        at += len(document)
    shifted = hidden(model, shapes.pack(documents[2], documents[0]))
    assert same_bits(shifted[64:], packed[:129])


@FORMS
@DTYPES
@torch.no_grad()
def test_every_instruction_set_keeps_the_promise(isa, form, dtype):
    model = shapes.model(form, dtype, index_topk=64)
    long, short = shapes.random_tokens(700), shapes.random_tokens(33, seed=1)
    packed = hidden(model, shapes.pack(short, long))
    assert same_bits(packed[33:], hidden(model, shapes.pack(long)))
    assert same_bits(packed[:433], hidden(model, shapes.pack(short, long[:400])))


@FORMS
@DTYPES
@torch.no_grad()
def test_the_tiny_preset_at_its_training_length(form, dtype):
    model = Glm5ForCausalLM(Glm5Config.preset("tiny"), dtype=dtype)
    model.attention = form
    first, second = shapes.random_tokens(1024), shapes.random_tokens(500, seed=1)
    packed = hidden(model, shapes.pack(first, second))
    assert same_bits(packed[1024:], hidden(model, shapes.pack(second)))
    assert same_bits(packed[:777], hidden(model, shapes.pack(first[:777])))


@FORMS
@DTYPES
def test_a_long_prefill_in_parts_has_the_bits_of_the_whole(form, dtype, monkeypatch):
    model, ids = shapes.model(form, dtype), shapes.random_tokens(2, 90)
    whole = model(ids, mtp_depth=1)  # with gradients nothing is cut
    monkeypatch.setattr("glm5.model.transformer._ROWS", 37)
    monkeypatch.setattr("glm5.model.attention._PAIRS", 50)
    with torch.no_grad():
        parts = model(ids, mtp_depth=1)
    assert same_bits(whole.logits, parts.logits) and same_bits(whole.mtp_logits[0], parts.mtp_logits[0])


@FORMS
@torch.no_grad()
def test_threads_change_nothing(form):
    model, ids = shapes.model(form), shapes.random_tokens(2, 90)
    whole = model(ids, mtp_depth=1)
    with threads(3):
        again = model(ids, mtp_depth=1)
    assert same_bits(whole.logits, again.logits) and same_bits(whole.mtp_logits[0], again.mtp_logits[0])


@FORMS
@DTYPES
@torch.no_grad()
def test_chunked_prefill_and_decode_have_the_bits_of_the_full_forward(form, dtype):
    model, ids = shapes.model(form, dtype), shapes.random_tokens(2, 75)
    whole = model(ids).logits
    for chunks in ([75], [40, 35], [1] * 3 + [64, 8], [7] * 10 + [5]):
        cache, at = LatentCache(model.config, 2, 80, dtype, ids.device), 0
        for chunk in chunks:
            positions = torch.arange(at, at + chunk).repeat(2)
            ks = torch.tensor([0, 80]).repeat_interleave(chunk)
            cache.place(ks + positions, 80 + at + chunk)
            out = model.hidden_states(ids[:, at : at + chunk].reshape(-1), positions, ks, ks + positions + 1, cache=cache)
            assert same_bits(model.logits(out).view(2, chunk, -1), whole[:, at : at + chunk])
            at += chunk


class Calls(TorchDispatchMode):
    """The names of the glm5 ops that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().removeprefix("glm5::"))
        return func(*args, **(kwargs or {}))


@DTYPES
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "num_attention_heads": 1, "num_key_value_heads": 1},
        {"indexer_types": ("full", "shared", "full"), "index_n_heads": 16},
    ],
    ids=["plain", "bias", "shared"],
)
@torch.no_grad()
def test_few_rows_go_in_few_calls_that_change_no_bit(isa, dtype, changes, monkeypatch):
    model, few = shapes.model("sparse", dtype, **changes), {"decoder_inputs", "decoder_output", "decoder_mlp"}
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    batches = [shapes.pack(*shapes.random_tokens(n).split(9)) for n in (1, 8, 64)]
    with Calls() as calls:
        in_few = [hidden(model, batch) for batch in batches]
    assert few <= calls.names and "silu_mul" in calls.names  # the routed experts'
    monkeypatch.setattr("glm5.model.layers._FEW_ROWS", 0)
    with Calls() as calls:
        assert all(same_bits(hidden(model, batch), got) for batch, got in zip(batches, in_few, strict=True))
    assert not few & calls.names


# Copies, and elementwise + - *, of floating-point values; anything on integers is exact.
ALLOWED = set(
    "embedding index_select index cat stack view _unsafe_view reshape expand slice select split split_with_sizes transpose "
    "permute t unsqueeze squeeze alias detach clone copy_ _to_copy index_copy_ zeros empty empty_like add sub mul".split()
)


class OnlyTheAllowed(TorchDispatchMode):
    """Refuses every aten op on floating-point values that is not a copy or an exact elementwise operation."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((out, args)) if isinstance(t, torch.Tensor)]
        if any(t.is_floating_point() for t in tensors):
            namespace, name = func.name().split("::")
            self.seen.add(namespace)
            assert namespace == "glm5" or name.split(".")[0] in ALLOWED, f"the forward uses {func.name()}"
        return out


@FORMS
@DTYPES
@torch.no_grad()
def test_the_forward_uses_glm5_ops_copies_and_exact_arithmetic_alone(form, dtype):
    model, ids = shapes.model(form, dtype, indexer_types=("full", "shared", "full")), shapes.random_tokens(2, 40)
    model(ids)  # builds the rotary table
    with OnlyTheAllowed() as mode:
        model(ids, mtp_depth=3)
    assert mode.seen == {"glm5", "aten"}
    x = torch.ones(3)
    with pytest.raises(AssertionError, match="aten::sigmoid"), OnlyTheAllowed():
        torch.sigmoid(x)
