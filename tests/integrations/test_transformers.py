"""glm5's kernels inside Transformers' GlmMoeDsa: the same numbers, the same generation, the same gradients, and back."""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers.models.glm_moe_dsa", reason="needs: pip install -c constraints.txt transformers")

from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM  # noqa: E402
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as theirs  # noqa: E402

from glm5.integrations import transformers as integration  # noqa: E402
from tests.model import shapes  # noqa: E402
from tests.model import transformers_models as tm  # noqa: E402

CONFIG = pytest.mark.parametrize("name", tm.CONFIGS)


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.disable()


class Compared:
    """Runs a model as Transformers wrote it, then with glm5's kernels on the index sets that were chosen then: ties at the
    boundary of the top-k, which the two break differently, must not hide what comes after (see tests/model)."""

    def __init__(self, monkeypatch, batch: int, keys: int, mask: torch.Tensor | None = None):
        self.patch, self.batch, self.keys = monkeypatch, batch, keys
        self.real = torch.ones(batch * keys, dtype=torch.bool) if mask is None else mask.bool().reshape(-1)

    def run(self, model, call):
        with tm.recorded(model) as record:
            want = call(model)
        choice = tm.TheirChoice(record, self.batch, self.keys, self.real)
        select = integration._select

        def selected(indexer, hidden, q_latent, cos, sin, cache, ks, ke):
            indices = select(indexer, hidden, q_latent, cos, sin, cache, ks, ke)
            return choice(SimpleNamespace(layer=indexer.layer_idx, indices=indices, ks=ks, ke=ke, topk=indexer.index_topk))

        with self.patch.context() as patch:
            patch.setattr(integration, "_select", selected)
            integration.enable(model)
            try:
                got = call(model)
            finally:
                integration.disable(model)
        return want, got

    def close(self, got, want):
        got, want = got.flatten(0, 1)[self.real], want.flatten(0, 1)[self.real]
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@CONFIG
@torch.no_grad()
def test_logits(monkeypatch, name):
    ids = shapes.random_tokens(2, 70)
    compared = Compared(monkeypatch, 2, 70)
    want, got = compared.run(tm.theirs(**tm.CONFIGS[name]), lambda model: model(ids, output_hidden_states=True))
    compared.close(got.logits, want.logits)
    for ours, other in zip(got.hidden_states, want.hidden_states, strict=True):
        compared.close(ours, other)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dense_mask", [False, True], ids=["two dimensions", "four dimensions"])
@torch.no_grad()
def test_padding(monkeypatch, attention, dense_mask):
    mask = torch.ones(3, 60, dtype=torch.long)
    mask[0, :7] = mask[2, :41] = mask[1, 50:] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if dense_mask:
        causal = torch.ones(60, 60, dtype=torch.bool).tril()
        allowed = causal & mask.bool()[:, None, None]
        additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        inputs["attention_mask"] = allowed if attention == "sdpa" else additive
    ids = shapes.random_tokens(3, 60)
    compared = Compared(monkeypatch, 3, 60, mask)
    want, got = compared.run(tm.theirs(attention=attention), lambda model: model(ids, **inputs))
    compared.close(got.logits, want.logits)


@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_packed_documents(monkeypatch, use_cache):
    """With a cache Transformers does not look for documents, and the whole sequence is one."""
    positions = torch.cat([torch.arange(n) for n in (20, 1, 39)])[None]
    ids = shapes.random_tokens(2, 60)
    compared = Compared(monkeypatch, 2, 60)
    want, got = compared.run(tm.theirs(), lambda model: model(ids, position_ids=positions, use_cache=use_cache))
    compared.close(got.logits, want.logits)


@pytest.mark.parametrize("name", ["plain", "index_share", "groups", "tied", "attention_bias", "topk_all", "yarn"])
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
def test_generation(name, cache):
    model = tm.theirs(**tm.CONFIGS[name], index_n_heads=32)  # ties are rare
    prompt, mask = shapes.random_tokens(3, 24), torch.ones(3, 24, dtype=torch.long)
    mask[0, :9] = mask[2, :23] = 0
    options = dict(attention_mask=mask, max_new_tokens=20, do_sample=False, cache_implementation=cache)
    want = model.generate(prompt, **options)
    integration.enable(model)
    assert torch.equal(model.generate(prompt, **options), want)


