// Quantisation to int8 by rows and to int4 by groups, back from int4, and both at once for training.
#include "common/pieces.h"
#include "common/quantize.h"
#include "quantize/quantize.h"

namespace glm5::cpu::GLM5_ISA {
namespace {

// ---- int8 ----

template <class T>
void rows_to_int8(const Int8Args& a) {
  // A row has one scale: it is not cut.
  over_pieces(a.rows, a.columns, a.columns, [&](int64_t row, int64_t, int64_t n) {
    const T* x = static_cast<const T*>(a.x) + row * n;
    const float scale = a.scale[row] = int8_scale(largest_magnitude(x, n));
    encode_int8(x, n, scale, a.q + row * n);
  });
}

// ---- int4 ----

// What the codes of some groups mean: (code - zero) * scale. Codes of a symmetric group are in two's complement and its zero
// is 0.
struct Groups {
  float scale[kBlocksAhead], inverse[kBlocksAhead];
  int zero[kBlocksAhead];
};

template <class T>
GLM5_INLINE void symmetric_groups(const T* x, int64_t count, int64_t n, Groups* g) {
  float amax[kBlocksAhead] = {};
  for (int64_t i = 0; i < count; ++i) amax[i] = largest_magnitude(x + i * n, n);
  for (int64_t i = 0; i < kBlocksAhead; ++i) {
    g->scale[i] = amax[i] / 7.f;
    g->inverse[i] = 1.f / g->scale[i];
    g->zero[i] = 0;
  }
}

GLM5_INLINE float least_lane(F x) { return -max_lane(splat<F>(0) - x); }

template <class T>
GLM5_INLINE void groups_with_zeros(const T* x, int64_t count, int64_t n, Groups* g) {
  float lo[kBlocksAhead] = {}, hi[kBlocksAhead] = {};
  for (int64_t i = 0; i < count; ++i) {
    const T* group = x + i * n;
    F low = splat<F>(0), high = low, poison = low;  // lanes beyond n are zeros, which take part anyway
    for (int64_t k = 0; k < n; k += F::kLanes) {
      const F v = load_n(group + k, n - k);
      low = min(v, low);
      high = max(v, high);
      poison = fma(v, splat<F>(0), poison);  // of a NaN or infinity: NaN
    }
    lo[i] = least_lane(low), hi[i] = max_lane(high);
    const float poisoned = sum(poison);
    if (poisoned != poisoned) lo[i] = 0, hi[i] = largest_magnitude(group, n);
  }
  for (int64_t i = 0; i < kBlocksAhead; ++i) {
    g->scale[i] = (hi[i] * 0.5f - lo[i] * 0.5f) / 7.5f;
    g->inverse[i] = 1.f / g->scale[i];
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool coded = is_finite(g->scale[i]) && g->scale[i] != 0;
    const int zero = coded ? static_cast<int>(__builtin_lrintf(-lo[i] / g->scale[i])) : 0;
    g->zero[i] = zero < 15 ? zero : 15;
  }
}

// The codes of an F in group i, whose scale is finite and not 0.
template <bool kSymmetric, bool kByInverse>
struct Coder {
  F scale, inverse;
  I zero;
  GLM5_INLINE Coder(const Groups& g, int64_t i)
      : scale(splat<F>(g.scale[i])), inverse(splat<F>(g.inverse[i])), zero(splat_integer(g.zero[i])) {}
  GLM5_INLINE I operator()(F x) const {
    const I nearest = to_integers(ratio<kByInverse>(x, scale, inverse));
    // A normal scale is no less than 1/7 or 1/15 of the range by more than half a unit; rounding up twice may give 16.
    if (kByInverse) return kSymmetric ? nearest : at_most(nearest + zero, 15);
    return kSymmetric ? within(nearest, -8, 7) : within(nearest + zero, 0, 15);
  }
  // For Values.
  GLM5_INLINE I nibbles(F x) const {
    const I codes = (*this)(x);
    return kSymmetric && GLM5_ISA_LEVEL < 2 ? codes & splat_integer(15) : codes;
  }
};

template <class Codes, class T>
GLM5_INLINE void store_codes(const T* x, int64_t n, const Codes& codes, uint8_t* q) {
  constexpr int64_t kFour = 4 * F::kLanes;
  int64_t i = 0;
  for (; i + kFour <= n; i += kFour) {
    I four[4];
    for (int k = 0; k < 4; ++k) four[k] = codes(load(x + i + k * F::kLanes));
    store_nibbles(q + i / 2, four[0], four[1], four[2], four[3]);
  }
  for (; i + F::kLanes <= n; i += F::kLanes) store_nibbles(q + i / 2, codes(load(x + i)));
  if (i < n) {
    uint8_t rest[F::kLanes / 2];
    store_nibbles(rest, codes(load_n(x + i, n - i)));
    std::memcpy(q + i / 2, rest, static_cast<size_t>((n - i) / 2));
  }
}

// Calls fn(first group, count, size) over the groups of all rows, which lie one behind the other, a few at a time.
template <class Fn>
void over_groups(const Int4Args& a, const Fn& fn) {
  const int64_t size = a.groups ? a.columns / a.groups : 0, groups = a.rows * a.groups;
  if (size == 0) return;
  const int64_t together = size < kTaskElements ? kTaskElements / size : 1;
  parallel_tasks((groups + together - 1) / together, [&](int64_t task) {
    const int64_t end = (task + 1) * together < groups ? (task + 1) * together : groups;
    for (int64_t group = task * together; group < end; group += kBlocksAhead)
      fn(group, end - group < kBlocksAhead ? end - group : kBlocksAhead, size);
  });
}

template <bool kSymmetric, class T>
GLM5_INLINE void find_groups(const T* x, int64_t count, int64_t n, Groups* g) {
  if constexpr (kSymmetric) symmetric_groups(x, count, n, g);
  else groups_with_zeros(x, count, n, g);
}

template <bool kSymmetric, class T>
void to_int4(const Int4Args& a) {
  over_groups(a, [&](int64_t first, int64_t count, int64_t n) {
    const T* x = static_cast<const T*>(a.x) + first * n;
    uint8_t* q = a.q + first * n / 2;
    Groups g;
    find_groups<kSymmetric>(x, count, n, &g);
    for (int64_t i = 0; i < count; ++i, x += n, q += n / 2) {
      const float scale = a.scale[first + i] = g.scale[i];
      if (!kSymmetric) a.zeros[first + i] = static_cast<uint8_t>(g.zero[i]);
      if (inverse_serves(scale)) store_codes(x, n, Coder<kSymmetric, true>(g, i), q);
      else if (scale != 0 && is_finite(scale)) store_codes(x, n, Coder<kSymmetric, false>(g, i), q);
      else std::memset(q, 0, static_cast<size_t>(n / 2));
    }
  });
}

// The values of a group's codes, (code - zero) * scale rounded to T. AVX-512 looks them up: there are 16.
template <class T>
class Values {
 public:
  // `flip` makes codes of nibbles: 8 where they are in two's complement, which `zero` then counts from too.
  GLM5_INLINE Values(float scale, int flip, int zero) {
#if GLM5_ISA_LEVEL == 2
    const I nibbles = {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
    const F values = one_nan(to_floats((nibbles ^ splat_integer(flip)) - splat_integer(zero)) * splat<F>(scale));
    if constexpr (sizeof(T) == 2) table_ = _mm512_cvtepu16_epi32(narrow(values));
    else table_ = _mm512_castps_si512(values.v);
#else
    scale_ = splat<F>(scale), flip_ = splat_integer(flip), zero_ = splat_integer(zero);
#endif
  }
  // Of the nibbles in the lowest bits of `codes`; the other bits must be clear but on AVX-512, which does not see them.
  GLM5_INLINE void store_all(T* out, I codes) const {
#if GLM5_ISA_LEVEL == 2
    const __m512i values = _mm512_permutexvar_epi32(codes.v, table_);
    if constexpr (sizeof(T) == 2) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(values));
    else _mm512_storeu_si512(out, values);
#else
    store_one_nan(out, to_floats((codes ^ flip_) - zero_) * scale_);
#endif
  }

