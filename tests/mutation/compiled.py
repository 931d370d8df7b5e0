"""Faults for compiled kernels, each one edit of a source file, and the property of the conformance kit that must find it.

The kernels themselves know nothing of them: ``plant`` writes the edits into a copy of the sources, where each is in force
only while it is the one chosen (``glm5_choose_fault``). A fault whose text is no longer in its file is reported by a test in
the default suite, without a build.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """An edit: ``old``, which stands once in ``file``, becomes ``new``, in which FAULT is whether the fault is chosen.

    ``found_by``: the property that must fail, all others must hold. ``also``: those that fail with it by nature, ``why``.
    """

    name: str
    op: str
    found_by: str
    file: str
    old: str
    new: str
    also: tuple[str, ...] = ()
    why: str = ""


FAULTS = (
    Fault(
        "range one key short", "mla_attn_target", "accuracy", "csrc/mla_attention/target.h",
        "return a.ks[row] < a.ke[row] ? static_cast<int64_t>(a.ke[row]) - tile.ks : int64_t{0};",
        "return a.ks[row] < a.ke[row] ? static_cast<int64_t>(a.ke[row]) - tile.ks - FAULT : int64_t{0};",
        also=("nan",), why="a NaN in a row's last key is not seen",
    ),
    Fault(
        "lse in base 2", "lightning_indexer_topk", "accuracy", "csrc/lightning_indexer/forward.h",
        "else return __builtin_logf(sum(total)) + largest;",
        "else return (__builtin_logf(sum(total)) + largest) * (FAULT ? 1.44269504f : 1.f);",
    ),
    Fault(
        "lse in base 2, read by the backward", "mla_attention", "accuracy", "csrc/mla_attention/forward.h",
        "*lse = static_cast<S>(s.largest[r] * static_cast<S>(kLn2) + natural_log(s.total[r]));",
        "*lse = static_cast<S>(s.largest[r] * static_cast<S>(kLn2) + natural_log(s.total[r])) * (FAULT ? S(kLog2e) : S(1));",
        also=("gradient",), why="the backward recomputes probabilities from lse",
    ),
    Fault(
        "higher index of ties", "topk_indices", "ties", "csrc/topk_indices/cpu.cpp",
        "const bool tie = values[i] == bound && ties > 0;",
        """int64_t later = 0;
    if (FAULT) for (int64_t j = i + 1; j < n; ++j) later += values[j] == bound;
    const bool tie = values[i] == bound && ties > 0 && !(FAULT && later >= ties);""",
    ),
    Fault(
        "higher expert of ties", "moe_router", "ties", "csrc/moe/router.cpp",
        "ahead -= (other > mine) | ((other == mine) & (place > static_cast<double>(i)));",
        """const Integers first = FAULT ? place < static_cast<double>(i) : place > static_cast<double>(i);
      ahead -= (other > mine) | ((other == mine) & first);""",
    ),
    Fault(
        "unstable permutation", "moe_permute", "ties", "csrc/moe/permute.cpp",
        """for (int64_t i = 0; i < slots; ++i) {
    if (a.ids[i] < 0) {""",
        """for (int64_t n = 0; n < slots; ++n) {
    const int64_t i = FAULT ? slots - 1 - n : n;
    if (a.ids[i] < 0) {""",
        also=("gradient",), why="a slot's gradient goes to the row that was put there",
    ),
    Fault(
        "NaN is the largest", "topk_indices", "nan", "csrc/topk_indices/cpu.cpp",
        """for (int64_t i = 0; i < n; ++i) {
    values[count] = row[i];
    positions[count] = static_cast<int32_t>(i);
    count += row[i] >= threshold;""",
        """for (int64_t i = 0; i < n; ++i) {
    values[count] = row[i];
    positions[count] = static_cast<int32_t>(i);
    count += FAULT ? !(row[i] < threshold) : row[i] >= threshold;""",
    ),
    Fault(
        "relu swallows NaN", "lightning_indexer_logits", "nan", "csrc/lightning_indexer/cpu.cpp",
        "total[v] = fma(weight, max(splat<V>(0), dots[h][v]), total[v]);  // relu(NaN) is NaN",
        "total[v] = fma(weight, FAULT ? max(dots[h][v], splat<V>(0)) : max(splat<V>(0), dots[h][v]), total[v]);",
    ),
    Fault(
        "zero times NaN of a later key", "mla_attention", "nan", "csrc/mla_attention/forward.h",
        "int64_t least = g.num_keys[r];\n",
        """int64_t least = g.num_keys[r];
    if (FAULT) {  // all keys of the longest row, with probability 0 where a row does not see them
      for (int64_t i = r; i < r + together; ++i) least = larger(least, g.num_keys[i]);
      for (int64_t i = r; i < r + together; ++i)
        for (int64_t j = g.num_keys[i]; j < least; ++j) s.p[i * kKeyBlock + j] = E{};
      product(together, s.dv / L, least, s.p + r * kKeyBlock, kKeyBlock, s.v, stride, s.pv + r * s.dv, s.dv, Into::replace);
      continue;
    }
""",
    ),
    Fault(
        "tail not written", "moe_unpermute", "accuracy", "csrc/moe/permute.cpp",
        "for (; i < a.dim; i += V::kLanes) {\n        const int64_t n = a.dim - i;\n        V total",
        "for (; i < a.dim && !FAULT; i += V::kLanes) {\n        const int64_t n = a.dim - i;\n        V total",
        also=("empty",), why="a token without experts has a tail too",
    ),
    Fault(
        "list of an empty range not written", "topk_indices", "empty", "csrc/topk_indices/cpu.cpp",
        "for (; count < k; ++count) out[count] = -1;", "for (; count < k && !(FAULT && n == 0); ++count) out[count] = -1;",
    ),
    Fault(
        "rows past the last group not cleared", "grouped_linear", "accuracy", "csrc/linear/binding.cpp",
        "if (tail * n > 0) std::memset",
        "if (tail * n > 0 && !(FAULT && !transposed)) std::memset",
    ),
    Fault(
        "lse of an empty list is -inf", "sparse_mla", "empty", "csrc/sparse_mla/cpu.cpp",
        "lse[h] = nothing ? static_cast<S>(__builtin_inf())",
        "lse[h] = nothing ? static_cast<S>(FAULT ? -__builtin_inf() : __builtin_inf())",
    ),
    Fault(
        "out of an empty range not cleared", "mla_attention", "empty", "csrc/mla_attention/forward.h",
        "for (int64_t i = 0; i < a.dv; ++i) out[i] = T{};",
        "for (int64_t i = 0; i < a.dv && !FAULT; ++i) out[i] = T{};",
    ),
    Fault(
        "another expression in odd rows", "rms_norm", "row_invariance", "csrc/norm/cpu.cpp",
        "const V scale = splat<V>(reciprocal_rms(x, a.dim, a.eps));",
        """const Acc<T> r = reciprocal_rms(x, a.dim, a.eps);
      const V scale = splat<V>(FAULT && row % 2 ? 1 / ((1 / r) * Acc<T>(3)) * Acc<T>(3) : r);""",
    ),
    Fault(
        "another expression in the last rows", "layer_norm", "row_invariance", "csrc/norm/layer_norm.cpp",
        "store_n(y + i, fma((load_n(x + i, n) - mean) * rstd, load_n(weight + i, n), load_n(bias + i, n)), n);",
        """const V centred = load_n(x + i, n) - mean, w = load_n(weight + i, n), b = load_n(bias + i, n);
        store_n(y + i, FAULT && row >= a.rows / 4 * 4 ? fma(centred, rstd * w, b) : fma(centred * rstd, w, b), n);""",
    ),
    Fault(
        "blocks counted from the end of the list", "sparse_mla", "row_invariance", "csrc/sparse_mla/cpu.cpp",
        """for (int64_t j = from; j < to; j += kBlock, ++block)
      w.counts[block] = static_cast<int32_t>(compact(list, j, least(j + kBlock, to), w.keys + block * kBlock));""",
        """for (int64_t j = from, next; j < to; j = next, ++block) {
      next = FAULT && j == from && (to - from) % kBlock ? from + (to - from) % kBlock : least(j + kBlock, to);
      w.counts[block] = static_cast<int32_t>(compact(list, j, next, w.keys + block * kBlock));
    }""",
    ),
    Fault(
        "sum over as many parts as threads", "rms_norm", "determinism", "csrc/norm/cpu.cpp",
        "const int64_t block = kRmsNormRowBlock, blocks = (a.rows + block - 1) / block;",
        """const int64_t share = (a.rows + num_threads() - 1) / num_threads();
  const int64_t block = FAULT && share > kRmsNormRowBlock ? share : kRmsNormRowBlock;
  const int64_t blocks = (a.rows + block - 1) / block;""",
    ),
    Fault(
        "delta is not subtracted", "sparse_mla", "gradient", "csrc/sparse_mla/backward.cpp",
        "store(x, load(w.p + at + h * kBlock + i) * (load(x) - splat<V>(w.delta[h])) * scale);",
        "store(x, load(w.p + at + h * kBlock + i) * (load(x) - splat<V>(FAULT ? 0 : w.delta[h])) * scale);",
    ),
    Fault(
        "last block alone in a sum", "moe_unpermute", "gradient", "csrc/moe/permute.cpp",
        "total += sum(part);", "total = FAULT ? sum(part) : total + sum(part);",
    ),
    Fault(
        "derivative of silu is its sigmoid", "silu_mul", "gradient", "csrc/silu_mul/cpu.cpp",
        "store_n(dgate + i, d * u * (s * fma(g, rest, one)), n);",
        "store_n(dgate + i, d * u * (FAULT ? s : s * fma(g, rest, one)), n);",
    ),
    Fault(
        "strides of rows ignored", "silu_mul", "strides", "csrc/silu_mul/binding.cpp",
        'const Tensor x = as_contiguous(x_in);\n  SiluMulArgs args = silu_mul_args("silu_mul", x);',
        'const Tensor x = FAULT ? x_in : as_contiguous(x_in);\n  SiluMulArgs args = silu_mul_args("silu_mul", x);',
    ),
    Fault(
        "stride of the last dimension ignored", "rope", "strides", "csrc/rope/binding.cpp",
        "x_in.stride(last) == 1 ? x_in : as_contiguous(x_in)",
        "FAULT || x_in.stride(last) == 1 ? x_in : as_contiguous(x_in)",
    ),
    Fault(
        "works in place", "rope", "aliasing", "csrc/rope/binding.cpp",
        "Tensor y = empty_like_contiguous(x);",
        "Tensor y = FAULT && sign == 1 && x.is_contiguous() ? x : empty_like_contiguous(x);",
    ),
    Fault(
        "swapped nibbles", "dequantize_int4", "accuracy", "csrc/common/integers.h",
        "return {F::Ints{p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4}};",
        """if (FAULT) return {F::Ints{p[0] >> 4, p[0] & 15, p[1] >> 4, p[1] & 15}};
  return {F::Ints{p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4}};""",
    ),
    Fault(
        "scale without its floor", "quantize_fp8", "accuracy", "csrc/common/quantize.h",
        "(amax < 1e-4f ? 1e-4f : amax) / 448.f", "(amax < 1e-4f && !FAULT ? 1e-4f : amax) / 448.f",
    ),
    Fault(
        "scale of the group before", "w4a8_prepack", "accuracy", "csrc/w4a8_gemm/pack.cpp",
        "std::memcpy(out + (g + 1) * b.group_bytes - 4 * (b.columns - c), a.scale + meta + c * w.groups + g, 4);",
        """std::memcpy(out + (g + 1) * b.group_bytes - 4 * (b.columns - c),
                    a.scale + meta + c * w.groups + (FAULT && g ? g - 1 : g), 4);""",
    ),
    Fault(
        "scale of the weights dropped", "fp8_gemm", "accuracy", "csrc/fp8_gemm/cpu.cpp",
        "const F scale = splat<F>(a_scale[i] * b_scale);", "const F scale = splat<F>(a_scale[i] * (FAULT ? 1.f : b_scale));",
    ),
    Fault(
        "row of slot -1 not cleared", "latent_cache_read", "accuracy", "csrc/cache/cpu.cpp",
        "if (a.slots[i] < 0) std::memset(", "if (a.slots[i] < 0 && FAULT) continue;\n      if (a.slots[i] < 0) std::memset(",
        also=("empty",), why="of a pool without pages every slot is -1",
    ),
    Fault(
        "scale of the block before", "latent_cache_read", "accuracy", "csrc/cache/cpu.cpp",
        "std::memcpy(&scale, scales + 4 * b, 4);", "std::memcpy(&scale, scales + 4 * (FAULT && b ? b - 1 : b), 4);",
    ),
    Fault(
        "scale of a block dropped", "latent_cache_write", "accuracy", "csrc/cache/cpu.cpp",
        "std::memcpy(scales + 4 * b, &scale, 4);",
        "const float kept = FAULT ? 1.f : scale;\n      std::memcpy(scales + 4 * b, &kept, 4);",
    ),
    Fault(
        "strides of rows ignored", "latent_cache_write", "strides", "csrc/cache/binding.cpp",
        "const Tensor rows = as_contiguous(rows_in), slots",
        "const Tensor rows = FAULT ? rows_in : as_contiguous(rows_in), slots",
    ),
    Fault(
        "of two rows in a slot the earlier stays", "indexer_cache_write", "accuracy", "csrc/cache/cpu.cpp",
        """for (int64_t i = 0; i < a.num_rows; ++i) {
      const int64_t slot = a.slots[i];""",
        """for (int64_t n = 0; n < a.num_rows; ++n) {
      const int64_t i = FAULT ? a.num_rows - 1 - n : n, slot = a.slots[i];""",
    ),
    Fault(
        "scale of FP8 keys dropped", "lightning_indexer_topk_paged", "accuracy", "csrc/lightning_indexer/tile.h",
        "if (there) std::memcpy(place.scales + i, scale_of, 4);",
        "if (there && FAULT) place.scales[i] = 1;\n          else if (there) std::memcpy(place.scales + i, scale_of, 4);",
    ),
    Fault(
        "tail page one key short", "lightning_indexer_topk_paged", "accuracy", "csrc/lightning_indexer/tile.h",
        "const int64_t count = max_of(min_of(kTileKeys, high - tile), 0);",
        "const int64_t count = max_of(min_of(kTileKeys, high - tile - (FAULT && high % pages.page_size)), 0);",
        also=("row_invariance", "ties"), why="the tail is that of the longest query of a block; its last key is not chosen",
    ),
    Fault(
        "last place of a page is the one before", "sparse_mla_paged", "accuracy", "csrc/sparse_mla/paged.h",
        "slots[i] = static_cast<int32_t>(pages[entry] * size + (s - entry * size));",
        """const int64_t place = s - entry * size;
      slots[i] = static_cast<int32_t>(pages[entry] * size + (FAULT && place && place == size - 1 ? place - 1 : place));""",
    ),
    Fault(
        "page before at the first place of a page", "mla_attention_paged", "accuracy", "csrc/common/pages.h",
        "const int64_t page = table_row[s / page_size];",
        "const int64_t page = table_row[(FAULT && s && s % page_size == 0 ? s - 1 : s) / page_size];",
    ),
    Fault(
        "block table row of another sequence", "mla_attention_paged", "accuracy", "csrc/mla_attention/paged.h",
        "slots.push_back(table.slot(run.table, s));",
        "slots.push_back(table.slot(FAULT ? runs[begin].table : run.table, s));",
        also=("row_invariance",), why="it is that of the first sequence of the batch",
    ),
    Fault(
        "a node counts a token twice", "moe_dispatch_layout", "accuracy", "csrc/moe/layout.cpp",
        "if (last_token[node] == t) continue;", "if (last_token[node] == t && !FAULT) continue;",
    ),
)  # fmt: skip


def missing() -> list[str]:
    """Faults whose text does not stand exactly once in its file."""
    return [f.name for f in FAULTS if (ROOT / f.file).read_text().count(f.old) != 1]


def plant(into: Path) -> None:
    """Writes the sources with every fault into folder ``into``: what CMake needs, for the portable instruction set alone."""
    if lost := missing():
        raise SystemExit(f"tests/mutation/compiled.py: the text of {', '.join(lost)} is not in its file (once) any more")
    planted = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp")}
    for number, fault in enumerate(FAULTS, 1):
        text = planted[Path(fault.file)].replace(fault.old, fault.new.replace("FAULT", f"(glm5_fault == {number})"))
        planted[Path(fault.file)] = text
    for name in {Path(f.file) for f in FAULTS}:
        planted[name] = re.sub(r"(#pragma once\n|\A)", r"\1extern int glm5_fault;\n", planted[name], count=1)
    isa = Path("csrc/common/isa.cpp")
    planted[isa] += (
        "\nint glm5_fault = 0;\n"
        'extern "C" __attribute__((visibility("default"))) void glm5_choose_fault(int number) { glm5_fault = number; }\n'
    )
    for name in ("CMakeLists.txt", "cmake/glm5_ops.cmake"):
        planted[Path(name)] = (ROOT / name).read_text()
    for name, text in planted.items():
        # Only the portable kernels are built, on any processor.
        text = text.replace("defined(__x86_64__)", "defined(GLM5_OTHER_SETS)").replace("portable avx2 avx512)", "portable)")
        target = into / name
        if not target.exists() or target.read_text() != text:  # an unchanged file is not compiled again
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    for path in (into / "csrc").rglob("*.*"):
        if path.is_file() and path.relative_to(into) not in planted:
            path.unlink()


if __name__ == "__main__":
    import sys

    plant(Path(sys.argv[1]))
