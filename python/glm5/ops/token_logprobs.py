"""Log-probabilities and entropy of the language-model head, computed tile by tile: [T, vocab] never exists."""

import torch

from glm5 import _native  # noqa: F401  (registers the ops)
from glm5.ops._checks import want_tensors
from glm5.ops._register import accumulator, differentiable_once, fake


def token_logprobs(
    hidden: torch.Tensor, lm_head: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``log_softmax(hidden lm_head^T / temperature)`` at the targets, and the entropy of that distribution, in nats.

    The logits have the bits of ``linear(hidden, lm_head, out_dtype=torch.float32)``; the softmax is reduced in blocks of
    256 columns counted from column 0, so that a token's values depend on its own row alone.

    Args:
        hidden: [T, D], bfloat16, float32 or float64.
        lm_head: [V, D], V >= 1, dtype of hidden.
        targets: [T] int64, in [0, V).
        temperature: [T] float32, finite and > 0.

    Returns:
        logp [T] and entropy [T], float32 (float64 for float64). A row with a NaN logit gives NaN in both. Both are
        differentiable in hidden and lm_head; the temperature is a constant. Working memory is O(T (D + V / 80)) forward;
        backward adds 2 M logits and, in bfloat16, 2048 rows of lm_head in float32. Under CPU autocast hidden and lm_head
        are cast to its dtype.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong dtypes or shapes, a target outside [0, V), a temperature that is not finite and > 0, a tensor not
            on the CPU.
    """
    want_tensors("token_logprobs", hidden=hidden, lm_head=lm_head, targets=targets, temperature=temperature)
    logp, entropy, _ = torch.ops.glm5.token_logprobs(hidden, lm_head, targets, temperature)
    return logp, entropy


_INPUTS = {"hidden": "float [T, D]", "lm_head": "hidden [V+, D]", "targets": "int64 [T]", "temperature": "float32 [T]"}


@fake("token_logprobs", **_INPUTS)
def _(hidden, lm_head, targets, temperature):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=accumulator(hidden)) for _ in range(3))


@fake("token_logprobs_backward", **_INPUTS, **dict.fromkeys(("dlogp", "dentropy", "entropy", "lse"), "sum(hidden) [T]"))
def _(dlogp, dentropy, hidden, lm_head, targets, temperature, entropy, lse, need_hidden, need_lm_head):
    return (
        hidden.new_empty(hidden.shape[0] if need_hidden else 0, hidden.shape[1]),
        lm_head.new_empty(lm_head.shape[0] if need_lm_head else 0, lm_head.shape[1]),
    )


def _setup_context(ctx, inputs, output):
    _, entropy, lse = output
    ctx.save_for_backward(*inputs, entropy, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, dlogp, dentropy, _):
    need_hidden, need_lm_head = ctx.needs_input_grad[:2]
    dhidden, dlm_head = torch.ops.glm5.token_logprobs_backward(
        dlogp, dentropy, *ctx.saved_tensors, need_hidden, need_lm_head
    )
    return dhidden if need_hidden else None, dlm_head if need_lm_head else None, None, None


torch.library.register_autograd("glm5::token_logprobs", _backward, setup_context=_setup_context)
differentiable_once("token_logprobs_backward")


def _autocast(hidden, lm_head, targets, temperature):
    # torch.library.register_autocast would cast the temperature too.
    with torch.autocast("cpu", enabled=False):
        dtype = torch.get_autocast_dtype("cpu")
        return torch.ops.glm5.token_logprobs(hidden.to(dtype), lm_head.to(dtype), targets, temperature)


_library = torch.library.Library("glm5", "FRAGMENT")
_library.impl("token_logprobs", _autocast, "AutocastCPU")
