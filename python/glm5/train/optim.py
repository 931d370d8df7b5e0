"""Muon with Muon Split, and AdamW: the two optimizers of GLM-5, on float32 master weights.

Muon (Jordan 2024) replaces a matrix's momentum by the nearest matrix with orthonormal rows or columns, found by five
Newton-Schulz steps. Muon Split (GLM-5 report, section 2.1) does so for each head of an up-projection by itself. Here a
parameter is seen as a list of stacks of matrices ("split"), and all matrices of one shape in the whole model go through
Newton-Schulz together: a small model has a hundred of them, and one batched product is several times faster than a
hundred products.

Which parameter belongs to which optimizer is decided in ``parameters.py``, learning rates in ``schedule.py``.
"""

from collections.abc import Callable

import torch

# x -> a x + b x^3 + c x^5 drives singular values in (0, 1] to about 1 (0.7 to 1.2) in five steps (Jordan 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

# A view of a tensor of the parameter's shape as stacks [count, rows, columns]; together the stacks cover every element once.
Split = Callable[[torch.Tensor], list[torch.Tensor]]


def newton_schulz(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly orthogonalises every matrix of a stack.

    Args:
        matrices: [count, rows, columns], any float dtype; the arithmetic is done in it (bfloat16 in training).
        steps: iterations.

    Returns:
        [count, rows, columns]: U V^T of each matrix's singular value decomposition, with singular values between about
        0.7 and 1.2.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT.contiguous() if tall else matrices.contiguous()
    x = x / (torch.linalg.vector_norm(x.float(), dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class _Optimizer:
    """Named parameters, their float32 masters, and named state tensors. A float32 parameter is its own master."""

    slots: tuple[str, ...]  # names of the state tensors a parameter has

    def __init__(self, parameters: dict[str, torch.nn.Parameter], weight_decay: float):
        self.parameters, self.weight_decay = parameters, weight_decay
        self.masters = {name: p.data if p.dtype == torch.float32 else p.data.float() for name, p in parameters.items()}
        self.state = {slot: {name: torch.zeros_like(m) for name, m in self.masters.items()} for slot in self.slots}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """``slot/name -> tensor``: state, and the masters of parameters that are not float32 themselves."""
        tensors = {f"{slot}/{name}": t for slot, named in self.state.items() for name, t in named.items()}
        separate = {n: m for n, m in self.masters.items() if m.dtype != self.parameters[n].dtype}
        return tensors | {f"master/{name}": m for name, m in separate.items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copies what ``state_dict`` returned.

        Raises:
            ValueError: a tensor is missing or left over.
        """
        mine = self.state_dict()
        if mine.keys() != tensors.keys():
            raise ValueError(
                f"{type(self).__name__}: the state does not fit, differing names: {sorted(mine.keys() ^ tensors.keys())[:4]}"
            )
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Gradients in float32; a parameter that nothing used this step (an idle expert stack) counts as zero."""
        return {
            name: torch.zeros_like(self.masters[name]) if p.grad is None else p.grad.float()
            for name, p in self.parameters.items()
        }

    def _publish(self) -> None:
        """Rounds masters into parameters of another dtype."""
        for name, p in self.parameters.items():
            if p.dtype != torch.float32:
                p.data.copy_(self.masters[name])


class AdamW(_Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), decay on tensors of two or more dimensions only."""

    slots = ("mean", "square")

    def __init__(self, parameters, weight_decay: float = 0.1, betas=(0.9, 0.95), eps: float = 1e-10):
        super().__init__(parameters, weight_decay)
        self.betas, self.eps = betas, eps
        self._decayed = [m for m in self.masters.values() if m.dim() >= 2]

    @torch.no_grad()
    def step(self, step: int, lr: float) -> None:
        """Update number `step`, counted from 0."""
        if not self.parameters:
            return
        beta1, beta2 = self.betas
        gradients = list(self._gradients().values())
        masters = list(self.masters.values())
        means, squares = list(self.state["mean"].values()), list(self.state["square"].values())
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_mul_(denominators, (1 - beta2 ** (step + 1)) ** -0.5)
        torch._foreach_add_(denominators, self.eps)
        if self._decayed:
            torch._foreach_mul_(self._decayed, 1 - lr * self.weight_decay)
        torch._foreach_addcdiv_(masters, means, denominators, -lr / (1 - beta1 ** (step + 1)))
        self._publish()


class Muon(_Optimizer):
    """Momentum, Nesterov, Newton-Schulz, and an update whose RMS is ``0.2 lr`` for every matrix shape.

    The last is Moonshot's rule (arXiv 2502.16982, eq. 4): ``0.2 sqrt(max(rows, columns))`` times the orthogonal matrix,
    so that AdamW's learning rates carry over.

    Args:
        parameters: two or more dimensions each.
        splits: per name, how the parameter falls into matrices; a name without one is a single matrix.
    """

    slots = ("momentum",)

    def __init__(self, parameters, splits: dict[str, Split], weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(parameters, weight_decay)
        self.momentum = momentum
        self._splits = {name: splits.get(name, lambda t: [t.unsqueeze(0)]) for name in parameters}
        # Muon is made for bfloat16 (Jordan 2024); where the CPU has no such product, float32 is the faster one.
        self._dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
        # shape of the matrices -> where they are: (name, which stack of its split, how many)
        self._groups: dict[tuple[int, int], list[tuple[str, int, int]]] = {}
        for name, master in self.masters.items():
            for i, stack in enumerate(self._splits[name](master)):
                if stack.dim() != 3:
                    raise ValueError(f"Muon: the split of {name} gives {tuple(stack.shape)}, want [count, rows, columns]")
                self._groups.setdefault(tuple(stack.shape[1:]), []).append((name, i, stack.shape[0]))

    @torch.no_grad()
    def step(self, step: int, lr: float) -> None:
        """One update; `step` is not used, since nothing here depends on how many went before."""
        if not self.parameters:
            return
        gradients = self._gradients()
        buffers = self.state["momentum"]
        # buffer = mu buffer + (1 - mu) g, and the Nesterov look-ahead (1 - mu) g + mu buffer; the overall scale is
        # irrelevant, since Newton-Schulz normalises.
        torch._foreach_lerp_(list(buffers.values()), list(gradients.values()), 1 - self.momentum)
        ahead = torch._foreach_lerp(list(gradients.values()), list(buffers.values()), self.momentum)
        pieces = {name: self._splits[name](t) for name, t in zip(gradients, ahead, strict=True)}
        targets = {name: self._splits[name](m) for name, m in self.masters.items()}

        torch._foreach_mul_(list(self.masters.values()), 1 - lr * self.weight_decay)
        for (rows, columns), members in self._groups.items():
            stacked = torch.empty(sum(n for *_, n in members), rows, columns, dtype=self._dtype)
            for part, (name, i, _) in zip(stacked.split([n for *_, n in members]), members, strict=True):
                part.copy_(pieces[name][i])
            update = newton_schulz(stacked)
            rate = -0.2 * lr * max(rows, columns) ** 0.5
            for part, (name, i, _) in zip(update.split([n for *_, n in members]), members, strict=True):
                targets[name][i].add_(part, alpha=rate)
        self._publish()