def test_beam_search_reorders_the_cache():
    model = tm.theirs(index_n_heads=32)
    prompt = shapes.random_tokens(2, 30)
    want = model.generate(prompt, max_new_tokens=10, num_beams=3, do_sample=False)
    integration.enable(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=10, num_beams=3, do_sample=False), want)


def test_sampling_and_assisted_generation():
    model, assistant = tm.theirs(index_n_heads=32), tm.theirs(seed=3, index_n_heads=32, num_hidden_layers=1)
    prompt = shapes.random_tokens(1, 30)
    forms = [
        dict(do_sample=True, top_k=5),
        dict(do_sample=False, assistant_model=assistant),
        dict(do_sample=False, prompt_lookup_num_tokens=3),
    ]

    def generated(form):
        torch.manual_seed(0)
        return model.generate(prompt, max_new_tokens=10, **form)

    want = [generated(form) for form in forms]
    integration.enable(model)
    for form, ids in zip(forms, want, strict=True):
        assert torch.equal(generated(form), ids)


@torch.no_grad()
def test_other_outputs():
    model, ids = tm.theirs(index_n_heads=32), shapes.random_tokens(1, 40)
    options = dict(output_router_logits=True, output_attentions=True)
    want = model(ids, **options)
    integration.enable(model)
    got = model(ids, **options)
    for ours, other in zip(got.router_logits, want.router_logits, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)
    assert got.attentions == ()  # the weights never exist
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, got.logits)