 private:
#if GLM5_ISA_LEVEL == 2
  __m512i table_;
#else
  F scale_;
  I flip_, zero_;
#endif
};

template <class T>
void from_int4(const Int4Args& a) {
  over_groups(a, [&](int64_t first, int64_t count, int64_t n) {
    for (int64_t group = first; group < first + count; ++group) {
      const uint8_t* q = a.codes + group * n / 2;
      T* out = static_cast<T*>(a.out) + group * n;
      const Values<T> values(a.scales[group], a.symmetric ? 8 : 0, a.symmetric ? 8 : a.zero_points[group]);
      int64_t i = 0;
      for (; i + F::kLanes <= n; i += F::kLanes) values.store_all(out + i, load_nibbles(q + i / 2));
      if (i < n) {
        uint8_t rest[F::kLanes / 2] = {};
        T some[F::kLanes];
        std::memcpy(rest, q + i / 2, static_cast<size_t>((n - i) / 2));
        values.store_all(some, load_nibbles(rest));
        std::memcpy(out + i, some, static_cast<size_t>(n - i) * sizeof(T));
      }
    }
  });
}

template <class Codes, class T>
GLM5_INLINE void store_values(const T* x, int64_t n, const Codes& codes, const Values<T>& values, T* out) {
  int64_t i = 0;
  for (; i + F::kLanes <= n; i += F::kLanes) values.store_all(out + i, codes.nibbles(load(x + i)));
  if (i < n) {
    T some[F::kLanes];
    values.store_all(some, codes.nibbles(load_n(x + i, n - i)));
    std::memcpy(out + i, some, static_cast<size_t>(n - i) * sizeof(T));
  }
}

template <bool kSymmetric, class T>
void through_int4(const Int4Args& a) {
  over_groups(a, [&](int64_t first, int64_t count, int64_t n) {
    const T* x = static_cast<const T*>(a.x) + first * n;
    T* out = static_cast<T*>(a.out) + first * n;
    Groups g;
    find_groups<kSymmetric>(x, count, n, &g);
    for (int64_t i = 0; i < count; ++i, x += n, out += n) {
      const float scale = g.scale[i];
      const Values<T> values(scale, kSymmetric ? 8 : 0, kSymmetric ? 8 : g.zero[i]);
      if (inverse_serves(scale)) store_values(x, n, Coder<kSymmetric, true>(g, i), values, out);
      else if (scale != 0 && is_finite(scale)) store_values(x, n, Coder<kSymmetric, false>(g, i), values, out);
      else
        for (int64_t k = 0; k < n; ++k) out[k] = round_to<T>(float_of(scale == 0 ? 0 : 0x7fc00000u));
    }
  });
}

}  // namespace

void quantize_int8(const Int8Args& args) {
  if (args.columns == 0)
    for (int64_t row = 0; row < args.rows; ++row) args.scale[row] = int8_scale(0);
  args.dtype == 0 ? rows_to_int8<bf16>(args) : rows_to_int8<float>(args);
}

void quantize_int4(const Int4Args& args) {
  if (args.columns == 0)
    for (int64_t i = 0; i < args.rows * args.groups; ++i) {
      args.scale[i] = 0;
      if (!args.symmetric) args.zeros[i] = 0;
    }
  if (args.symmetric) args.dtype == 0 ? to_int4<true, bf16>(args) : to_int4<true, float>(args);
  else args.dtype == 0 ? to_int4<false, bf16>(args) : to_int4<false, float>(args);
}

void dequantize_int4(const Int4Args& args) { args.dtype == 0 ? from_int4<bf16>(args) : from_int4<float>(args); }

void fake_quantize_int4(const Int4Args& args) {
  if (args.symmetric) args.dtype == 0 ? through_int4<true, bf16>(args) : through_int4<true, float>(args);
  else args.dtype == 0 ? through_int4<false, bf16>(args) : through_int4<false, float>(args);
}

}  // namespace glm5::cpu::GLM5_ISA
