"""Simple generation: chunked prefill and decode over an in-memory latent cache, with the full forward's bits.

Sampling adds Gumbel noise from a counter-based generator: a token's noise is a function of (seed, sequence, position), so a
run can stop anywhere and go on. Paged caches, batching of strangers and speculation belong to ``glm5.serve``.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from glm5.model.batches import padding
from glm5.model.cache import LatentCache


def gumbel_noise(seed: int, sequence: int, position: int, size: int) -> torch.Tensor:
    """float64 [size] standard Gumbel noise: Philox-4x64 with key (seed, sequence) and a counter that starts at position."""
    counter = np.array([0, 0, 0, position], dtype=np.uint64)
    bits = np.random.Philox(key=np.array([seed, sequence], dtype=np.uint64), counter=counter).random_raw(size)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return torch.from_numpy(-np.log(-np.log(uniform)))


def choose(logits: torch.Tensor, temperature: float, seed: int, sequence: int, position: int) -> int:
    """The next token from logits [V]: the largest, after Gumbel noise when temperature > 0; ties go to the lower token."""
    scores = logits.double().cpu()
    if temperature > 0:
        scores = scores / temperature + gumbel_noise(seed, sequence, position, scores.shape[0])
    return int(np.argmax(scores.numpy()))


@torch.no_grad()
def generate(
    model,
    ids: torch.Tensor,
    max_new_tokens: int,
    *,
    attention_mask: torch.Tensor | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop_tokens: tuple[int, ...] = (),
    chunk: int = 512,
    stream: Callable[[int, torch.Tensor], None] = lambda *_: None,
) -> torch.Tensor:
    """Continues prompts.

    Args:
        model: a ``Glm5ForCausalLM``; its ``attention`` form is used.
        ids: int [T] or [B, T], T >= 1: the prompts, shorter ones filled up on the left.
        max_new_tokens: how many tokens to add at most.
        attention_mask: like ids, 0 where a prompt is filled up. It changes no bit of what follows.
        temperature: 0 takes the likeliest token, else samples from softmax(logits / temperature).
        seed: of the noise; sequence b of a batch uses stream b, and a token's noise depends on where it stands in its text.
        stop_tokens: a sequence ends after one of them, and is filled up with it while others go on.
        chunk: prompt tokens of each sequence that a prefill step takes. It changes no bit.
        stream: called with (position in the batch's rows, the tokens [B] that were added there) after each step.

    Returns:
        ids with the new tokens appended, int64, as many dimensions as given.

    Raises:
        ValueError: an empty prompt, padding that is not on the left, a number out of range, or more tokens than
            max_position_embeddings.
    """
    prompts = ids if ids.dim() == 2 else ids[None]
    batch, prompt_length = prompts.shape
    total, limit = prompt_length + max_new_tokens, model.config.max_position_embeddings
    if prompt_length == 0:
        raise ValueError("generate: ids holds an empty prompt, want at least one token")
    for name, value, holds, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, ">= 0"),
        ("temperature", temperature, 0 <= temperature < math.inf, "a finite number >= 0"),
        ("seed", seed, 0 <= seed < 2**64, "0 to 2^64 - 1"),
        ("chunk", chunk, chunk >= 1, ">= 1"),
    ):
        if not holds:
            raise ValueError(f"generate: {name} is {value}, want {wanted}")
    if total > limit:
        raise ValueError(f"generate: {prompt_length} + {max_new_tokens} tokens exceed max_position_embeddings ({limit})")

    device = prompts.device
    left = torch.zeros(batch, dtype=torch.int64, device=device)
    if attention_mask is not None:
        left, length = padding(attention_mask.reshape(batch, -1), batch, prompt_length, "generate")
        if bool((left + length < prompt_length).any()):
            raise ValueError("generate: attention_mask has padding on the right, want it on the left")
        left = left.to(device)
    weight = model.head_weight
    cache = LatentCache(model.config, batch, total, weight.dtype, device)
    tokens = torch.empty(batch, total, dtype=torch.int64, device=device)
    tokens[:, :prompt_length] = prompts
    start = torch.arange(batch, device=device)[:, None] * total
    first_key = start + left[:, None]

    def run(first: int, last: int) -> torch.Tensor:
        """Feeds positions [first, last) of every sequence; logits [batch, V] after the last."""
        columns = torch.arange(first, last, device=device).expand(batch, -1)
        slots = start + columns
        cache.place(slots.reshape(-1), (batch - 1) * total + last)
        ke = slots + 1
        ks = torch.minimum(first_key, ke)  # padding sees nothing
        positions = (columns - left[:, None]).clamp(min=0)
        flat = tokens[:, first:last].reshape(-1)
        hidden = model.hidden_states(flat, positions.reshape(-1), ks.reshape(-1), ke.reshape(-1), cache=cache)
        return model.logits(hidden.view(batch, last - first, -1)[:, -1])

    at = 0
    ended = [False] * batch
    while at + 1 < total and max_new_tokens > 0 and not all(ended):
        step = min(chunk, prompt_length - at) if at < prompt_length else 1
        logits = run(at, at + step)
        at += step
        for b in range(batch if at >= prompt_length else 0):
            if ended[b]:
                tokens[b, at] = tokens[b, at - 1]
            else:
                tokens[b, at] = choose(logits[b], temperature, seed, b, at - int(left[b]))
                ended[b] = int(tokens[b, at]) in stop_tokens
        if at >= prompt_length:
            stream(at, tokens[:, at])
    tokens = tokens[:, : at + 1] if max_new_tokens > 0 else tokens
    return tokens if ids.dim() == 2 else tokens[0]