@torch.no_grad()
def test_an_enabled_model_compiles_in_one_graph():
    model = tm.theirs()
    integration.enable(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for time in (30, 47):
        ids = shapes.random_tokens(2, time)
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("name", ["plain", "index_share", "groups", "tied", "attention_bias", "topk_all"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_gradients(monkeypatch, name, checkpointing):
    # Checkpointed layers run twice, which the recorder does not follow: with every key selected no tie needs it.
    model = tm.theirs(**tm.CONFIGS[name] | ({"index_topk": 500} if checkpointing else {}))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = shapes.random_tokens(2, 50)
    gradients = []

    def call(model):
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        if not gradients or not checkpointing:
            loss.backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return loss

    compared = Compared(monkeypatch, 2, 50)
    if checkpointing:
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        integration.enable(model)
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    else:
        losses = compared.run(model, call)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        want, got = gradients
    assert want.keys() == got.keys() and len(want) > 30
    for parameter in want:
        scale = want[parameter].abs().max().clamp(min=1e-6)
        assert (got[parameter] - want[parameter]).abs().max() <= 1e-4 * scale, parameter


@torch.no_grad()
def test_enable_and_disable():
    ids = shapes.random_tokens(1, 40)
    model, other = tm.theirs(), tm.theirs()
    plain = model(ids).logits
    originals = [cls.forward for cls in (theirs.GlmMoeDsaModel, theirs.GlmMoeDsaAttention, theirs.GlmMoeDsaExperts)]

    integration.enable(model)
    fused = model(ids).logits
    assert not torch.equal(fused, plain) and torch.equal(other(ids).logits, plain)
    integration.enable(model)  # twice is once
    integration.disable(model)
    assert torch.equal(model(ids).logits, plain) and "forward" not in vars(model.model)

    integration.enable()
    assert torch.equal(model(ids).logits, fused) and torch.equal(other(ids).logits, fused)
    assert torch.equal(tm.theirs()(ids).logits, fused)
    integration.enable(model)  # both at once
    assert torch.equal(model(ids).logits, fused)
    integration.disable()
    assert torch.equal(model(ids).logits, fused) and torch.equal(other(ids).logits, plain)
    integration.disable(model)
    integration.disable()
    assert torch.equal(model(ids).logits, plain)
    assert originals == [cls.forward for cls in (theirs.GlmMoeDsaModel, theirs.GlmMoeDsaAttention, theirs.GlmMoeDsaExperts)]


@torch.no_grad()
def test_a_copy_of_an_enabled_model_is_a_model_of_its_own():
    model = tm.theirs()
    integration.enable(model)
    ids = shapes.random_tokens(1, 40)
    before = model(ids).logits
    twin = copy.deepcopy(model)
    twin.lm_head.weight.mul_(2)
    for layer in twin.model.layers:
        layer.self_attn.o_proj.weight.zero_()
    assert torch.equal(model(ids).logits, before)
    assert not torch.equal(twin(ids).logits, before)


def test_checkpoints_are_the_same(tmp_path):
    model = tm.theirs()
    integration.enable(model)
    model.save_pretrained(tmp_path)
    again = GlmMoeDsaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@torch.no_grad()
def test_bf16():
    model = tm.theirs().bfloat16()
    ids = shapes.random_tokens(2, 60)
    exact = model.float()(ids).logits
    rounded = model.bfloat16()(ids).logits
    integration.enable(model)
    got = model(ids).logits
    assert got.dtype == torch.bfloat16
    ours, other = ((x.float() - exact).norm() / exact.norm() for x in (got, rounded))
    assert ours < 1.3 * other


# ---- attn_implementation="glm5"


@pytest.mark.parametrize("name", ["plain", "index_share", "yarn_mscale", "topk_all", "one_head"])
@torch.no_grad()
def test_attn_implementation(tmp_path, name):
    model = tm.theirs(**tm.CONFIGS[name])
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1, :20] = 0
    ids = shapes.random_tokens(2, 50)
    want = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("glm5")
    got = model(ids, attention_mask=mask).logits
    real = mask.bool()
    assert (got - want)[real].abs().max() <= 1e-4 * want[real].abs().max()
    model.save_pretrained(tmp_path)
    loaded = GlmMoeDsaForCausalLM.from_pretrained(tmp_path, attn_implementation="glm5").eval()
    assert torch.equal(loaded(ids, attention_mask=mask).logits, got)


def test_attn_implementation_trains():
    model = tm.theirs()
    ids = shapes.random_tokens(1, 30)
    model(ids, labels=ids).loss.backward()
    want = model.model.layers[0].self_attn.kv_b_proj.weight.grad.clone()
    model.zero_grad()
    model.set_attn_implementation("glm5")
    model(ids, labels=ids).loss.backward()
    got = model.model.layers[0].self_attn.kv_b_proj.weight.grad
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


# ---- what cannot be done is said


def test_bad_models_are_named():
    with pytest.raises(ValueError, match="Linear has no GlmMoeDsa layers"):
        integration.enable(torch.nn.Linear(2, 2))
    model = GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**tm.SMALL | {"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="hidden_act is 'gelu', want 'silu'"):
        integration.enable(model)
    integration.enable()
    with pytest.raises(ValueError, match="hidden_act is 'gelu', want 'silu'"):
        model(shapes.random_tokens(1, 5))


def test_masks_with_holes_are_named():
    model = tm.theirs()
    integration.enable(model)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="attention_mask row 0 has padding between tokens"):
        model(shapes.random_tokens(1, 20), attention_mask=mask)
    allowed = torch.ones(20, 20, dtype=torch.bool).tril()
    allowed[10, 3] = False
    with pytest.raises(ValueError, match="query 10's attention mask has holes"):
        model(shapes.random_tokens(1, 20), attention_mask=allowed[None, None])


def test_an_adapter_on_kv_b_proj_is_named():
    model = tm.theirs()
    attention = model.model.layers[0].self_attn
    attention.kv_b_proj = torch.nn.Sequential(attention.kv_b_proj)
    integration.enable(model)
    with pytest.raises(ValueError, match="kv_b_proj is a Sequential, .* merge the adapter"):
        model(shapes.random_tokens(1, 5))


def test_attention_dropout_is_named():
    model, ids = tm.theirs(attention_dropout=0.5), shapes.random_tokens(1, 5)
    integration.enable(model)
    assert model(ids).logits.isfinite().all()
    model.train()
    with pytest.raises(ValueError, match="attention_dropout is 0.5 and the model trains, want 0"):
        model(ids)
    with pytest.raises(ValueError, match="dropout is 0.5, want 0"):
        integration.attention_interface(None, None, None, None, None, 1.0, dropout=0.5)
    with pytest.raises(ValueError, match="for GlmMoeDsa layers"):
        integration.attention_interface(None, None, None, None, None, 1.0)
