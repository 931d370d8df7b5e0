"""Generation: the full forward's choices, whatever the chunk and the batch; noise that depends on its place alone."""

import pytest
import torch

from glm5.model.generation import choose, gumbel_noise
from tests.model import shapes

FORMS = pytest.mark.parametrize("form", shapes.FORMS)


@FORMS
@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_the_full_forward(form):
    model, prompt = shapes.model(form), shapes.random_tokens(30)
    out = model.generate(prompt, 12, chunk=7)
    assert torch.equal(out[:30], prompt) and len(out) == 42
    assert torch.equal(model(out[None]).logits[0, 29:-1].argmax(-1), out[30:])


@FORMS
def test_a_sample_does_not_feel_chunk_or_batch(form):
    model, prompts = shapes.model(form), shapes.random_tokens(3, 25)
    sampled = model.generate(prompts, 10, temperature=1.0, seed=5)
    assert torch.equal(model.generate(prompts, 10, temperature=1.0, seed=5, chunk=4), sampled)
    assert torch.equal(model.generate(prompts[0], 10, temperature=1.0, seed=5), sampled[0])
    assert not torch.equal(model.generate(prompts, 10, temperature=1.0, seed=6), sampled)
    assert torch.equal(model.generate(prompts, 4, temperature=1.0, seed=5), sampled[:, :29])


def test_generation_stops_and_fills_up():
    model, prompts = shapes.model(), shapes.random_tokens(2, 8)
    free = model.generate(prompts, 20)
    stop = int(free[0, 10])
    first = free[0, 8:].tolist().index(stop) + 8
    out = model.generate(prompts, 20, stop_tokens=(stop,))
    assert torch.equal(out[0, : first + 1], free[0, : first + 1]) and (out[0, first + 1 :] == stop).all()
    alone = model.generate(prompts[0], 20, stop_tokens=(stop,))
    assert torch.equal(alone, free[0, : first + 1])
    assert torch.equal(model.generate(prompts, 0), prompts)


def test_noise_is_gumbel_and_counted():
    noise = gumbel_noise(3, 0, 7, 100_000)
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - torch.pi**2 / 6) < 0.05
    assert torch.equal(noise[:96], gumbel_noise(3, 0, 7, 96))
    for other in ((4, 0, 7), (3, 1, 7), (3, 0, 8)):
        assert not torch.equal(noise[:96], gumbel_noise(*other, 96))


@pytest.mark.parametrize(
    "ids, options, words",
    [
        (torch.zeros(0, dtype=torch.long), {"max_new_tokens": 1}, "empty prompt"),
        (torch.zeros(4, dtype=torch.long), {"max_new_tokens": -1}, "max_new_tokens is -1"),
        (torch.zeros(4, dtype=torch.long), {"max_new_tokens": 1, "chunk": 0}, "chunk is 0"),
        (torch.zeros(4, dtype=torch.long), {"max_new_tokens": 1, "seed": -1}, "seed is -1, want 0 to"),
        (torch.zeros(4, dtype=torch.long), {"max_new_tokens": 1, "temperature": float("nan")}, "temperature is nan"),
        (torch.zeros(4, dtype=torch.long), {"max_new_tokens": 2045}, "exceed max_position_embeddings"),
    ],
)
def test_bad_requests_are_named(ids, options, words):
    with pytest.raises(ValueError, match=words):
        shapes.model().generate(ids, **options)


def test_padding_changes_no_bit(monkeypatch):
    model = shapes.model("sparse")
    prompt, seen = shapes.random_tokens(2, 24), {0: [], 1: []}

    def recording(logits, temperature, seed, sequence, position):
        seen[sequence].append((position, logits.clone()))
        return choose(logits, temperature, seed, sequence, position)

    monkeypatch.setattr("glm5.model.generation.choose", recording)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :9] = 0
    model.generate(prompt, 8, attention_mask=mask, chunk=7)
    padded = seen[1]
    seen[0] = []
    model.generate(prompt[1, 9:], 8)
    assert len(padded) == len(seen[0]) == 8
    for (position, logits), (other_position, other) in zip(padded, seen[0], strict=True):
        assert position == other_position and torch.equal(logits, other)
