"""Appending in place: whatever is done to a cache between steps, it holds what Transformers' own would."""

import copy
import random

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

from transformers.cache_utils import DynamicCache, DynamicIndexedLayer, DynamicLayer

from glm5.integrations import transformers as integration
from glm5.integrations.appending import append_indexer_keys, append_latent
from tests.model import shapes
from tests.model import transformers_models as tm

LATENT, ROPE, DIM = 6, 2, 5


def cache_of(kind):
    cache = DynamicCache()
    cache.layers.append(kind())
    return cache


def step(ours, theirs, count, generator):
    """The same rows to both; True where ours took them in place of update."""
    c, r, k = (torch.randn(1, count, width, generator=generator) for width in (LATENT, ROPE, DIM))
    keys, values = theirs.update(c[:, None], r[:, None], 0)
    latent = append_latent(ours, 0, c, r)
    if latent is None:
        got = ours.update(c[:, None], r[:, None], 0)
    else:
        assert latent.is_contiguous()
        got = [x[None, None] for x in latent.split([LATENT, ROPE], -1)]
    assert torch.equal(got[0], keys) and torch.equal(got[1], values)
    if isinstance(theirs.layers[0], DynamicIndexedLayer):
        want, got = theirs.update_indexer(k, 0), append_indexer_keys(ours, 0, k)
        assert torch.equal(ours.update_indexer(k, 0) if got is None else got, want)
    return latent is not None


def assert_same(ours, theirs):
    for name in ("keys", "values", "indexer_keys"):
        a, b = (getattr(cache.layers[0], name, None) for cache in (ours, theirs))
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name
    assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("kind", [DynamicLayer, DynamicIndexedLayer])
@pytest.mark.parametrize("seed", range(12))
def test_a_cache_holds_what_transformers_would(kind, seed):
    """Steps, crops, resets, copies that go their own ways, tensors that somebody keeps."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    pairs, kept = [(cache_of(kind), cache_of(kind))], []
    with torch.no_grad():
        for _ in range(60):
            ours, theirs = chance.choice(pairs)
            layers, have = (ours.layers[0], theirs.layers[0]), theirs.get_seq_length()
            what = chance.choice(["step"] * 6 + ["long", "crop", "reset", "deep", "shallow", "keep", "select", "grad"])
            if what == "crop" and have > 3:
                ours.crop(-2), theirs.crop(-2)
            elif what == "reset" and chance.random() < 0.3:
                ours.reset(), theirs.reset()
            elif what == "deep" and len(pairs) < 4:
                pairs.append((copy.deepcopy(ours), copy.deepcopy(theirs)))
            elif what == "shallow" and len(pairs) < 4:
                both = cache_of(kind), cache_of(kind)
                for cache, layer in zip(both, layers, strict=True):
                    cache.layers[0] = copy.copy(layer)
                pairs.append(both)
            elif what == "keep" and have:
                held = chance.choice([layers[0].keys, layers[0].keys[..., :1, :], layers[0].values])
                kept.append((held, held.clone()))
                del held
            elif what == "select" and have:
                ours.batch_select_indices(torch.tensor([0])), theirs.batch_select_indices(torch.tensor([0]))
            elif what == "grad":
                with torch.enable_grad():
                    assert not step(ours, theirs, 1, generator)
            else:
                assert step(ours, theirs, 300 if what == "long" else 1, generator)
            for pair in pairs:
                assert_same(*pair)
            assert all(torch.equal(held, before) for held, before in kept)
            if kept and chance.random() < 0.3:
                kept.pop()


@torch.no_grad()
def test_steps_copy_nothing():
    ours, theirs, generator = cache_of(DynamicIndexedLayer), cache_of(DynamicIndexedLayer), torch.Generator()
    layer = ours.layers[0]
    step(ours, theirs, 30, generator)
    places = layer.keys.data_ptr(), layer.indexer_keys.data_ptr()
    for _ in range(50):
        step(ours, theirs, 2, generator)
        ours.crop(-1), theirs.crop(-1)
    assert (layer.keys.data_ptr(), layer.indexer_keys.data_ptr()) == places
    held = layer.keys
    step(ours, theirs, 1, generator)
    assert layer.keys.data_ptr() != places[0] and layer.indexer_keys.data_ptr() == places[1]
    del held


@torch.no_grad()
def test_a_tensor_that_somebody_keeps_is_not_written_over():
    ours, theirs, generator = cache_of(DynamicIndexedLayer), cache_of(DynamicIndexedLayer), torch.Generator()
    step(ours, theirs, 5, generator)
    layer = ours.layers[0]
    held = layer.keys, layer.values[..., 4:, :], layer.indexer_keys
    before = [t.clone() for t in held]
    ours.crop(-2), theirs.crop(-2)
    for _ in range(3):
        step(ours, theirs, 1, generator)
    assert all(torch.equal(*pair) for pair in zip(held, before, strict=True))
    for name in ("keys", "indexer_keys"):  # each alone
        held = getattr(layer, name)
        before = held.clone()
        ours.crop(-2), theirs.crop(-2)
        step(ours, theirs, 1, generator)
        assert torch.equal(held, before), name


def test_a_cache_from_inference_mode_goes_on_elsewhere():
    ours, theirs, generator = cache_of(DynamicIndexedLayer), cache_of(DynamicIndexedLayer), torch.Generator()
    with torch.inference_mode():
        step(ours, theirs, 3, generator)
    with torch.no_grad():
        step(ours, theirs, 1, generator)
        step(ours, theirs, 1, generator)
    with torch.inference_mode():
        step(ours, theirs, 1, generator)
    assert_same(ours, theirs)


@torch.no_grad()
def test_a_cache_can_change_hands():
    """glm5's kernels, Transformers' own forward, glm5's again, on one cache."""
    model, ids = tm.theirs(index_n_heads=32), shapes.random_tokens(1, 20)
    want = model(ids).logits[:, 10:]
    cache, got = DynamicCache(config=model.config), []
    model(ids[:, :10], past_key_values=cache)
    for t in range(10, 20):
        integration.disable(model) if t in (13, 14) else integration.enable(model)
        got.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(got, 1), want, atol=1e-4)
