"""Log-probabilities of given tokens under the language-model head, as specified."""

import torch

from glm5.reference._precision import wide


def token_logprobs(
    hidden: torch.Tensor, lm_head: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [T, D], lm_head [V, D], targets [T] int, temperature [T] -> logp [T], entropy [T], both at least float32.

    logp = log_softmax(hidden lm_head^T / temperature) at the target; entropy of the same distribution, in nats.
    """
    hidden_wide, head_wide = wide(hidden, lm_head)
    logits = hidden_wide @ head_wide.T / temperature.to(hidden_wide.dtype)[:, None]
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, targets.long()[:, None]).squeeze(1), entropy
