"""How a candidate is judged, one function a promise: it runs an implementation on one example and says what is wrong.

Knows nothing of how examples come about, nor which of them a promise is judged on (``properties.py``). ``check`` and the
test suite call the same functions.
"""

import importlib
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from glm5.testing.compare import BUDGETS, allowed_error, relative_error, same_bits
from glm5.testing.spec import OpSpec, as_tuple, by_rows, empty_rows, number_of_rows, select_rows, widened

NAN = float("nan")
NO_GRADIENT = "no output carries a gradient"


@contextmanager
def threads(count: int):
    """Runs a block with ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def dirty_memory():
    """Runs a block in which torch fills fresh memory with NaN (integers with their largest), so that what an op never writes
    cannot pass for the zeros that an allocator often gives."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass
class Candidate:
    """An implementation of an op, as the properties see it: it takes and gives tensors on the CPU, wherever it runs.

    Attributes:
        op: the op's spec.
        function: a callable with the op's signature; it runs on ``device``.
        device: where to.
        worst: dtype -> (largest error measured, its budget), filled by ``accuracy`` and ``gradient``.
    """

    op: OpSpec
    function: Callable
    device: str = "cpu"
    worst: dict = field(default_factory=dict)

    def there(self, arguments: dict, copy: bool = True) -> dict:
        """The arguments on the device, as copies: whatever an implementation does to them, the next one sees them whole."""
        return {k: v.to(self.device, copy=copy) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}

    def call(self, arguments: dict, copy: bool = True) -> tuple:
        """Outputs, then what the op wrote into, on the CPU. A copy has not the strides of what it is copied from."""
        # On other devices torch's deterministic mode would also hide what is not.
        with dirty_memory() if self.device == "cpu" else nullcontext():
            return tuple(o.cpu() for o in self.op.call(self.function, self.there(arguments, copy)))

    def gradients(self, arguments: dict, expanded: bool = False) -> tuple[tuple, dict]:
        """Outputs, and the gradient of each differentiable argument for fixed cotangents (empty where there is none).

        ``expanded``: the cotangents are one number each, seen everywhere with stride 0, as those of ``sum().backward()``.
        """
        names = self.op.leaves(arguments)
        leaves = {k: v.detach().clone().requires_grad_() if k in names else v for k, v in arguments.items()}
        outputs = self.call(leaves)
        wanted = [(i, o) for i, o in enumerate(outputs) if o.requires_grad]
        if not names or not wanted:
            return outputs, {}
        cotangents = [cotangent(o, i, expanded) for i, o in wanted]
        with dirty_memory() if self.device == "cpu" else nullcontext():
            grads = torch.autograd.grad([o for _, o in wanted], [leaves[k] for k in names], cotangents, allow_unused=True)
        return outputs, {k: torch.zeros_like(leaves[k]) if g is None else g for k, g in zip(names, grads, strict=True)}


def cotangent(output: torch.Tensor, index: int, expanded: bool = False) -> torch.Tensor:
    """The fixed cotangent of output number ``index``."""
    generator = torch.Generator().manual_seed(1 + index)
    shape = () if expanded else output.shape
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(output.dtype).expand(output.shape)


def reference_of(op: OpSpec) -> Callable:
    """The op's specification in ``glm5.reference``."""
    return getattr(importlib.import_module("glm5.reference"), op.name)


def expected(op: OpSpec, arguments: dict) -> tuple:
    """What the reference gives: in float64, or on the inputs as they are where the op is exact."""
    theirs = {
        k: v.detach().clone() if isinstance(v, torch.Tensor) else v
        for k, v in (arguments if op.bitwise else widened(arguments)).items()
    }
    return op.call(reference_of(op), theirs)


# Accuracy and gradients: against the reference.


