"""Would an exact two-pass top-k pay? ``python -m benchmarks.studies.int8_two_pass [RUN_FOLDER]``; see docs/int8-indexer.md.

Pass one scores every key in int8, with a bound on how far each score can be from the bfloat16 form's; pass two scores again
those keys that may be among the best. This counts these survivors, on random activations of GLM-5's indexer and on a trained
run's, and holds the time that is left against the bfloat16 form's. It builds nothing.

With q_h = Q_h + e_h and k = K + e, capitals being int8 values times scales, |q_h.k - Q_h.K| <= |e_h| |k| + |Q_h| |e| = b_h,
and relu stretches nothing. "norms": a score is off by at most sum_h |w_h| b_h, two products a key. "relu known": heads whose
int8 product lies below -b_h add nothing to either score, so that only the other heads' b_h count; this costs the first pass
a comparison and another sum for each head and key. Float32's own rounding is left out: it can only add survivors.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.ops.bench_lightning_indexer_int8 import quantised
from glm5 import _native, ops

HEADS, DIM, TOPK, KEYS = 32, 128, 2048, 131072


def synthetic(queries: int, keys: int, tails: float, generator) -> tuple:
    """q, k, weights of unit normal elements, times exp(tails * normal); weights of both signs."""

    def draw(*shape):
        heavy = (tails * torch.randn(shape, generator=generator)).exp()
        return (torch.randn(shape, generator=generator) * heavy).bfloat16()

    return draw(queries, HEADS, DIM), draw(keys, DIM), torch.randn(queries, HEADS, generator=generator)


def trained(folder: Path, tokens: int) -> list[tuple]:
    """q, k, weights of every indexer of a run's model, over the start of a long text."""
    import pydoc

    from glm5.train.run import load_run

    model = load_run(folder)
    caught = []
    for module in model.modules():
        if type(module).__name__ == "Indexer":
            module.register_forward_hook(lambda _, __, output: caught.append([t.detach() for t in output]))
    text = Path(pydoc.__file__).read_bytes()[:tokens]
    with torch.no_grad():
        model(torch.tensor([list(text)]))
    return [x for x in caught if len(x[1]) == len(text)]


def norm(x: torch.Tensor) -> torch.Tensor:
    return x.double().norm(dim=-1)


def study(q, k, weights, topk: int) -> dict:
    """Medians over queries, which see all keys: recall, how deep the int8 order must be read, survivors of each bound."""
    ranges = torch.zeros(len(q), dtype=torch.int32), torch.full((len(q),), len(k), dtype=torch.int32)
    exact = ops.lightning_indexer_logits(q, k, None, weights, *ranges)
    (q8, q_scale), (k8, k_scale) = ops.quantize_int8(q), ops.quantize_int8(k)
    near = ops.lightning_indexer_logits_int8(*quantised(q, k, None, weights, *ranges))
    q_hat, k_hat = q8.double() * q_scale[..., None], k8.double() * k_scale[:, None]
    k_norm, k_error = norm(k), norm(k.double() - k_hat)
    rows = []
    for t in range(len(q)):
        bound = norm(q[t].double() - q_hat[t])[:, None] * k_norm + norm(q_hat[t])[:, None] * k_error  # [heads, keys]
        w = weights[t].double().abs()[:, None]
        alive = (q_hat[t].float() @ k_hat.float().T) > -bound
        best = exact[t].topk(topk).indices
        row = {"recall": torch.isin(best, near[t].topk(topk).indices).double().mean().item()}
        row["depth"] = (near[t] >= near[t][best].min()).sum().item()
        for name, eps in (("norms", (w * bound).sum(0)), ("relu known", (w * bound * alive).sum(0))):
            error = (exact[t].double() - near[t]).abs()
            assert (error <= eps + 1e-4 * exact[t].abs().max()).all(), "the bound does not hold"
            threshold = (near[t] - eps).topk(topk).values[-1]
            row[name] = ((near[t] + eps) >= threshold).sum().item()
            row[f"slack {name}"] = (eps.mean() / error.mean()).item()
        rows.append(row)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def seconds(call, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def predict(shares: dict[str, float]) -> None:
    """Gain at 128K for shares of survivors: the bfloat16 form's time over that of int8 and the survivors' scores. That the
    first pass computes bounds and the second selects is taken to cost nothing."""
    q, k, weights = synthetic(64, KEYS, 0.0, torch.Generator().manual_seed(0))
    for isa in [name for name in _native.available_isas() if name != "portable"]:
        with _native.using_cpu_isa(isa):
            for queries in (1, 64):
                ke = torch.full((queries,), KEYS, dtype=torch.int32)
                inputs = (q[:queries], k, None, weights[:queries], torch.zeros_like(ke), ke)
                arguments = quantised(*inputs)
                full = seconds(lambda: ops.lightning_indexer_topk(*inputs, TOPK))  # noqa: B023
                first = seconds(lambda: ops.lightning_indexer_topk_int8(*arguments, TOPK))  # noqa: B023
                some = torch.arange(0, KEYS, 8, dtype=torch.int32).expand(queries, -1).contiguous()
                again = torch.ops.glm5.lightning_indexer_selected_logits
                each = seconds(lambda: again(q[:queries], k, weights[:queries], some)) / some.shape[1]  # noqa: B023
                pays = (full / 1.25 - first) / each / KEYS
                gains = "".join(f"  {name} {full / (first + each * KEYS * share):.2f}x" for name, share in shares.items())
                print(
                    f"{isa:7} {queries:3} queries: bf16 {full * 1e3:7.2f} ms, int8 {first * 1e3:6.2f} ms, again "
                    f"{each / queries * 1e9:5.1f} ns a key and query; 1.25x below {100 * max(pays, 0):.1f} % left;{gains}",
                    flush=True,
                )


def main() -> None:
    generator, sets = torch.Generator().manual_seed(0), []
    for name, tails in (("normal", 0.0), ("heavy-tailed", 1.0)):
        sets.append((f"{name}, 32 x 128", *synthetic(8, KEYS, tails, generator), TOPK))
    for folder in sys.argv[1:]:
        for tokens in (1024, 8192):
            for layer, (q, k, weights) in enumerate(trained(Path(folder), tokens)):
                sets.append(
                    (f"trained, layer {layer}, {q.shape[1]} x {q.shape[2]}", q[-32:], k, weights[-32:], tokens // 64)
                )
    print("| activations | keys | top-k | recall | int8 depth | norms | relu known | bound / error |")
    print("|---|---|---|---|---|---|---|---|")
    shares = {}
    for name, q, k, weights, topk in sets:
        got = study(q, k, weights, topk)
        left = {bound: got[bound] / len(k) for bound in ("norms", "relu known")}
        for bound, share in left.items():
            if len(k) > 1024:
                kind = f"{name.split(',')[0]}, {bound}"
                shares[kind] = max(share, shares.get(kind, 0.0))
        print(
            f"| {name} | {len(k)} | {topk} | {got['recall']:.3f} | {got['depth']:.0f} | {100 * left['norms']:.1f} % "
            f"| {100 * left['relu known']:.1f} % | {got['slack norms']:.0f}, {got['slack relu known']:.0f} |",
            flush=True,
        )
    predict(shares)


if __name__ == "__main__":
    main()
