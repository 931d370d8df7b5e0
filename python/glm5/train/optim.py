"""Muon with Muon Split, and AdamW: the two optimizers of GLM-5, on float32 master weights.

Muon (Jordan 2024) replaces a matrix's momentum by the nearest matrix with orthonormal rows or columns, found by five
Newton-Schulz steps. Muon Split (GLM-5 report, section 2.1) does so for each head of an up-projection by itself. Here a
parameter is seen as a list of stacks of matrices ("split"), and all matrices of one shape in the whole model go through
Newton-Schulz together: a small model has a hundred of them, and one batched product is several times faster than a
hundred products.

Which parameter belongs to which optimizer is decided in ``parameters.py``, learning rates in ``schedule.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass

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


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), decay on tensors of two or more dimensions only.

    Args:
        parameters: by name.
        weight_decay: times the learning rate, taken off each update.
        betas, eps: as in the paper.
        ema: decay of a running mean of the masters, which begins at their first values; 0 keeps none.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        weight_decay: float = 0.1,
        betas=(0.9, 0.95),
        eps: float = 1e-10,
        ema: float = 0.0,
    ):
        self.parameters, self.weight_decay = parameters, weight_decay
        self.betas, self.eps = betas, eps
        # a float32 parameter is its own master
        self.masters = {n: p.data if p.dtype == torch.float32 else p.data.float() for n, p in parameters.items()}
        self.mean = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        self.square = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        self.ema, self._averages = ema, {n: m.clone() for n, m in self.masters.items()} if ema else {}
        self._decayed = [m for m in self.masters.values() if m.dim() >= 2]

    @torch.no_grad()
    def step(self, step: int, lr: float) -> None:
        """Update number `step`, counted from 0. A parameter without a gradient counts as having a zero one."""
        beta1, beta2 = self.betas
        gradients = [
            torch.zeros_like(self.masters[n]) if p.grad is None else p.grad.float() for n, p in self.parameters.items()
        ]
        masters, means, squares = (list(d.values()) for d in (self.masters, self.mean, self.square))
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_mul_(denominators, (1 - beta2 ** (step + 1)) ** -0.5)
        torch._foreach_add_(denominators, self.eps)
        if self._decayed:
            torch._foreach_mul_(self._decayed, 1 - lr * self.weight_decay)
        torch._foreach_addcdiv_(masters, means, denominators, -lr / (1 - beta1 ** (step + 1)))
        if self._averages:
            torch._foreach_lerp_(list(self._averages.values()), masters, 1 - self.ema)
        for name, p in self.parameters.items():
            if p.dtype != torch.float32:
                p.data.copy_(self.masters[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Moments, masters of parameters that are not float32 themselves, averages: ``kind/name -> tensor``."""
        separate = {n: m for n, m in self.masters.items() if self.parameters[n].dtype != torch.float32}
        kinds = {"mean": self.mean, "square": self.square, "master": separate, "ema": self._averages}
        return {f"{kind}/{name}": t for kind, named in kinds.items() for name, t in named.items()}

    def averages(self) -> dict[str, torch.Tensor]:
        """The running mean of each parameter, float32; empty without ``ema``."""
        return dict(self._averages)

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copies what ``state_dict`` returned. The parameters themselves must have been restored before.

        Raises:
            ValueError: a tensor is missing or left over.
        """
        _copy_all(self, tensors)

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None


@dataclass
class _Stack:
    """All matrices of one shape. Everything Muon does to them it does in a few passes over these tensors."""

    members: list[tuple[str, int, int]]  # (name of the parameter, which stack of its split, how many matrices)
    master: torch.Tensor  # [count, rows, columns] float32
    momentum: torch.Tensor  # [count, rows, columns] float32
    average: torch.Tensor | None  # [count, rows, columns] float32, the running mean of master

    def parts(self, tensor: torch.Tensor):
        """`tensor` [count, ...] cut into the members' shares: (name, which stack, share)."""
        shares = tensor.split([count for *_, count in self.members])
        return [(name, i, share) for (name, i, _), share in zip(self.members, shares, strict=True)]