def accuracy(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """The outputs are the reference's: within the error budget of float64, integers exactly."""
    op = candidate.op
    got, want = candidate.call(arguments), expected(op, arguments)
    if found := _shapes(got, want):
        return found
    _measure(candidate, got, want, dtype)
    if op.compare is not None:
        return op.compare(got, want, arguments, dtype)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if op.bitwise:
            found += [] if same_bits(g, w) else [f"output {i}: other bits than the reference's{_where(g, w)}"]
        elif not w.is_floating_point():
            found += [] if torch.equal(g, w) else [f"output {i}: other integers than the reference's{_where(g, w)}"]
        elif not (error := relative_error(g, w)) <= (budget := allowed_error(BUDGETS[op.budget][dtype][0], g)):
            found.append(f"output {i}: relative error {error:.3g}, budget {budget:g}{_where(g, w)}")
    return found


def _shapes(got: tuple, want: tuple) -> list[str]:
    if len(got) != len(want):
        return [f"{len(got)} outputs, want {len(want)}"]
    return [
        f"output {i} has shape {[*g.shape]}, want {[*w.shape]}"
        for i, (g, w) in enumerate(zip(got, want, strict=True))
        if g.shape != w.shape
    ]


def _measure(candidate, got, want, dtype):
    if candidate.op.bitwise or dtype not in BUDGETS[candidate.op.budget]:
        return
    errors = [
        (relative_error(g, w), allowed_error(BUDGETS[candidate.op.budget][dtype][0], g))
        for g, w in zip(got, want, strict=True)
        if g.is_floating_point() and w.is_floating_point()
    ]
    if errors:
        candidate.worst[dtype] = max([candidate.worst.get(dtype, (0.0, 1.0)), *errors], key=lambda e: e[0] / e[1])


def _where(got, want) -> str:
    """Where two tensors first differ badly: a NaN, an infinity or the largest difference."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape or not got.numel():
        return ""
    difference = (got - want).abs().nan_to_num(float("inf"))
    difference[(got == want) | (got.isnan() & want.isnan())] = 0
    if not difference.any():
        return " (in the sign of a zero, or the dtype)"
    place = [int(i) for i in torch.unravel_index(difference.argmax(), got.shape)]
    return f"; at {place}: {got[tuple(place)].item():.6g}, want {want[tuple(place)].item():.6g}"


def gradient(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """The gradients for fixed cotangents are the reference's, within the backward's error budget."""
    op = candidate.op
    outputs, got = candidate.gradients(arguments)
    names = op.leaves(arguments)
    theirs = {k: v.requires_grad_(k in names) if k in names else v for k, v in widened(arguments).items()}
    results = op.call(reference_of(op), theirs)
    if found := _shapes(outputs, results):
        return found
    if not got:
        return [NO_GRADIENT] if any(r.requires_grad for r in results) else []
    pairs = [(i, g, w) for i, (g, w) in enumerate(zip(outputs, results, strict=True)) if g.requires_grad and w.requires_grad]
    want = torch.autograd.grad(
        [w for _, _, w in pairs],
        [theirs[k] for k in names],
        [cotangent(g, i).double() for i, g, _ in pairs],
        allow_unused=True,
    )
    budget, found = BUDGETS[op.budget][dtype][1], []
    for name, w in zip(names, want, strict=True):
        w = torch.zeros_like(theirs[name]) if w is None else w
        error, allowed = relative_error(got[name], w), allowed_error(budget, got[name])
        candidate.worst[dtype] = max([candidate.worst.get(dtype, (0.0, 1.0)), (error, allowed)], key=lambda e: e[0] / e[1])
        if not error <= allowed:
            found.append(f"gradient of {name}: relative error {error:.3g}, budget {allowed:g}{_where(got[name], w)}")
    return found


def complaints(op: OpSpec, function: Callable, arguments: dict, dtype: torch.dtype) -> list[str]:
    """What is wrong with ``function`` on ``arguments``, forward and, where the op has one, backward."""
    candidate = Candidate(op, function)
    found = accuracy(candidate, arguments, dtype)
    return found + (gradient(candidate, arguments, dtype) if op.leaves(arguments) else [])


def nothing(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """Where there is nothing to compute (no rows, no keys, an empty range), shapes and values are the reference's still."""
    op = candidate.op
    if (rows := empty_rows(op, arguments)) is None:
        gradients = gradient(candidate, arguments, dtype) if op.leaves(arguments) else []
        return accuracy(candidate, arguments, dtype) + [c for c in gradients if c != NO_GRADIENT]
    # Only those rows: what is wrong with others is the business of other properties.
    got, want = candidate.call(arguments), expected(op, arguments)
    if found := _shapes(got, want):
        return found
    for i, (kind, g, w) in enumerate(zip(op.outputs, got, want, strict=False)):
        if kind != "other" and not relative_error(g[rows], w[rows]) <= 1e-12:
            found.append(f"output {i}: rows without anything to compute are wrong{_where(g[rows], w[rows])}")
    return found


def chosen_among_ties(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """Among equals the reference's are chosen, in its order: every integer output is its."""
    pairs = zip(candidate.call(arguments), expected(candidate.op, arguments), strict=True)
    return [
        f"output {i}: ties fall otherwise than the reference's{_where(g, w)}"
        for i, (g, w) in enumerate(pairs)
        if not w.is_floating_point() and not torch.equal(g, w)
    ]


def special_values(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """NaN, infinities and zeros of either sign give what the reference gives."""
    op, got, want = candidate.op, candidate.call(arguments), expected(candidate.op, arguments)
    found = [] if op.compare is None else op.compare(got, want, arguments, dtype)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if w.is_floating_point():
            same = torch.equal(g.isnan(), w.isnan())
            same = same and (op.compare is not None or relative_error(g, w) <= BUDGETS[op.budget][dtype][0])
        else:
            same = op.compare is not None or torch.equal(g, w)
        found += [] if same else [f"output {i}: NaN, infinities or zeros are not treated as in the reference{_where(g, w)}"]
    return found


# Determinism, aliasing, strides: bits against bits of the same implementation.


def _everything(candidate, arguments, expanded=False) -> list[torch.Tensor]:
    outputs, gradients = candidate.gradients(arguments, expanded)
    return [*outputs, *gradients.values()]


def _names(candidate, arguments, outputs) -> list[str]:
    return [f"output {i}" for i in range(len(outputs))] + [f"gradient of {k}" for k in candidate.op.leaves(arguments)]


def _other_bits(candidate, arguments, got, want, why) -> list[str]:
    names = _names(candidate, arguments, [None] * (len(want) - len(candidate.op.leaves(arguments))))
    if len(names) != len(want):  # no output carries a gradient
        names = _names(candidate, {}, want)
    return [f"{n}: other bits {why}" for n, g, w in zip(names, got, want, strict=True) if not same_bits(g, w)]


def determinism(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """A second run has the same bits, forward and backward; so have 1, 2 and 3 threads."""
    first = _everything(candidate, arguments)
    found = _other_bits(candidate, arguments, _everything(candidate, arguments), first, "in a second run")
    for count in (1, 2, 3) if candidate.device == "cpu" and not found else ():
        with threads(count):
            again = _everything(candidate, arguments)
        found += _other_bits(candidate, arguments, again, first, f"with {count} thread{'s' * (count > 1)}")
    return found


def aliasing(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """No argument is modified but those that the op is for writing into; outputs share memory with nothing."""
    op, there = candidate.op, candidate.there(arguments)
    before = {k: v.clone() for k, v in there.items() if isinstance(v, torch.Tensor)}
    returned = candidate.function(**there)
    returned = () if returned is None else as_tuple(returned)
    found = [f"{k} was modified" for k, v in before.items() if k not in op.mutates and not same_bits(v, there[k])]
    for i, output in enumerate(returned):
        found += [f"output {i} shares memory with {k}" for k in before if _share(output, there[k])]
        found += [f"output {i} shares memory with output {j}" for j in range(i) if _share(output, returned[j])]
    return found


def _share(a, b) -> bool:
    return a.numel() > 0 and b.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def strided(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other layouts, by name, with NaN (or the largest integer) in the memory between them."""
    other = torch.full_like(t, NAN if t.is_floating_point() else torch.iinfo(t.dtype).max)
    flat = torch.cat([other.flatten()[:1], t.flatten()])
    layouts = {"at an odd address": flat[1:].view(t.shape) if t.numel() else t}
    if t.dim():
        layouts["with every second element"] = torch.stack([t, other], -1)[..., 0]
        layouts["with every second row"] = torch.stack([t, other], 1).flatten(0, 1)[::2]
        layouts["cut from wider rows"] = torch.cat([t, other], -1)[..., : t.shape[-1]]
    if t.dim() > 1:
        layouts["transposed"] = t.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    return layouts


def strides(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """Arguments of any strides and offset give the bits that contiguous ones give."""
    want, found = candidate.call(arguments), []
    layouts = {k: strided(v) for k, v in arguments.items() if isinstance(v, torch.Tensor) and k not in candidate.op.mutates}
    for name, by_layout in layouts.items():
        for layout, value in by_layout.items():
            got = candidate.call({**candidate.there(arguments), name: value}, copy=False)
            if not all(map(same_bits, got, want)):
                found.append(f"other bits where {name} is {layout}")
    return found


def strided_cotangents(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """Cotangents of stride 0 give the gradients of contiguous ones of the same value."""
    names = candidate.op.leaves(arguments)
    _, got = candidate.gradients(arguments, expanded=True)
    leaves = {k: v.detach().clone().requires_grad_() if k in names else v for k, v in arguments.items()}
    wanted = [(i, o) for i, o in enumerate(candidate.call(leaves)) if o.requires_grad]
    if not wanted:
        return []
    dense = [cotangent(o, i, expanded=True).contiguous() for i, o in wanted]
    want = torch.autograd.grad([o for _, o in wanted], [leaves[k] for k in names], dense, allow_unused=True)
    return [
        f"gradient of {k}: other bits where the outputs' gradients have stride 0"
        for k, w in zip(names, want, strict=True)
        if w is not None and not same_bits(got[k], w)
    ]


# Row invariance: an output row is a function of its own inputs and of the keys it sees.


def rows_alone(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """A row has the same bits alone, in any part of the batch and in any order."""
    op, count = candidate.op, number_of_rows(candidate.op, arguments)
    whole = by_rows(op, candidate.call(arguments), arguments)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    parts = {"in another order": order, "in part of the batch": order[: (count + 1) // 2].sort().values}
    parts["without the first row"] = torch.arange(1, count)
    for row in {0, int(order[0]), count - 1}:
        parts[f"where row {row} is alone"] = torch.tensor([row])
    found = []
    for why, rows in parts.items():
        part, rows = select_rows(op, arguments, rows)
        got = by_rows(op, candidate.call(part), part)
        for i, (kind, g, w) in enumerate(zip(op.outputs, got, whole, strict=False)):
            if kind != "other" and not same_bits(g, w[rows]):
                found.append(f"output {i}: other bits {why}")
    return found


def shifted_keys(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """Where in the pack a document's keys lie changes no bit; what stands before and behind them is not read."""
    op, whole, found = candidate.op, candidate.call(arguments), []
    for shift in (1, 16, 77):
        moved = dict(arguments)
        for name in op.keys:
            if (value := arguments.get(name)) is not None:
                around = torch.full_like(value[:1], NAN if value.is_floating_point() else 7)
                around = around.expand(shift, *value.shape[1:])
                moved[name] = torch.cat([around, value, around])
        for name in op.positions:
            if (value := arguments.get(name)) is not None:
                moved[name] = torch.where(value < 0, value, value + shift).to(value.dtype)
        for i, (kind, g, w) in enumerate(zip(op.outputs, candidate.call(moved), whole, strict=False)):
            if kind == "columns":
                g = g[:, shift : g.shape[1] - shift].contiguous()
            elif kind == "positions":
                w = torch.where(w < 0, w, w + shift).to(w.dtype)
            if kind != "other" and not same_bits(g, w):
                found.append(f"output {i}: other bits where the keys lie {shift} further on")
    return found


def wider_lists(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """-1 behind the end of the lists of keys changes no bit."""
    op, whole, found = candidate.op, candidate.call(arguments), []
    for extra in (1, 40, 130):
        wider = dict(arguments)
        for name in op.lists:
            if (value := arguments.get(name)) is not None:
                wider[name] = torch.nn.functional.pad(value, (0, extra), value=-1)
        for i, (kind, g, w) in enumerate(zip(op.outputs, candidate.call(wider), whole, strict=False)):
            if kind == "list":
                g = g[:, : w.shape[1]].contiguous()
            if kind != "other" and not same_bits(g, w):
                found.append(f"output {i}: other bits with {extra} more -1s in the lists")
    return found


# NaN: shows in the rows that see it, and nowhere else.


def sees(op: OpSpec, arguments: dict, key: int) -> torch.Tensor:
    """bool [rows]: which rows see key number ``key``."""
    lists = [arguments[k] for k in op.positions if arguments.get(k) is not None and arguments[k].dim() == 2]
    if lists:
        return (lists[0] == key).any(1)
    return (arguments["ks"] <= key) & (key < arguments["ke"])


def poisons(op: OpSpec, arguments: dict) -> list[str]:
    """The arguments, present in ``arguments``, in which a NaN must show."""
    names = op.poisons if op.poisons is not None else (*op.rows, *op.keys)
    return [k for k in names if isinstance(v := arguments.get(k), torch.Tensor) and v.is_floating_point() and v.numel()]


def poison_stays_visible(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """A NaN in a row's or a key's inputs shows in the rows that see it, and changes no bit of the others."""
    op, found = candidate.op, []
    clean = by_rows(op, candidate.call(arguments), arguments)
    for name in poisons(op, arguments):
        place = arguments[name].shape[0] // 2
        poisoned = arguments[name].clone()
        poisoned[place] = NAN
        if name in op.keys:
            seen = sees(op, arguments, place)
        else:
            seen = torch.arange(number_of_rows(op, arguments)) == place
        with_nan = {**arguments, name: poisoned}
        got, want = (by_rows(op, f(with_nan), with_nan) for f in (candidate.call, lambda a: expected(op, a)))
        for i, (kind, g, w, c) in enumerate(zip(op.outputs, got, want, clean, strict=False)):
            if kind == "other":
                continue
            if not same_bits(g[~seen], c[~seen]):
                found.append(f"output {i}: a NaN in {name}[{place}] changes rows that do not see it")
            if kind == "positions" and name in op.keys and (g[seen] == place).any():
                found.append(f"output {i}: key {place}, whose score is NaN, was chosen")
            if (_rows_with_nan(w) & ~_rows_with_nan(g)).any():
                found.append(f"output {i}: a NaN in {name}[{place}] does not show in a row where it should")
    return found


def _rows_with_nan(t: torch.Tensor) -> torch.Tensor:
    return t.isnan().reshape(t.shape[0], -1).any(1)


# Compilation.


def compiles(candidate: Candidate, arguments: dict, dtype: torch.dtype) -> list[str]:
    """torch.compile(fullgraph, dynamic) gives eager's bits on two numbers of rows with one graph, and tracing without values
    foretells shapes and dtypes."""
    fewer = torch.arange(number_of_rows(candidate.op, arguments) - 1)
    return compiles_both(candidate, arguments, select_rows(candidate.op, arguments, fewer)[0])


def compiles_both(candidate: Candidate, arguments: dict, other: dict) -> list[str]:
    """The same for two given sets of arguments, which differ in sizes that are dynamic."""
    op, function, graphs = candidate.op, candidate.function, []
    there = candidate.there(arguments)
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in there.items()}
        traced = op.call(function, fakes)
    found = [
        f"output {i} is traced as {f.dtype} {[*f.shape]}, is {r.dtype} {[*r.shape]}"
        for i, (f, r) in enumerate(zip(traced, candidate.call(arguments), strict=True))
        if (f.dtype, f.shape) != (r.dtype, r.shape)
    ]

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = Candidate(
        op, torch.compile(lambda **kw: function(**kw), fullgraph=True, dynamic=True, backend=backend), candidate.device
    )
    for kw in (arguments, other):
        if not all(map(same_bits, compiled.call(kw), candidate.call(kw))):
            found.append("other bits than eager once compiled")
    return found + ([f"{len(graphs)} graphs for two numbers of rows, want 1"] if len(graphs) != 1 else [])
