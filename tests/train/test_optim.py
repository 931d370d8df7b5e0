"""Muon and AdamW against plain loops, and Muon Split head by head."""

import pytest
import torch

from glm5.train.optim import NEWTON_SCHULZ, AdamW, Muon, newton_schulz


def full_rank(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def newton_schulz_loop(matrix, steps=5):
    """One matrix, written as in the Muon post."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def muon_loop(weights, gradient_steps, lr, blocks, decay=0.1, momentum=0.95):
    """Muon on one matrix with `blocks(tensor) -> list of 2-D views`, in float64."""
    w, buffer = weights.double().clone(), torch.zeros_like(weights, dtype=torch.float64)
    for g in gradient_steps:
        buffer = momentum * buffer + (1 - momentum) * g.double()
        ahead = (1 - momentum) * g.double() + momentum * buffer
        w *= 1 - lr * decay
        for target, block in zip(blocks(w), blocks(ahead), strict=True):
            target -= lr * 0.2 * max(block.shape) ** 0.5 * newton_schulz_loop(block)
    return w


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8), (1, 1, 5)])
def test_batched_newton_schulz_equals_the_loop_and_orthogonalises(shape):
    stack = full_rank(*shape).double()
    batched = newton_schulz(stack)
    for one, matrix in zip(batched, stack, strict=True):
        torch.testing.assert_close(one, newton_schulz_loop(matrix), rtol=1e-6, atol=1e-6)
    singular = torch.linalg.svdvals(newton_schulz(stack, steps=10))
    assert singular.min() > 0.6 and singular.max() < 1.3


def relative(a, b, start):
    """Difference of two updates, relative to the size of the update."""
    return ((a.double() - b).norm() / (b - start.double()).norm()).item()


@pytest.mark.parametrize("dtype, budget", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_muon_equals_the_plain_loop_on_full_rank_gradients(dtype, budget):
    shapes = {"square": (24, 24), "wide": (8, 24), "tall": (24, 8), "also_wide": (8, 24)}
    parameters = {n: torch.nn.Parameter(full_rank(*s, seed=i)) for i, (n, s) in enumerate(shapes.items())}
    start = {n: p.detach().clone() for n, p in parameters.items()}
    gradients = {n: [full_rank(*s, seed=100 + 10 * i + t) for t in range(3)] for i, (n, s) in enumerate(shapes.items())}
    muon = Muon(parameters, {})
    muon._dtype = dtype
    for t in range(3):
        for n, p in parameters.items():
            p.grad = gradients[n][t].clone()
        muon.step(t, lr=0.02)
    for n, p in parameters.items():
        assert relative(p.detach(), muon_loop(start[n], gradients[n], 0.02, lambda x: [x]), start[n]) < budget, n


def test_muon_split_treats_every_head_and_expert_as_a_matrix_of_its_own():
    heads, nope, value, latent = 3, 4, 6, 16
    parameters = {"kv_b": torch.nn.Parameter(full_rank(heads * (nope + value), latent)),
                  "experts": torch.nn.Parameter(full_rank(5, 6, 16, seed=1))}  # fmt: skip

    def kv_split(t):
        t = t.view(heads, nope + value, latent)
        return [t[:, :nope], t[:, nope:]]

    start = {n: p.detach().clone() for n, p in parameters.items()}
    gradients = {n: full_rank(*p.shape, seed=7) for n, p in parameters.items()}
    gradients["kv_b"][: nope + value] *= 100  # a loud head must not drown the others
    muon = Muon(parameters, {"kv_b": kv_split, "experts": lambda t: [t]})
    muon._dtype = torch.float32
    for n, p in parameters.items():
        p.grad = gradients[n].clone()
    muon.step(0, lr=0.05)

    def kv_blocks(t):
        t = t.view(heads, nope + value, latent)
        return [part for head in t for part in (head[:nope], head[nope:])]

    expected = muon_loop(start["kv_b"], [gradients["kv_b"]], 0.05, kv_blocks)
    assert relative(parameters["kv_b"].detach(), expected, start["kv_b"]) < 1e-5
    expected = muon_loop(start["experts"], [gradients["experts"]], 0.05, lambda t: list(t))
    assert relative(parameters["experts"].detach(), expected, start["experts"]) < 1e-5
    whole = muon_loop(start["kv_b"], [gradients["kv_b"]], 0.05, lambda t: [t])
    assert relative(parameters["kv_b"].detach(), whole, start["kv_b"]) > 0.1


def test_muon_update_has_rms_of_a_fifth_of_the_learning_rate():
    parameters = {"w": torch.nn.Parameter(torch.zeros(32, 128))}
    parameters["w"].grad = full_rank(32, 128)
    Muon(parameters, {}).step(0, lr=0.1)
    assert 0.015 < parameters["w"].detach().square().mean().sqrt() < 0.025


def test_adamw_equals_torch():
    mine = {n: torch.nn.Parameter(full_rank(*s)) for n, s in {"w": (5, 7), "b": (7,)}.items()}
    theirs = {n: torch.nn.Parameter(p.detach().clone()) for n, p in mine.items()}
    optimizer = AdamW(mine, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    peer = torch.optim.AdamW(
        [{"params": [theirs["w"]], "weight_decay": 0.1}, {"params": [theirs["b"]], "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for t in range(5):
        for n in mine:
            mine[n].grad = full_rank(*mine[n].shape, seed=t)
            theirs[n].grad = mine[n].grad.clone()
        optimizer.step(t, lr=0.01)
        peer.step()
    for n in mine:
        torch.testing.assert_close(mine[n], theirs[n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda p: Muon(p, {}), AdamW])
def test_low_precision_parameters_learn_through_float32_masters(make):
    parameters = {"w": torch.nn.Parameter(torch.ones(16, 16).bfloat16())}
    optimizer = make(parameters)
    for t in range(40):  # each update is below half a bfloat16 step of 1.0, so only the master can add them up
        parameters["w"].grad = torch.eye(16).bfloat16() + 0.1
        optimizer.step(t, lr=1e-3 if isinstance(optimizer, Muon) else 1e-4)
    assert parameters["w"].dtype == torch.bfloat16 and (parameters["w"].diagonal() < 1).all()


@pytest.mark.parametrize("make", [lambda p: Muon(p, {}), AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_restores_to_the_same_bits(make, dtype):
    def train(optimizer, parameters, steps):
        for t in steps:
            parameters["w"].grad = full_rank(8, 12, seed=t).to(dtype)
            optimizer.step(t, lr=0.01)

    def fresh():
        parameters = {"w": torch.nn.Parameter(full_rank(8, 12).to(dtype))}
        return make(parameters), parameters

    whole, whole_parameters = fresh()
    train(whole, whole_parameters, range(6))
    first, first_parameters = fresh()
    train(first, first_parameters, range(3))
    second, second_parameters = fresh()
    second_parameters["w"].data.copy_(first_parameters["w"].data)
    second.load_state_dict({n: t.clone() for n, t in first.state_dict().items()})
    train(second, second_parameters, range(3, 6))
    assert torch.equal(whole_parameters["w"], second_parameters["w"])
    with pytest.raises(ValueError, match="does not fit"):
        second.load_state_dict({})