class Muon:
    """Momentum, Nesterov, Newton-Schulz, and an update whose RMS is ``0.2 lr`` for every matrix shape.

    The last is Moonshot's rule (arXiv 2502.16982, eq. 4): ``0.2 sqrt(max(rows, columns))`` times the orthogonal matrix,
    so that AdamW's learning rates carry over.

    Args:
        parameters: by name, two or more dimensions each.
        splits: per name, how the parameter falls into matrices; a name without one is a single matrix.
        weight_decay: times the learning rate, taken off each update.
        momentum: of the gradients' running mean.
        ema: decay of a running mean of the masters, which begins at their first values; 0 keeps none.

    Raises:
        ValueError: a split gives something else than [count, rows, columns].
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        splits: dict[str, Split],
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ema: float = 0.0,
    ):
        self.parameters, self.weight_decay, self.momentum, self.ema = parameters, weight_decay, momentum, ema
        self._splits = {name: splits.get(name, lambda t: [t.unsqueeze(0)]) for name in parameters}
        # Muon is made for bfloat16 (Jordan 2024); where the CPU has no such product, float32 is the faster one.
        self._dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
        members: dict[tuple[int, int], list[tuple[str, int, int]]] = {}
        for name, p in parameters.items():
            for i, stack in enumerate(self._splits[name](p.data)):
                if stack.dim() != 3:
                    raise ValueError(f"Muon: the split of {name} gives {tuple(stack.shape)}, want [count, rows, columns]")
                members.setdefault(tuple(stack.shape[1:]), []).append((name, i, stack.shape[0]))
        self._stacks = {}
        for shape, those in members.items():
            master = torch.empty(sum(count for *_, count in those), *shape)
            average = torch.empty_like(master) if ema else None
            self._stacks[shape] = _Stack(those, master, torch.zeros_like(master), average)
        self._read_masters()
        for stack in self._stacks.values():
            if stack.average is not None:
                stack.average.copy_(stack.master)

    @torch.no_grad()
    def step(self, step: int, lr: float) -> None:
        """One update; `step` is not used, since nothing here depends on how many went before."""
        gradients = {n: self._splits[n](p.grad) for n, p in self.parameters.items() if p.grad is not None}
        parameters = {n: self._splits[n](p.data) for n, p in self.parameters.items()}
        for (rows, columns), stack in self._stacks.items():
            gradient = torch.empty_like(stack.master)
            for name, i, share in stack.parts(gradient):
                share.copy_(gradients[name][i]) if name in gradients else share.zero_()
            stack.momentum.lerp_(gradient, 1 - self.momentum)
            ahead = gradient.lerp_(stack.momentum, self.momentum)  # Nesterov
            update = newton_schulz(ahead.to(self._dtype))

            rate = 0.2 * lr * max(rows, columns) ** 0.5
            stack.master.mul_(1 - lr * self.weight_decay).sub_(update, alpha=rate)
            if stack.average is not None:
                stack.average.lerp_(stack.master, 1 - self.ema)
            for name, i, share in stack.parts(stack.master):
                parameters[name][i].copy_(share)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Momentum, masters where the parameters are not float32 themselves, averages, by shape: ``kind/RxC -> stack``."""
        state = {f"momentum/{rows}x{columns}": s.momentum for (rows, columns), s in self._stacks.items()}
        if any(p.dtype != torch.float32 for p in self.parameters.values()):
            state |= {f"master/{rows}x{columns}": s.master for (rows, columns), s in self._stacks.items()}
        if self.ema:
            state |= {f"ema/{rows}x{columns}": s.average for (rows, columns), s in self._stacks.items()}
        return state

    @torch.no_grad()
    def averages(self) -> dict[str, torch.Tensor]:
        """The running mean of each parameter, float32; empty without ``ema``."""
        if not self.ema:
            return {}
        whole = {n: torch.empty(p.shape, device=p.device) for n, p in self.parameters.items()}
        for stack in self._stacks.values():
            for name, i, share in stack.parts(stack.average):
                self._splits[name](whole[name])[i].copy_(share)
        return whole

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copies what ``state_dict`` returned. The parameters themselves must have been restored before.

        Raises:
            ValueError: a tensor is missing or left over.
        """
        self._read_masters()
        _copy_all(self, tensors)

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    @torch.no_grad()
    def _read_masters(self) -> None:
        for stack in self._stacks.values():
            for name, i, share in stack.parts(stack.master):
                share.copy_(self._splits[name](self.parameters[name].data)[i])


@torch.no_grad()
def _copy_all(optimizer: AdamW | Muon, tensors: dict[str, torch.Tensor]) -> None:
    mine = optimizer.state_dict()
    if mine.keys() != tensors.keys():
        different = sorted(mine.keys() ^ tensors.keys())[:4]
        raise ValueError(f"{type(optimizer).__name__}: the state does not fit this model, differing names: {different}")
    for name, tensor in mine.items():
        tensor.copy_(tensors[name])
